"""Readers on the real files, on files written here, and on damaged ones."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wfdb

from bridge.errors import ConfigError
from client.errors import RecordingError, SiteFileError
from client.readers.base import Reader, Recording, Signal, find_reader
from client.readers.contract import ContractError, check_reader
from client.readers.edf import EdfReader
from client.readers.npz import NpzReader
from client.readers.wfdb import WfdbReader

from .files import noise, write_edf, write_npz

CINC: dict[str, Any] = {
    "subject": "subject",
    "signals": {
        each: {
            "array": each,
            "rate": f"fs_{each}",
            "scale": f"scale_{each}",
            "channels": [each],
            "ok": f"{each}_ok",
        }
        for each in ("ECG", "PPG")
    },
    "label": {"array": "label", "names": "label_names", "window": "event_window_s"},
    "group": {"array": "alarm_type", "names": "alarm_types"},
}
EEGMAT: dict[str, Any] = {
    "subject": "subject",
    "signals": {
        "EEG": {"array": "EEG", "rate": "fs_EEG", "scale": "scale_EEG", "channels": "channels_EEG"},
        "ECG": {
            "array": "ECG", "rate": "fs_ECG", "scale": "scale_ECG", "channels": "channels_ECG",
            "ok": "ECG_ok", "ok_per": "segment",
        },
    },
    "segments": "segment_start",
    "label": {"array": "label", "rate": "label_fs", "names": "label_names"},
}  # fmt: skip
WFDB: dict[str, Any] = {
    "signals": {
        "ECG": {"channels": {"ECG": ["II", "I", "V"]}},
        "PPG": {"channels": {"PLETH": "PLETH"}},
    }
}
EDF: dict[str, Any] = {
    "signals": {
        "EEG": {"channels": {"Fz": "EEG Fz", "Pz": "EEG Pz"}, "scale": 1e6},
        "ECG": {"channels": {"ECG": "ECG ECG"}, "scale": 1e6},
    },
    "patient_pattern": r"^Subject(\d+)_",
    "label_pattern": r"_(\d)$",
}
PLAIN = {"signals": {"ECG": {"array": "ECG", "rate": 100, "channels": ["I"]}}}


def test_npz_reads_cinc2015(shared_data: Path) -> None:
    reader = NpzReader(CINC)
    path = shared_data / "cinc2015" / "a123l.npz"
    assert path in reader.files(shared_data / "cinc2015")
    found, raw = reader.read(path), np.load(path)
    for each in ("ECG", "PPG"):
        signal = found.signals[each]  # type: ignore[index]
        assert (signal.rate_hz, signal.channels) == (125.0, (each,))
        gone = np.repeat(raw[f"{each}_ok"] == 0, 125)
        assert gone.any()
        assert np.array_equal(np.isnan(signal.data[0]), gone)
        assert np.array_equal(signal.masked, gone)
        scaled = raw[each][0] * raw[f"scale_{each}"]
        assert np.allclose(signal.data[0][~gone], scaled[~gone], rtol=1e-6)
    assert found.patient == "a123l"
    assert found.segments == ((0.0, 300.0),)
    assert found.group == str(raw["alarm_types"][raw["alarm_type"]])
    assert found.labels is not None
    assert (found.labels.starts.tolist(), found.labels.ends.tolist()) == ([290.0], [300.0])
    assert found.labels.values == (str(raw["label_names"][raw["label"]]),)


def test_npz_reads_eegmat(shared_data: Path) -> None:
    path = shared_data / "eegmat" / "subject_20.npz"
    found, raw = NpzReader(EEGMAT).read(path), np.load(path)
    assert found.patient == "20"
    rest, task = found.segments
    assert rest == (0.0, float(raw["segment_start"][1]))
    assert task == (rest[1], raw["EEG"].shape[1] / 250)
    assert found.signals["EEG"].channels[4] == "Fz"
    assert np.allclose(found.signals["EEG"].data[4], raw["EEG"][4] * np.float32(0.1), rtol=1e-6)
    # the electrode was off during the task
    edge = int(rest[1] * 250)
    assert np.isfinite(found.signals["ECG"].data[0, :edge]).all()
    assert np.isnan(found.signals["ECG"].data[0, edge:]).all()
    assert found.labels is not None
    assert found.labels.values == ("rest", "mental_arithmetic")
    assert found.labels.starts[1] == rest[1]


def test_every_shared_set_keeps_the_contract(shared_data: Path) -> None:
    assert len(check_reader(NpzReader(EEGMAT), shared_data / "eegmat")) == 28
    assert len(check_reader(WfdbReader(WFDB), shared_data / "raw" / "cinc2015")) == 15
    assert len(check_reader(EdfReader(EDF), shared_data / "raw" / "eegmat")) == 6


def test_wfdb_says_which_records_have_no_pleth(shared_data: Path) -> None:
    reader = WfdbReader(WFDB)
    found = [reader.read(path) for path in reader.files(shared_data / "raw" / "cinc2015")]
    without = {each.name: each.absent["PPG"] for each in found if "PPG" not in each.signals}
    assert set(without) == {"a109l", "a287l", "a288s"}
    assert without["a109l"] == "no channel PLETH (for PLETH); the file has II, aVF, ABP, RESP"
    assert all(each.signals["ECG"].rate_hz == 250.0 for each in found)


def test_wfdb_values_are_the_formats_own(shared_data: Path) -> None:
    # format 16+24: int16 samples of all channels in turn after 24 bytes; physical = digital / gain (baseline in header)
    header = (shared_data / "raw" / "cinc2015" / "a103l.hea").read_text().splitlines()
    digital = np.frombuffer((shared_data / "raw" / "cinc2015" / "a103l.mat").read_bytes()[24:], "<i2").reshape(-1, 3)
    found = WfdbReader(WFDB).read(shared_data / "raw" / "cinc2015" / "a103l.hea")
    assert header[1].split()[2] == "7247/mV"
    assert np.allclose(found.signals["ECG"].data[0], digital[:, 0] / 7247, atol=1e-6)
    assert np.allclose(found.signals["PPG"].data[0], digital[:, 2] / 1.253e4, atol=1e-6)


def test_wfdb_parts_name_header_and_signal_file(shared_data: Path) -> None:
    path = shared_data / "raw" / "cinc2015" / "a103l.hea"
    assert [part.name for part in WfdbReader(WFDB).parts(path)] == ["a103l.hea", "a103l.mat"]


def test_wfdb_parts_of_a_record_of_segments(tmp_path: Path) -> None:
    (tmp_path / "all.hea").write_text("all/3 2 100 900\na 300\n~ 300\nb 300\n")
    for name in ("a", "b"):
        (tmp_path / f"{name}.hea").write_text(f"# a comment\n{name} 2 100 300\n{name}.dat 16 10 16 0 0 0 0 II\n")
    parts = WfdbReader(WFDB).parts(tmp_path / "all.hea")
    assert [part.name for part in parts] == ["all.hea", "a.hea", "a.dat", "b.hea", "b.dat"]
    (tmp_path / "torn.hea").write_text("")
    with pytest.raises(RecordingError, match=r"torn\.hea: the WFDB header can't be read"):
        WfdbReader(WFDB).parts(tmp_path / "torn.hea")


def write_wfdb(folder: Path, invalid: slice | None = None) -> Path:
    signal = np.sin(np.arange(1000) / 20)[:, None] * [1.0, 0.5]
    if invalid is not None:
        signal[invalid, 1] = np.nan
    wfdb.wrsamp("rec1", 100, ["mV", "NU"], ["II", "PLETH"], signal, fmt=["16", "16"], write_dir=str(folder))
    return folder / "rec1.hea"


def test_wfdb_invalid_samples_are_a_gap(tmp_path: Path) -> None:
    found = WfdbReader(WFDB).read(write_wfdb(tmp_path, slice(200, 250)))
    mask = np.zeros(1000, dtype=bool)
    mask[200:250] = True
    assert np.array_equal(found.signals["PPG"].masked, mask)
    assert np.array_equal(np.isnan(found.signals["PPG"].data[0]), mask)
    assert np.isfinite(found.signals["ECG"].data).all()


def test_wfdb_annotations_are_labels_until_the_next(tmp_path: Path) -> None:
    path = write_wfdb(tmp_path)
    wfdb.wrann("rec1", "atr", np.array([100, 400, 700]), ["+", "N", "+"], aux_note=["(N", "", "(AFIB"],
               write_dir=str(tmp_path))  # fmt: skip
    reader = WfdbReader({**WFDB, "annotations": {"extension": "atr"}})
    labels = reader.read(path).labels
    assert labels is not None
    assert labels.values == ("(N", "(AFIB")
    assert labels.starts.tolist() == [1.0, 7.0]
    assert labels.ends.tolist() == [7.0, 10.0]
    assert [part.name for part in reader.parts(path)] == ["rec1.hea", "rec1.dat", "rec1.atr"]


@pytest.mark.parametrize("damage", ["short signal", "no signal", "torn header", "garbage header"])
def test_damaged_wfdb_is_refused(tmp_path: Path, damage: str) -> None:
    path = write_wfdb(tmp_path)
    signal = path.with_suffix(".dat")
    if damage == "short signal":
        signal.write_bytes(signal.read_bytes()[:1500])
    elif damage == "no signal":
        signal.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20] if damage == "torn header" else b"\x00\xff\x12 nothing\n" * 3)
    with pytest.raises(RecordingError, match=r"rec1.hea: the WFDB .* can't be read"):
        WfdbReader(WFDB).read(path)


def test_truncated_real_wfdb_is_refused(shared_data: Path, tmp_path: Path) -> None:
    for suffix, share in ((".hea", 1.0), (".mat", 0.6)):
        content = (shared_data / "raw" / "cinc2015" / f"a103l{suffix}").read_bytes()
        (tmp_path / f"a103l{suffix}").write_bytes(content[: int(share * len(content))])
    with pytest.raises(RecordingError, match=r"a103l\.hea: the WFDB signals can't be read"):
        WfdbReader(WFDB).read(tmp_path / "a103l.hea")


def test_edf_reads_the_real_files(shared_data: Path) -> None:
    reader = EdfReader(EDF)
    found = [reader.read(path) for path in reader.files(shared_data / "raw" / "eegmat")]
    assert [(each.patient, each.labels.values) for each in found if each.labels] == [
        (patient, (part,)) for patient in ("02", "03", "20") for part in ("1", "2")
    ]
    assert {each.signals["EEG"].data.shape for each in found} == {(2, 91000), (2, 31000)}
    assert all(signal.rate_hz == 500.0 for each in found for signal in each.signals.values())


def test_edf_values_are_the_formats_own(shared_data: Path) -> None:
    path = shared_data / "raw" / "eegmat" / "Subject03_2.edf"
    content = path.read_bytes()
    n = int(content[252:256])
    labels = [content[256 + 16 * i :][:16].decode().strip() for i in range(n)]
    samples = [int(content[256 + 216 * n + 8 * i :][:8]) for i in range(n)]
    at = labels.index("EEG Fz")
    limits = [float(content[256 + offset * n + 8 * at :][:8]) for offset in (104, 112, 120, 128)]
    blocks = np.frombuffer(content[256 * (n + 1) :], "<i2").reshape(-1, sum(samples))
    digital = blocks[:, sum(samples[:at]) : sum(samples[: at + 1])].ravel()
    expected = (digital - limits[2]) * (limits[1] - limits[0]) / (limits[3] - limits[2]) + limits[0]
    found = EdfReader(EDF).read(path)
    assert np.allclose(found.signals["EEG"].data[0], expected, atol=1e-3)


def two_rates(path: Path, **more: Any) -> Path:
    rng = np.random.default_rng(0)
    signals = {"EEG Fz": (250, 100 * rng.normal(size=2500)), "EEG Pz": (250, 100 * rng.normal(size=2500)),
               "ECG ECG": (100, 500 * rng.normal(size=1000))}  # fmt: skip
    return write_edf(path, {**signals, **more.pop("signals", {})}, **more)


def test_edf_modalities_keep_their_own_rates(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fz, _, ecg = 100 * rng.normal(size=2500), rng.normal(size=2500), 500 * rng.normal(size=1000)
    found = EdfReader(EDF).read(two_rates(tmp_path / "Subject07_1.edf"))
    assert found.patient == "07"
    assert (found.signals["EEG"].rate_hz, found.signals["ECG"].rate_hz) == (250.0, 100.0)
    assert np.allclose(found.signals["EEG"].data[0], np.round(10 * fz) / 10, atol=2e-3)
    assert np.allclose(found.signals["ECG"].data[0], np.round(10 * ecg) / 10, atol=2e-3)


def test_edf_annotations_are_labels(tmp_path: Path) -> None:
    notes = [(0.0, 4.0, "rest"), (4.0, 0.0, "task")]
    path = two_rates(tmp_path / "Subject07_1.edf", annotations=notes)
    options = {key: value for key, value in EDF.items() if key != "label_pattern"}
    found = EdfReader({**options, "annotations": True}).read(path).labels
    assert found is not None
    assert found.values == ("rest", "task")
    assert (found.starts.tolist(), found.ends.tolist()) == ([0.0, 4.0], [4.0, 10.0])


def test_edf_channels_of_different_rates_are_not_one_modality(tmp_path: Path) -> None:
    path = two_rates(tmp_path / "Subject07_1.edf", signals={"EEG Pz": (100, np.arange(1000.0))})
    with pytest.raises(RecordingError, match=r"EEG Fz, EEG Pz have different rates(.|\n)*100, 250 Hz"):
        EdfReader(EDF).read(path)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda b: b[: len(b) // 2], r"truncated: \d+ bytes, the header promises \d+"),
        (lambda b: b[:300], "can't be read as EDF"),
        (lambda b: b[:100], "can't be read as EDF"),
        (lambda b: b"", "can't be read as EDF"),
        (lambda b: b"\x00" * len(b), "can't be read as EDF"),
        (lambda b: b[:192] + b"EDF+D" + b[197:], "discontinuous EDF"),
        (lambda b: b[:236] + b"-1      " + b[244:], "-1 data records"),
    ],
)
def test_damaged_edf_is_refused(tmp_path: Path, damage: Any, text: str) -> None:
    path = two_rates(tmp_path / "Subject07_1.edf")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RecordingError, match=text):
        EdfReader(EDF).read(path)


def test_edf_without_the_channel_says_what_there_is(tmp_path: Path) -> None:
    path = write_edf(tmp_path / "Subject07_1.edf", {"EEG Fz": (250, np.arange(2500.0))})
    found = EdfReader(EDF).read(path)
    assert found.absent == {
        "EEG": "no channel EEG Pz (for Pz); the file has EEG Fz",
        "ECG": "no channel ECG ECG (for ECG); the file has EEG Fz",
    }


def test_a_file_name_without_a_patient_is_refused(tmp_path: Path) -> None:
    path = two_rates(tmp_path / "night.edf")
    with pytest.raises(RecordingError, match=r"night: the file's name gives no patient(.|\n)*patient_pattern"):
        EdfReader(EDF).read(path)


def torn(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        middle = len(content) // 3
        path.write_bytes(content[:middle] + bytes(each ^ 0xFF for each in content[middle : middle + 64])
                         + content[middle + 64 :])  # fmt: skip
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not an archive")
    elif kind == "pickle":
        np.savez(path, ECG=np.array([{"a": 1}], dtype=object))
    elif kind == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(3))
        path.write_bytes(buffer.getvalue())
    elif kind == "wrong member":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("ECG.npy", b"\x93NUMPY nonsense")


@pytest.mark.parametrize("kind", ["torn", "flipped", "empty", "text", "pickle", "npy", "wrong member"])
def test_damaged_npz_is_refused(tmp_path: Path, kind: str) -> None:
    path = write_npz(tmp_path, "a")
    torn(path, kind)
    with pytest.raises(RecordingError, match=r"a.npz: ") as caught:
        NpzReader(PLAIN).read(path)
    assert "unsafely" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "arrays", "text"),
    [
        ({"subject": "who"}, {}, r"has no array 'who'(.|\n)*holds ECG, PPG, subject"),
        ({"subject": "ECG"}, {}, r"array 'ECG' is not as expected(.|\n)*one value"),
        ({"ECG": {"rate": "fs"}}, {"fs": np.array("x")}, r"array 'fs' is not as expected(.|\n)*one number"),
        ({}, {"ECG": np.array([["a"]])}, r"array 'ECG' is not as expected(.|\n)*numbers"),
        ({}, {"ECG": np.zeros((2, 2, 2))}, r"not float64 of shape \(2, 2, 2\)"),
        ({"ECG": {"channels": ["I", "II"]}}, {}, r"1 rows has the channel names \['I', 'II'\]"),
        ({"ECG": {"ok": "ok"}}, {"ok": np.ones(3)}, r"'ok' has 3 values(.|\n)*10 are needed, one a second"),
        ({"ECG": {"rate": "fs"}}, {"fs": np.array(-5)}, "sampling rate -5"),
        ({"label": {"array": "y"}}, {"y": np.zeros(5)}, "names no rate"),
        ({"label": {"array": "y", "names": "n"}}, {"y": np.array(3), "n": np.array(["a"])}, "must index 1 names"),
    ],
)
def test_npz_that_is_not_laid_out_as_said(tmp_path: Path, options: dict, arrays: dict, text: str) -> None:
    path = write_npz(tmp_path, "a", **arrays)
    signal = {"array": "ECG", "rate": 100, "channels": ["I"], **options.pop("ECG", {})}
    with pytest.raises(RecordingError, match=text):
        NpzReader({"signals": {"ECG": signal}, **options}).read(path)


def test_npz_without_a_modality_says_so_and_keeps_the_other(tmp_path: Path) -> None:
    signals = {"ECG": PLAIN["signals"]["ECG"], "EMG": {"array": "EMG", "rate": 10, "channels": ["x"]}}
    found = NpzReader({"signals": signals}).read(write_npz(tmp_path, "a"))
    assert list(found.signals) == ["ECG"]
    assert found.absent == {"EMG": "no array 'EMG', it holds ECG, PPG, subject"}


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (NpzReader, {"signal": {}}, "unknown key 'signal', did you mean 'signals'"),
        (NpzReader, {"signals": {"ECG": {"array": "E", "rate": 1, "channel": []}}}, "did you mean 'channels'"),
        (WfdbReader, {**WFDB, "anotations": {}}, "did you mean 'annotations'"),
        (EdfReader, {**EDF, "patient_pattern": "("}, "is no regular expression"),
    ],
)
def test_wrong_options_name_the_key(kind: type[Reader], options: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        kind(options)


def test_an_unknown_reader_lists_the_installed_ones() -> None:
    assert find_reader("edf") is EdfReader
    with pytest.raises(SiteFileError, match=r"no reader 'xml'(.|\n)*edf, fog, isruc, npz, wesad, wfdb"):
        find_reader("xml")


class Broken(Reader):
    """Keeps the contract but for one clause."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.clause, self.count = options["clause"], 0

    def files(self, folder: Path) -> list[Path]:
        found = sorted(folder.glob("*.npz"))
        return found[::-1] if self.clause == "order" else found

    def parts(self, path: Path) -> list[Path]:
        return [path.with_suffix(".gone")] if self.clause == "parts" else [path]

    def read(self, path: Path) -> Recording:
        self.count += 1
        data = noise(4, 10, self.count if self.clause == "repeat" else 0)
        if self.clause == "inf":
            data[0, 0] = np.inf
        segments = ((2.0, 4.0), (0.0, 2.0)) if self.clause == "segments" else ((0.0, 4.0),)
        name = "other" if self.clause == "name" else path.stem
        return Recording("" if self.clause == "patient" else "p", name, {"ECG": Signal(data, 10.0, ("I",))}, segments)


@pytest.mark.parametrize(
    ("clause", "text"),
    [
        ("order", "files is sorted"),
        ("parts", "parts names the path itself"),
        ("repeat", "read gives the same recording twice"),
        ("inf", "values are finite or NaN"),
        ("segments", "segments are in order"),
        ("name", "name is the one that name tells"),
        ("patient", "names its patient"),
    ],
)
def test_the_contract_kit_finds_each_broken_clause(tmp_path: Path, clause: str, text: str) -> None:
    write_npz(tmp_path, "a")
    write_npz(tmp_path, "b")
    with pytest.raises(ContractError, match=text):
        check_reader(Broken({"clause": clause}), tmp_path)
    assert len(check_reader(Broken({"clause": "none"}), tmp_path)) == 2

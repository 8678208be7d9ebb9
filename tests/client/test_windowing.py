"""Windows: alignment in time, gaps, segments, labels, counted rejections, damaged and unfit recordings."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.windows import Preprocessing, WindowSpec
from client.errors import NoWindowsError, RecordingError, SiteFileError
from client.labels import LabelSource, label_windows, read_label_csv
from client.quality import judge
from client.readers.base import LabelTrack, Recording, Signal
from client.site import InputFormat, Site, open_site
from client.site_file import LabelsSection, QualitySection, write_site_file
from client.windowing import cut, windows_of

from .files import PLAIN, formats, noise, recording, site_file, write_npz

NO_LABELS = LabelSource("none", {})
FILTERED = Preprocessing(bandpass_hz=(0.5, 15.0))


def ramp(seconds: float, rate: float) -> np.ndarray:
    return (np.arange(round(seconds * rate)) / rate)[None].astype(np.float32)


def test_windows_of_different_rates_begin_at_the_same_time() -> None:
    record = recording(10, ecg=ramp(10, 100), ppg=ramp(10, 40))
    found = cut(record, site_file(), formats(), NO_LABELS)
    assert found.starts.tolist() == list(range(9))
    assert found.signals["old"].shape == (9, 1, 200)
    assert found.signals["new"].shape == (9, 1, 80)
    # a ramp's value is its time
    assert np.allclose(found.signals["old"][:, 0, 0], found.starts, atol=1e-6)
    assert np.allclose(found.signals["new"][:, 0, 0], found.starts, atol=1e-6)
    assert np.allclose(found.signals["new"][:, 0, -1], found.starts + 2 - 1 / 40, atol=1e-5)


def test_a_signal_that_starts_later_is_cut_by_time() -> None:
    record = recording(10, ecg=ramp(10, 100), ppg=ramp(9.5, 40) + np.float32(0.5))
    late = Signal(record.signals["PPG"].data, 40.0, ("P",), start_seconds=0.5)
    record = Recording("p", "r", {**record.signals, "PPG": late}, record.segments)
    found = cut(record, site_file(), formats(), NO_LABELS)
    assert found.rejected == Counter({"PPG missing": 1})
    assert found.starts.tolist() == list(range(1, 9))
    assert np.allclose(found.signals["new"][:, 0, 0], found.starts, atol=1e-6)


def test_resampled_windows_stay_aligned_after_a_gap() -> None:
    ecg, ppg = ramp(12, 100), ramp(12, 40)
    ecg[:, 333:337] = np.nan
    found = cut(recording(12, ecg=ecg, ppg=ppg), site_file(), formats(rates=(64, 32)), NO_LABELS)
    assert found.starts.tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 10]
    inner = slice(20, -20)
    for role, rate in (("old", 64), ("new", 32)):
        times = found.starts[:, None] + np.arange(2 * rate) / rate
        off = np.abs(found.signals[role][:, 0] - times)[:, inner]
        # half a sample of rounding, and the ripple of resampling a ramp
        assert off[1:-1].max() < 0.5 / rate + 0.01, role


def test_no_window_crosses_a_segment_and_each_segment_starts_its_own_grid() -> None:
    record = recording(10, segments=((0.0, 3.5), (3.5, 4.5), (4.5, 10.0)))
    found = cut(record, site_file(), formats(), NO_LABELS)
    assert found.starts.tolist() == [0, 1, 4.5, 5.5, 6.5, 7.5]
    assert found.rejected == Counter({"short segment": 1})


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.tuples(st.integers(0, 1199), st.integers(1, 150)), max_size=4),
    edges=st.lists(st.integers(1, 119), max_size=3, unique=True),
    step=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
)
def test_accepted_windows_are_exactly_the_clean_ones(gaps: list, edges: list, step: float) -> None:
    ecg, ppg = noise(12, 100, 5), noise(12, 40, 6)
    for first, length in gaps:
        ecg[:, first : first + length] = np.nan
    cuts = [0.0, *sorted(edge / 10 for edge in edges), 12.0]
    segments = tuple(pairwise(cuts))
    file = site_file(window={"seconds": 2, "step_seconds": step})
    found = cut(recording(12, ecg=ecg, ppg=ppg, segments=segments), file, formats(FILTERED), NO_LABELS)
    expected = []
    for start, end in segments:
        at = start
        while at + 2 <= end + 1e-9:
            first = round(at * 100)
            if np.isfinite(ecg[0, first : first + 200]).all():
                expected.append(at)
            at += step
    assert np.allclose(found.starts, expected)
    assert np.isfinite(found.signals["old"]).all()
    assert len(found.rejections) == found.rejected["ECG nan"] + found.rejected["short segment"]


@settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from([32.0, 50.0, 64.0, 100.0, 128.0]),
    target=st.sampled_from([40, 64, 100, 256]),
    samples=st.integers(60, 150),
    begin=st.floats(0, 2),
    gap=st.integers(0, 400),
)
def test_windows_that_are_no_whole_number_of_samples_are_cut_whole(
    rate: float, target: int, samples: int, begin: float, gap: int
) -> None:
    """Segments of exactly one window at odd places: each is cut, or rejected, never half."""
    seconds = samples / target
    data = ramp(14, rate)
    data[:, gap] = np.nan
    signal = Signal(data, rate, ("I",))
    edges = [begin, begin + seconds, begin + 2 * seconds, begin + 3 * seconds]
    file = site_file(
        window={"seconds": seconds, "step_seconds": seconds},
        old={"modality": "ECG", "channels": ["I"], "rate_hz": rate},
    )
    spec = WindowSpec(modality="ECG", channels=("I",), rate_hz=target, samples=samples)
    found = cut(
        Recording("p", "r", {"ECG": signal}, tuple(pairwise(edges))),
        file, {"old": InputFormat(window=spec, preprocessing=PLAIN)}, NO_LABELS,
    )  # fmt: skip
    assert len(found.starts) + len(found.rejections) == 3
    assert len(found.starts) >= 2
    middle = found.signals["old"][:, 0, samples // 2] - found.starts
    # half a sample on each side of the raw and of the new grid, and the ripple of resampling a ramp's ends
    assert np.abs(middle - samples // 2 / target).max() < 0.5 / rate + 0.5 / target + 0.15


def test_a_filter_sees_nothing_across_a_gap() -> None:
    ecg = noise(12, 100, 7)
    ecg[:, 500:600] = np.nan
    other = ecg.copy()
    other[:, :500] *= 50
    both = [
        cut(recording(12, ecg=each, ppg=noise(12, 40, 8)), site_file(), formats(FILTERED), NO_LABELS)
        for each in (ecg, other)
    ]
    after = both[0].starts >= 6
    assert after.sum() == 5
    assert np.array_equal(both[0].signals["old"][after], both[1].signals["old"][after])
    assert not np.allclose(both[0].signals["old"][~after], 0)


def test_counts_by_reason() -> None:
    ecg, ppg = noise(20, 100, 1), noise(20, 40, 2)
    ecg[:, 0:150] = 0.25  # flat: windows 0 and, with half a second of it, 1 (0.5 s is more than 0.2 of 2 s)
    ecg[:, 550] = np.nan  # nan: windows 4 and 5
    ecg[:, 1000:1008] = 9.0  # clipped: 4 % of windows 9 and 10
    mask = np.zeros(800, dtype=bool)
    mask[14 * 40 : 15 * 40] = True  # missing: windows 13 and 14
    ppg[:, mask] = np.nan
    record = recording(20, ecg=ecg, ppg=ppg, masked={"PPG": mask})
    found = cut(record, site_file(), formats(), NO_LABELS)
    assert found.rejected == Counter({"ECG flat": 2, "ECG nan": 2, "ECG clipped": 2, "PPG missing": 2})
    assert found.starts.tolist() == [2, 3, 6, 7, 8, 11, 12, 15, 16, 17, 18]
    assert sorted(found.rejections)[:2] == [(0.0, "ECG flat"), (1.0, "ECG flat")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x, ""),
        (lambda x: np.where(np.arange(200) == 7, np.nan, x), "nan"),
        (lambda x: np.where(np.arange(200) == 7, np.inf, x), "nan"),
        (lambda x: x * 0, "flat"),
        (lambda x: np.where(np.arange(200) < 40, 1.5, x), ""),
        (lambda x: np.where(np.arange(200) < 41, 1.5, x), "flat"),
        (lambda x: np.where(np.arange(200) < 4, 9, x), ""),
        (lambda x: np.where(np.arange(200) < 5, 9, x), "clipped"),
        (lambda x: np.where(np.arange(200) < 5, -9, x), "clipped"),
        (lambda x: np.where(np.arange(200) % 3 < 2, 9, x), ""),  # often at the extreme, but never for 3 samples
        (lambda x: np.clip(x, -0.5, 0.5), "clipped"),
    ],
)
def test_quality_at_its_thresholds(change: object, reason: str) -> None:
    x = noise(2, 100, 3)
    bad = np.concatenate([x, change(noise(2, 100, 4))]).astype(np.float32)  # type: ignore[operator]
    assert judge(bad, QualitySection()) == reason


def test_new_windows_are_bit_identical_with_and_without_the_old_modality() -> None:
    ecg, ppg = noise(30, 100, 1), noise(30, 40, 2)
    ecg[:, 700:900] = np.nan
    ppg[:, 800:830] = np.nan
    file = site_file()
    both = cut(recording(30, ecg=ecg, ppg=ppg), file, formats(FILTERED, (64, 32)), NO_LABELS)
    form = formats(FILTERED, (64, 32))["new"]
    alone = cut(recording(30, ecg=ecg, ppg=ppg), file, {"new": form}, NO_LABELS)
    rows = np.flatnonzero(np.isin(alone.starts, both.starts))
    assert 15 < len(rows) == len(both.starts) < len(alone.starts)
    assert np.array_equal(alone.signals["new"][rows], both.signals["new"])


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (recording(10, ppg=noise(8, 40, 1)), r"do not cover the same time: 0 to 10 s and 0 to 8 s"),
        (Recording("p", "r", {"ECG": Signal(noise(9, 100, 1), 100.0, ("I",))}, ((0.0, 9.0),)), "has no PPG"),
        (
            Recording("p", "r", {"PPG": Signal(noise(9, 40, 1), 40.0, ("P",))}, ((0.0, 9.0),), absent={"ECG": "no II"}),
            r"has no ECG(.|\n)*no II",
        ),
        (
            Recording("p", "r", {"ECG": Signal(noise(9, 125, 1), 125.0, ("I",))}, ((0.0, 9.0),)),
            r"ECG was sampled at 125 Hz(.|\n)*says 100 Hz",
        ),
        (
            Recording("p", "r", {"ECG": Signal(noise(9, 100, 1), 100.0, ("V1",))}, ((0.0, 9.0),)),
            r"lacks the channel\(s\) I(.|\n)*it has V1",
        ),
    ],
)
def test_recordings_that_do_not_fit_the_site_file(record: Recording, text: str) -> None:
    with pytest.raises(RecordingError, match=text):
        cut(record, site_file(), formats(), NO_LABELS)


def test_slightly_ragged_ends_lose_only_the_last_window() -> None:
    found = cut(recording(10, ppg=noise(9.5, 40, 1)), site_file(), formats(), NO_LABELS)
    assert found.rejected == Counter({"PPG missing": 1})
    assert found.starts.tolist() == list(range(8))


@pytest.mark.parametrize(("coverage", "labels", "reasons"), [
    (1.0, [0, 0, -1, 1, -1, -1], ["", "", "mixed label", "", "other label", "no label"]),
    (0.7, [0, 0, 1, 1, -1, -1], ["", "", "", "", "other label", "no label"]),
])  # fmt: skip
def test_a_window_has_the_label_that_covers_it(coverage: float, labels: list, reasons: list) -> None:
    # rest to 4.5 s (in two stretches), task to 8 s, artefact to 10 s, nothing after
    track = LabelTrack(np.array([0, 2, 4.5, 8]), np.array([2, 4.5, 8, 10.0]), ("rest", "rest", "task", "artefact"))
    section = LabelsSection(source="recording", classes=("rest", "task"), coverage=coverage)
    found = label_windows(track, np.array([0, 2, 4, 5, 8, 10.5]), 2, section, "g")
    assert found.labels.tolist() == labels
    assert list(found.problems) == reasons
    assert set(found.groups) == {"g"}


def test_unlabelled_windows_are_kept_or_rejected_as_the_file_says() -> None:
    track = LabelTrack(np.array([0.0]), np.array([3.0]), ("rest",))
    record = recording(6, labels=track)
    for choice, starts, labels in (("keep", [0, 1, 2, 3, 4], [0, 0, -1, -1, -1]), ("reject", [0, 1], [0, 0])):
        file = site_file(labels={"source": "recording", "classes": ["rest", "task"], "unlabelled": choice})
        found = cut(record, file, formats(), LabelSource("recording", {}))
        assert found.starts.tolist() == starts
        assert found.labels.tolist() == labels
    assert found.rejected == Counter({"mixed label": 1, "no label": 2})


def test_label_csv_gives_labels_and_groups_by_time(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("recording,start_seconds,end_seconds,label,group\nr,4,8,b,late\nr,0,4,a,early\nq,0,1,a,\n")
    tracks = read_label_csv(path)
    assert set(tracks) == {"r", "q"}
    assert tracks["r"].starts.tolist() == [0, 4]
    section = LabelsSection(source="csv", path=path, classes=("a", "b"))
    found = label_windows(tracks["r"], np.array([0.0, 3.0, 5.0]), 2, section, "none")
    assert found.labels.tolist() == [0, -1, 1]
    assert found.groups == ("early", "early", "late")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recording,start_seconds,label\n", r"line 1(.|\n)*end_seconds are missing"),
        ("recording,start_seconds,end_seconds,label\nr,0,x,a\n", r"line 2(.|\n)*must be numbers"),
        ("recording,start_seconds,end_seconds,label\nr,0,1,a\nr,5,5,a\n", r"line 3(.|\n)*must lie before"),
        ("recording,start_seconds,end_seconds,label\nr,0,3,a\nr,2,4,a\n", "overlap"),
    ],
)
def test_a_wrong_label_csv_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(SiteFileError, match=message):
        read_label_csv(path)


def opened(folder: Path, **changes: object) -> Site:
    folder.mkdir(parents=True, exist_ok=True)
    write_site_file(folder / "site.yaml", site_file(**changes))
    return open_site(folder)


def test_windows_of_a_split_come_with_their_patients(tmp_path: Path) -> None:
    for number in range(4):
        write_npz(tmp_path / "recordings", f"p{number}", seed=number)
    site = opened(tmp_path, splits={"pair": ["p0", "p2"], "validation": [], "test": ["p3"]})
    pair = windows_of(site, "pair", formats=formats())
    assert pair.table.patients.tolist() == ["p0"] * 9 + ["p2"] * 9
    assert pair.old is not None
    assert pair.old.shape == (18, 1, 200)
    assert np.array_equal(pair.old[0, 0], noise(10, 100, 0)[0, :200])
    everyone = windows_of(site, None, ("new",), formats())
    assert everyone.old is None
    assert Counter(everyone.table.patients.tolist()) == {f"p{number}": 9 for number in range(4)}
    with pytest.raises(NoWindowsError, match=r"split 'validation'(.|\n)*no patient with a recording belongs to it"):
        windows_of(site, "validation", formats=formats())


def test_no_usable_window_is_an_error_with_counts(tmp_path: Path) -> None:
    write_npz(tmp_path / "recordings", "a", ECG=np.zeros((1, 1000), np.float32))
    write_npz(tmp_path / "recordings", "b", seconds=1.5)
    write_npz(tmp_path / "recordings", "c", PPG=np.full((1, 400), np.nan, np.float32))
    (tmp_path / "recordings" / "d.npz").write_bytes(b"PK\x03\x04 not really")
    site = opened(tmp_path)
    with pytest.raises(NoWindowsError) as caught:
        windows_of(site, None, formats=formats())
    for part in ("ECG flat: 9", "PPG nan: 9", "short segment: 1", "unusable files: 1", "d.npz"):
        assert part in str(caught.value)


def test_unusable_files_are_listed_logged_and_do_not_stop_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_npz(tmp_path / "recordings", "good")
    write_npz(tmp_path / "recordings", "short", PPG=noise(5, 40, 1))
    (tmp_path / "recordings" / "torn.npz").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    with caplog.at_level("WARNING", logger="fedbridge.site"):
        found = windows_of(opened(tmp_path), None, formats=formats())
    assert set(found.table.patients.tolist()) == {"good"}
    assert [problem.path.name for problem in found.problems] == ["short.npz", "torn.npz"]
    assert "torn.npz: can't be read as .npz" in caplog.text
    assert "short: the two signals do not cover the same time" in caplog.text


def test_windows_normalised_by_the_recording_use_every_run_of_it() -> None:
    ecg = np.concatenate([noise(5, 100, 7), 3 + 5 * noise(7, 100, 8)], axis=1)
    ecg[:, 450:455] = np.nan
    steps = Preprocessing(normalise="recording")
    found = cut(recording(12, ecg=ecg, segments=((0.0, 5.0), (5.0, 12.0))), site_file(), formats(steps), NO_LABELS)
    known = ecg[np.isfinite(ecg)].astype(np.float64)
    for row, start in enumerate(found.starts):
        raw = ecg[0, round(start * 100) : round(start * 100) + 200]
        assert np.allclose(found.signals["old"][row, 0], (raw - known.mean()) / known.std(), atol=1e-5)
    assert {0.0, 10.0} <= set(found.starts.tolist())

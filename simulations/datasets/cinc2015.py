"""PhysioNet/CinC Challenge 2015: ICU monitors, 300 s before an alarm; ECG and PPG (licence ODC-By 1.0).

Two tasks. `heart_rate`: the class of each 10 s window's mean heart rate, from R peaks on which two of neurokit2's
detectors agree, where both signals are present and the rhythm is fairly regular. `alarm`: whether the alarm at the end
was true, as the challenge's experts judged the last 10 s. The set names no patients: a record stands for one.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bridge.config import Settings
from bridge.hashing import sha256_file, sha256_json
from simulations.datasets.files import cached_json, recordings
from simulations.progress import Progress
from simulations.source import LabelRow, PatientData, SignalSource, Source

RATE_HZ = 125.0
HEART_RATE_CLASSES = ("under 75", "75 to 100", "over 100")
ALARM_CLASSES = ("false alarm", "true alarm")

READER_OPTIONS: dict[str, Any] = {
    "subject": "subject",
    "group": {"array": "alarm_type", "names": "alarm_types"},
    "signals": {
        name: {"array": name, "rate": f"fs_{name}", "scale": f"scale_{name}", "channels": [name], "ok": f"{name}_ok"}
        for name in ("ECG", "PPG")
    },
}

_DETECTORS = (("neurokit", "neurokit"), ("neurokit", "rodrigues2021"))
"""Two of neurokit2's detectors: `(cleaning, peaks)`."""

_LABELLING = 1
"""Part of the cache key: raised when the labelling changes."""


class Cinc2015Config(Settings):
    """Keys of the source `cinc2015`."""

    folder: Path
    """Folder of the `.npz` recordings."""
    task: Literal["heart_rate", "alarm"] = "heart_rate"
    """Heart-rate class of a window, or true against false alarm of the last window."""
    window_seconds: float = Field(default=10.0, ge=5, le=60)
    peak_tolerance_seconds: float = Field(default=0.1, gt=0)
    """Two detectors' beats are the same if they lie so near."""
    peak_agreement: float = Field(default=0.9, gt=0, le=1)
    """So large a share of each detector's beats must have its like in the other's."""
    rate_agreement: float = Field(default=0.05, gt=0)
    """The two detectors' mean rates may differ by this share."""
    rr_variation: float = Field(default=0.2, gt=0)
    """Largest coefficient of variation of the RR intervals: beyond it a rate says little."""


@dataclass(frozen=True)
class Labelled:
    """Heart-rate labels of one record: window starts (seconds), classes, and why other windows have none."""

    starts: list[float]
    labels: list[int]
    unlabelled: dict[str, int]


def cinc2015_source(config: Cinc2015Config, progress: Progress | None = None) -> Source:
    """The set as a source: one patient a record, groups are the alarm types.

    Labelling takes about a minute and is cached by the files' content. Raises `CohortError` where the folder holds no
    recording or one of them lacks an array.
    """
    files = recordings(config.folder, ("ECG", "PPG", "ECG_ok", "PPG_ok", "label", "alarm_type", "alarm_types"))
    if config.task == "alarm":
        patients = [_alarm_patient(path) for path in files]
    else:
        labelled = _label_all(files, config, progress)
        patients = [_heart_rate_patient(path, each, config) for path, each in zip(files, labelled, strict=True)]
    windows = sum(len(patient.labels) for patient in patients)
    with_labels = sum(bool(patient.labels) for patient in patients)
    return Source(
        patients=tuple(patients),
        old=SignalSource("ECG", ("ECG",), RATE_HZ),
        new=SignalSource("PPG", ("PPG",), RATE_HZ),
        reader="npz",
        reader_options=READER_OPTIONS,
        classes=ALARM_CLASSES if config.task == "alarm" else HEART_RATE_CLASSES,
        window_seconds=config.window_seconds,
        step_seconds=config.window_seconds,
        description=(
            f"PhysioNet/CinC Challenge 2015, {len(files)} records of ICU monitors; task {config.task}: "
            f"{windows} labelled windows of {config.window_seconds:g} s, {with_labels} patients"
        ),
        license="ODC-By 1.0",
    )


def label_heart_rate(
    ecg: NDArray[np.floating[Any]], present: NDArray[np.bool_], rate_hz: float, config: Cinc2015Config
) -> Labelled:
    """Heart-rate class of each window of `ecg (n,)`; `present (n,)` is false where a signal is absent.

    Windows lie end to end from the first sample. One without a label is counted under the first reason that holds:
    `absent`, `few beats`, `detectors disagree`, `irregular`.
    """
    beats = [_beats(ecg, rate_hz, cleaning, peaks) for cleaning, peaks in _DETECTORS]
    seconds = config.window_seconds
    labelled = Labelled([], [], {})
    reasons: Counter[str] = Counter()
    for index in range(int(len(ecg) / rate_hz / seconds)):
        start = index * seconds
        first, last = round(start * rate_hz), round((start + seconds) * rate_hz)
        first_beats, second_beats = (each[(each >= start) & (each < start + seconds)] for each in beats)
        reason = "" if present[first:last].all() else "absent"
        reason = reason or _doubt(first_beats, second_beats, config)
        if reason:
            reasons[reason] += 1
            continue
        labelled.starts.append(start)
        labelled.labels.append(rate_class(60.0 / float(np.diff(first_beats).mean())))
    return Labelled(labelled.starts, labelled.labels, dict(reasons))


def rate_class(beats_per_minute: float) -> int:
    """Index into `HEART_RATE_CLASSES`: under 75, 75 to 100, over 100."""
    return int(beats_per_minute >= 75) + int(beats_per_minute > 100)


def _doubt(a: NDArray[np.float64], b: NDArray[np.float64], config: Cinc2015Config) -> str:
    """Why the beats of a window give no label, or an empty text."""
    if min(len(a), len(b)) < 4:
        return "few beats"
    near = np.abs(a[:, None] - b[None, :]) < config.peak_tolerance_seconds
    agreement = min(near.any(axis=1).mean(), near.any(axis=0).mean())
    intervals, others = np.diff(a), np.diff(b)
    rates = 1 / intervals.mean(), 1 / others.mean()
    if agreement < config.peak_agreement or abs(rates[0] - rates[1]) > config.rate_agreement * rates[0]:
        return "detectors disagree"
    if intervals.std() > config.rr_variation * intervals.mean():
        return "irregular"
    return ""


def _beats(ecg: NDArray[np.floating[Any]], rate_hz: float, cleaning: str, peaks: str) -> NDArray[np.float64]:
    """Times of R peaks in seconds; none where the detector gives up."""
    import neurokit2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            clean = neurokit2.ecg_clean(ecg, sampling_rate=rate_hz, method=cleaning)
            _, found = neurokit2.ecg_peaks(clean, sampling_rate=rate_hz, method=peaks)
        except (ValueError, IndexError, ZeroDivisionError):
            # What the detectors raise on a signal without a single beat.
            return np.zeros(0)
    return np.asarray(found["ECG_R_Peaks"], dtype=np.float64) / rate_hz


def _label_all(files: list[Path], config: Cinc2015Config, progress: Progress | None) -> list[Labelled]:
    import neurokit2

    rules = config.model_dump(mode="json", exclude={"folder", "task"})
    hashes = [sha256_file(path) for path in files]
    key = sha256_json([_LABELLING, neurokit2.__version__, rules, hashes])[:32]

    def make() -> list[dict[str, Any]]:
        found = []
        for done, path in enumerate(files, start=1):
            found.append(asdict(_label_file(path, config)))
            if progress is not None:
                progress("heart-rate labels", done, len(files))
        return found

    return [Labelled(**each) for each in cached_json(f"cinc2015-{key}", make)]


def _label_file(path: Path, config: Cinc2015Config) -> Labelled:
    with np.load(path, allow_pickle=False) as archive:
        ecg = archive["ECG"][0].astype(np.float64) * float(archive["scale_ECG"])
        seconds = np.minimum((np.arange(len(ecg)) / RATE_HZ).astype(np.int64), len(archive["ECG_ok"]) - 1)
        present = ((archive["ECG_ok"] > 0) & (archive["PPG_ok"] > 0))[seconds]
    return label_heart_rate(ecg, present, RATE_HZ, config)


def _heart_rate_patient(path: Path, labelled: Labelled, config: Cinc2015Config) -> PatientData:
    name, group = _name_and_alarm(path)[:2]
    rows = tuple(
        LabelRow(name, start, start + config.window_seconds, HEART_RATE_CLASSES[label], group)
        for start, label in zip(labelled.starts, labelled.labels, strict=True)
    )
    commonest = np.bincount(labelled.labels, minlength=3).argmax() if labelled.labels else None
    stratum = "no label" if commonest is None else HEART_RATE_CLASSES[commonest]
    return PatientData(patient=name, files=(path,), labels=rows, stratum=stratum)


def _alarm_patient(path: Path) -> PatientData:
    name, group, label, (start, end) = _name_and_alarm(path)
    row = LabelRow(name, start, end, ALARM_CLASSES[label], group)
    return PatientData(patient=name, files=(path,), labels=(row,), stratum=f"{group}, {ALARM_CLASSES[label]}")


def _name_and_alarm(path: Path) -> tuple[str, str, int, tuple[float, float]]:
    """Patient, alarm type, true alarm (0 or 1), and where the cause of the alarm lies (seconds)."""
    with np.load(path, allow_pickle=False) as archive:
        group = str(archive["alarm_types"][int(archive["alarm_type"])])
        start, end = (float(each) for each in archive["event_window_s"])
        return str(archive["subject"]), group, int(archive["label"]), (start, end)

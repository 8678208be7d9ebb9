"""WESAD (Schmidt et al. 2018): a Python 2 pickle a subject, ECG of the chest and PPG of the wrist, labels by sample.

Values are the files' own: millivolt for the ECG, the device's unit for the PPG. Both signals begin at the same moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bridge.config import parse_model
from bridge.windows import Modality
from client.errors import RecordingError
from client.readers.base import LabelTrack, Reader, Recording, Signal
from client.readers.restricted_pickle import load_plain
from client.readers.sampled import SampledLabels

ECG_HZ, PPG_HZ = 700.0, 64.0

CLASSES: Mapping[int, tuple[str, ...]] = {2: ("no stress", "stress"), 3: ("baseline", "stress", "amusement")}
"""Label texts by number of classes, in the published order."""

_OTHERS = {0: "transient", 4: "meditation"}
_NAMES: Mapping[int, Mapping[int, str]] = {
    2: {**_OTHERS, 1: "no stress", 2: "stress", 3: "no stress"},
    3: {**_OTHERS, 1: "baseline", 2: "stress", 3: "amusement"},
}
_PLACES: Mapping[Modality, tuple[str, str, float]] = {"ECG": ("chest", "ECG", ECG_HZ), "PPG": ("wrist", "BVP", PPG_HZ)}


class WesadOptions(SampledLabels):
    """`reader.options` of the site file for the reader `wesad`."""

    classes: Literal[2, 3] = 3
    """3: baseline, stress, amusement. 2: no stress (baseline and amusement), stress."""
    labels_hz: float = 100.0


class WesadReader(Reader):
    """Reads WESAD's `SN.pkl` without running anything that is in them."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = parse_model(options, WesadOptions, "reader.options")

    def files(self, folder: Path) -> list[Path]:
        """All `S<number>.pkl` of the folder and below, sorted."""
        return sorted(path for path in folder.rglob("S*.pkl") if path.stem[1:].isdigit() and path.is_file())

    def read(self, path: Path) -> Recording:
        """One subject; raises `RecordingError`, and `UnsafePickleError` where the file is no plain pickle."""
        content = load_plain(path)
        devices = _mapping(path, content, "signal")
        if content.get("subject", path.stem) != path.stem:
            raise _wrong(path, f"it calls its subject {content['subject']!r}")
        signals: dict[Modality, Signal] = {}
        absent: dict[Modality, str] = {}
        for modality, (device, name, rate) in _PLACES.items():
            found = devices.get(device)
            if not isinstance(found, dict) or name not in found:
                absent[modality] = f"no signal.{device}.{name}"
                continue
            data = _one_channel(path, found[name], f"signal.{device}.{name}").astype(np.float32)
            data[~np.isfinite(data)] = np.nan
            signals[modality] = Signal(data[None], rate, (modality,))
        return Recording(
            patient=path.stem,
            name=path.stem,
            signals=signals,
            segments=((0.0, max((signal.end_seconds for signal in signals.values()), default=0.0)),),
            labels=self._labels(path, content, signals.get("ECG")),
            absent=absent,
        )

    def _labels(self, path: Path, content: Mapping[str, Any], ecg: Signal | None) -> LabelTrack | None:
        if "label" not in content:
            return None
        values = _one_channel(path, content["label"], "label")
        samples = len(values) if ecg is None else ecg.data.shape[1]
        return self.options.track(values, ECG_HZ, samples, _NAMES[self.options.classes])


def _mapping(path: Path, content: Any, key: str) -> Mapping[str, Any]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise _wrong(path, f"it has no mapping '{key}'")
    return found


def _one_channel(path: Path, values: Any, name: str) -> NDArray[Any]:
    """`(n,)` of an array `(n,)` or `(n, 1)` of numbers."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf" or not values.size:
        raise _wrong(path, f"{name} is no array of numbers")
    if values.ndim not in (1, 2) or values.size != len(values):
        raise _wrong(path, f"{name} has the shape {values.shape}, (n, 1) is expected")
    return values.ravel()


def _wrong(path: Path, why: str) -> RecordingError:
    return RecordingError(
        f"{path.name}: is not a subject of WESAD", why=why, fix="copy the file again from its source, or exclude it"
    )

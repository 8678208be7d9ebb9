"""Labels that a file gives sample by sample, as stretches of one label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bridge.config import Settings
from client.readers.base import LabelTrack, runs_of


class SampledLabels(Settings):
    """Options of readers whose files label each sample."""

    labels: Literal["nearest", "fourier"] = "nearest"
    """`nearest`: a moment has the label of its own sample. `fourier`: labels are brought to `labels_hz` as if they were
    a signal, by their spectrum, and rounded; that rings at every change and makes labels that are not in the file. It
    is what the published experiments did."""
    labels_hz: float = Field(gt=0)
    """`fourier`: rate of the rounded labels, that of the windows they are for."""

    def track(self, values: NDArray[Any], rate_hz: float, samples: int, names: Mapping[int, str]) -> LabelTrack:
        """The stretches of labels `(n,)` at `rate_hz`; `samples` is the signal's length at that rate.

        A label without a name is called by its number; where the value is missing, there is no label.
        """
        values = values.astype(np.float64)
        if self.labels == "fourier":
            # As published: whatever their number, labels are stretched over the signal.
            values, rate_hz = fourier_labels(values, int(samples * (self.labels_hz / rate_hz))), self.labels_hz
        starts, ends, found = runs_of(values, 1.0 / rate_hz)
        known = np.isfinite(found)
        texts = tuple(_name(float(value), names) for value in found[known])
        return LabelTrack(starts[known], ends[known], texts)


def fourier_labels(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Labels resampled by their spectrum to `count` values, and rounded."""
    from scipy.signal import resample

    # No negative zeros: they would be another label than zero.
    return np.asarray(np.round(resample(values, count)), dtype=np.float64) + 0.0


def _name(value: float, names: Mapping[int, str]) -> str:
    return names[int(value)] if value.is_integer() and int(value) in names else f"label {value:g}"

"""Where a simulation's recordings come from: one contract for the built-in cohort and for real sets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import platformdirs

from bridge.windows import Modality


@dataclass(frozen=True)
class LabelRow:
    """One labelled stretch of a recording, as a site's label CSV has it."""

    recording: str
    start_seconds: float
    end_seconds: float
    label: str
    group: str = ""
    """A public group by which results are told apart (for example the alarm type)."""


@dataclass(frozen=True)
class PatientData:
    """One patient's files and labels. `stratum` is what a split or a label-skewed partition may balance on."""

    patient: str
    files: tuple[Path, ...]
    labels: tuple[LabelRow, ...] = ()
    stratum: str = ""
    role: str = ""
    """Fixed role where the source knows it: `public_old`, `public_new`, `hospital`; empty: the split decides."""
    device: str = ""
    """The kind of monitor, where the source knows it: partition kind `device` makes a hospital of each."""
    root: Path | None = None
    """Where a set's folders tell something: below it, files keep their places in a site's folder."""


@dataclass(frozen=True)
class SignalSource:
    """One modality as the files hold it."""

    modality: Modality
    channels: tuple[str, ...]
    rate_hz: float


@dataclass(frozen=True)
class Source:
    """Patients, and how a site's reader gets their windows. Becomes the site files of `prepare`."""

    patients: tuple[PatientData, ...]
    old: SignalSource
    new: SignalSource
    reader: str
    reader_options: dict[str, Any]
    classes: tuple[str, ...]
    window_seconds: float
    step_seconds: float
    description: str
    license: str = ""
    labels: Literal["csv", "recording"] = "csv"
    """Where a site finds its labels: the patients' rows, or the recordings themselves."""
    coverage: float = 1.0
    """Share of a window that one label must cover."""
    quality: dict[str, Any] = field(default_factory=dict)
    """Overrides of the site file's `quality` thresholds."""


def cache_root() -> Path:
    """Folder of all that is made once; `FEDBRIDGE_CACHE` overrides the user's cache folder."""
    override = os.environ.get("FEDBRIDGE_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("fedbridge"))

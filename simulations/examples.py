"""A few windows of both modalities for the report, from the built-in cohort or from PUBLIC patients, never others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from client.site import Site
from client.site_file import Role
from client.windowing import Windows, windows_of
from server.report.windows import ExampleWindow
from simulations.source import PatientData, Source
from simulations.split import Split

PATIENTS = 6
_CHANNELS = 2
"""Channels of one modality that are shown: an EEG has nineteen."""
_DIGITS = 3


def example_patients(source: Source, split: Split, *, made_up: bool) -> list[PatientData]:
    """Up to six labelled patients who may be shown: made-up ones from the hospitals, real ones only if public and
    with both modalities."""
    shown = split.test if made_up else tuple(sorted(set(split.public_old) & set(split.public_new)))
    wanted = set(shown)
    members = [patient for patient in source.patients if patient.patient in wanted]
    return [patient for patient in members if patient.labels or source.labels == "recording"][:PATIENTS]


def example_windows(site: Site, classes: Sequence[str]) -> list[ExampleWindow]:
    """One window of each class, of another patient each where that can be, both modalities as the encoders read them.

    `site` holds the example patients alone.
    """
    windows = windows_of(site, None)
    found: list[ExampleWindow] = []
    used: set[str] = set()
    for label, name in enumerate(classes):
        rows = np.flatnonzero(windows.table.labels == label)
        if not len(rows):
            continue
        fresh = [row for row in rows if windows.table.patients[row] not in used]
        row = int((fresh or list(rows))[0])
        used.add(str(windows.table.patients[row]))
        found += _shown(site, windows, row, f"Example {label + 1}, class {name}")
    return found


def _shown(site: Site, windows: Windows, row: int, title: str) -> list[ExampleWindow]:
    parts: list[tuple[Role, NDArray[np.float32] | None]] = [("old", windows.old), ("new", windows.new)]
    shown = []
    for role, signals in parts:
        assert signals is not None
        spec = (site.old_card if role == "old" else site.new_card).window
        for channel, values in list(zip(spec.channels, signals[row], strict=True))[:_CHANNELS]:
            shown.append(
                ExampleWindow(
                    title=title[:80],
                    role=role,
                    modality=spec.modality,
                    channel=channel,
                    rate_hz=spec.rate_hz,
                    values=np.round(values, _DIGITS).astype(np.float64).tolist(),
                )
            )
    return shown

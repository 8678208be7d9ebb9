"""Small recordings in the formats of the published sets, with labels that both modalities show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import ConfigError
from simulations.config import DataConfig
from simulations.datasets.fog import FogConfig
from simulations.datasets.isruc import IsrucConfig
from simulations.datasets.wesad import WesadConfig
from simulations.made_up.formats import by_seconds, fog_rows, wesad_content, write_fog, write_isruc, write_wesad
from simulations.made_up.signals import CALM, IRREGULAR, ROUSED, Stretch, bursts, heart_signals, rhythm

SETS = ("isruc", "wesad", "fog")
"""Sources of which there can be made-up recordings."""

FOG_PATIENTS = 12
"""Whose muscles' columns the set tells."""

_EPOCH_SECONDS = 30.0
_ISRUC_HZ, _CHEST_HZ, _WRIST_HZ, _FOG_HZ = 200.0, 700.0, 64.0, 500.0

# Hz and microvolts of the EEG by sleep stage, as the line of the stages' text has it.
_SLEEP_WAVES = {0: (10.0, 40.0), 1: (5.0, 25.0), 2: (13.0, 20.0), 3: (1.3, 80.0), 5: (6.5, 20.0)}
_EEG_DERIVATIONS = ("F3_A2", "C3_A2", "O1_A2", "F4_A1", "C4_A1", "O2_A1")
_WESAD_STATES = {1: CALM, 2: ROUSED, 3: IRREGULAR}
_WALKING, _FROZEN = 0, 1
_FOG_WAVES = {_WALKING: (6.0, 25.0), _FROZEN: (21.0, 35.0)}
_FOG_BURSTS = {_WALKING: 1.0, _FROZEN: 6.0}
_FOG_EEG = (4, 5, 6, 7, 10, 11)
_FOG_EMG = (27, 28, 29, 30, 31)


def write_recordings(data: DataConfig, folder: Path, *, patients: int, windows: int, seed: int) -> None:
    """Recordings of the source's set: for each patient so many `windows` of each class, one after the other.

    The same arguments give the same signals. Raises `ConfigError` for a source of which there are none, or more
    patients than it can have; and `OSError`.
    """
    if data.source == "isruc" and data.isruc is not None:
        _isruc(data.isruc, folder, patients, windows, seed)
    elif data.source == "wesad" and data.wesad is not None:
        _wesad(data.wesad, folder, patients, windows, seed)
    elif data.source == "fog" and data.fog is not None:
        _fog(data.fog, folder, patients, windows, seed)
    else:
        raise ConfigError(
            f"there are no made-up recordings of the source '{data.source}'",
            fix=f"name a configuration whose source is one of {', '.join(SETS)}",
        )


def _isruc(config: IsrucConfig, folder: Path, patients: int, windows: int, seed: int) -> None:
    sleep = (2, 3, 5, 1)
    for number in range(1, patients + 1):
        if config.classes == 2:
            stages = _turned([stage for i in range(windows) for stage in (0, sleep[i % len(sleep)])], number)
        else:
            stages = _turned([*_SLEEP_WAVES] * windows, number)
        course = [Stretch(stage, _EPOCH_SECONDS) for stage in stages]
        body = [Stretch(ROUSED if stage == 0 else CALM, _EPOCH_SECONDS) for stage in stages]
        heart, _ = heart_signals(body, _ISRUC_HZ, _WRIST_HZ, (seed, f"subject{number}"))
        channels = {
            name: rhythm(course, _SLEEP_WAVES, _ISRUC_HZ, (seed, f"subject{number} {name}"))
            for name in _EEG_DERIVATIONS
        }
        epochs: dict[str, Any] = {
            name: channel.reshape(len(stages), -1) for name, channel in {**channels, "X2": 1000 * heart}.items()
        }
        write_isruc(folder, number, stages, len(stages), **epochs)


def _wesad(config: WesadConfig, folder: Path, patients: int, windows: int, seed: int) -> None:
    for number in range(2, patients + 2):
        labels = _turned([*_WESAD_STATES] * windows, number)
        body = [Stretch(_WESAD_STATES[label], config.window_seconds) for label in labels]
        # The wrist is taken off a little later than the chest.
        body.append(Stretch(CALM, 0.5))
        track = by_seconds(*((label, config.window_seconds) for label in labels))
        chest, wrist = heart_signals(body, _CHEST_HZ, _WRIST_HZ, (seed, f"S{number}"))
        seconds = len(labels) * config.window_seconds
        write_wesad(folder, wesad_content(f"S{number}", track, seconds, ecg=chest[: len(track)], bvp=60 * wrist))


def _fog(config: FogConfig, folder: Path, patients: int, windows: int, seed: int) -> None:
    if patients > FOG_PATIENTS:
        raise ConfigError(
            f"there can be no {patients} patients of the freezing-of-gait set",
            why=f"it has {FOG_PATIENTS}, and tells where each one's muscles are",
            fix=f"ask for {FOG_PATIENTS} patients",
        )
    for number in range(1, patients + 1):
        name = f"{number:03d}"
        states = _turned([_WALKING, _FROZEN] * windows, number)
        # Patient 008 came twice.
        sessions = {"": states} if name != "008" else {"OFF_1": states[::2], "OFF_2": states[1::2]}
        for session, course in sessions.items():
            rows = _fog_task([Stretch(state, config.window_seconds) for state in course], seed, name + session)
            write_fog(folder / "FilteredData" / name / session / "task_1.txt", rows)


def _fog_task(course: Sequence[Stretch], seed: int, name: str) -> list[list[str]]:
    eeg = {place: rhythm(course, _FOG_WAVES, _FOG_HZ, (seed, f"{name} {place}")) for place in _FOG_EEG}
    emg = {place: bursts(course, _FOG_BURSTS, _FOG_HZ, (seed, f"{name} {place}")) for place in _FOG_EMG}
    labels = np.concatenate([np.full(round(each.seconds * _FOG_HZ), each.state) for each in course])
    signals: Mapping[int, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {**eeg, **emg}
    return fog_rows(labels.tolist(), signals=signals)


def _turned(values: list[int], number: int) -> list[int]:
    """The same list, begun elsewhere, so that a state is at no fixed time."""
    start = number % len(values)
    return values[start:] + values[:start]

"""A configuration's whole study in small: made-up recordings, filled weights, and the configuration that names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bridge.config import load_yaml, parse_model
from bridge.errors import ConfigError
from bridge.files import cause, require_free, whole_folder, write_whole
from simulations.config import SimulationConfig, load_simulation, set_key
from simulations.errors import UnwritableError
from simulations.made_up.checkpoints import write_checkpoint
from simulations.made_up.recordings import SETS, write_recordings
from simulations.models.config import NewEncoderConfig

PATIENTS = 12
"""Fewest patients, of whom two hospitals and the public get enough."""

WARNING = (
    "MADE UP: the weights are filled with numbers and the recordings are drawn. NO RESULT MEANS ANYTHING; this shows "
    "that the direction runs."
)

_SLOW = ("normwear", "ecg-fm")
"""Models that take seconds a window: they get one window of each class, the others two."""


@dataclass(frozen=True)
class MadeUp:
    """What was written into a folder."""

    folder: Path
    config: Path
    patients: int
    windows: int
    """Of each class, a patient."""
    weights: tuple[str, ...]
    """Names of the filled files."""


def make_study(source: Path, out: Path, *, patients: int = PATIENTS, seed: int = 0) -> MadeUp:
    """Write `out/data`, `out/weights` and `out/config.yaml` for a configuration; whole or not at all.

    Raises `ConfigError` where `out` exists, the configuration is of another source, or patients are too few or too
    many; `UnwritableError` where `out` can't be written.
    """
    settings = load_simulation(source)
    _check(settings, out, patients)
    windows = 1 if any(model in _SLOW for model in _published(settings)) else 2
    content = load_yaml(source)
    try:
        with whole_folder(out) as partial:
            write_recordings(settings.data, partial / "data", patients=patients, windows=windows, seed=seed)
            weights = _write_weights(settings, partial / "weights", seed)
            write_whole(partial / "config.yaml", _smaller(content, settings, windows))
            partial.chmod(0o755)
    except OSError as error:
        raise UnwritableError(
            f"{out}: can't be written", why=cause(error), fix="free space, or name a folder that can be written"
        ) from error
    return MadeUp(out, out / "config.yaml", patients, windows, weights)


def _check(settings: SimulationConfig, out: Path, patients: int) -> None:
    require_free(out)
    if settings.data.source not in SETS:
        raise ConfigError(
            f"{settings.name}: there are no made-up recordings of its source '{settings.data.source}'",
            fix=f"name a configuration whose source is one of {', '.join(SETS)}",
        )
    if patients < PATIENTS:
        raise ConfigError(
            f"{patients} patient(s) are too few",
            why="public patients, two hospitals and those who are tested come of them",
            fix=f"ask for {PATIENTS} or more",
        )


def _encoders(settings: SimulationConfig) -> dict[str, NewEncoderConfig]:
    return {"old": settings.encoders.old, "new": settings.encoders.new}


def _published(settings: SimulationConfig) -> list[str]:
    return [each.published.model for each in _encoders(settings).values() if each.published is not None]


def _write_weights(settings: SimulationConfig, folder: Path, seed: int) -> tuple[str, ...]:
    """A filled file for each published encoder, under the name that the configuration has for it."""
    names = []
    for encoder in _encoders(settings).values():
        if encoder.published is not None:
            name = encoder.published.file.name
            write_checkpoint(encoder.published.model, folder / name, encoder.published.size or "base", seed=seed)
            names.append(name)
    return tuple(names)


def _smaller(content: Any, settings: SimulationConfig, windows: int) -> str:
    """The configuration's text with the folder's own files, and as little work as a run can do."""
    for key, value in {**_files(settings), **_work(settings, windows)}.items():
        set_key(content, key, value, key)
    parse_model(content, SimulationConfig, "the made-up configuration")
    return f"# {WARNING}\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"


def _files(settings: SimulationConfig) -> dict[str, Any]:
    """Paths: of recordings and published files beside the configuration, of ready folders where they are."""
    changed: dict[str, Any] = {f"data.{settings.data.source}.folder": "data"}
    for side, encoder in _encoders(settings).items():
        if encoder.published is not None:
            changed[f"encoders.{side}.published.file"] = f"weights/{encoder.published.file.name}"
        if encoder.folder is not None:
            changed[f"encoders.{side}.folder"] = str(encoder.folder)
    head = settings.encoders.old.head
    if head is not None and head.folder is not None:
        changed["encoders.old.head.folder"] = str(head.folder)
    return changed


def _work(settings: SimulationConfig, windows: int) -> dict[str, Any]:
    """Positions are chosen and two rounds are trained, each of one step; no controls."""
    source = settings.data.source
    changed: dict[str, Any] = {
        "name": f"{settings.name[:56]}-made-up",
        "partition.kind": "equal",
        "partition.hospitals": 2,
        "partition.minimum_patients": 2,
        "policy.minimum_patients": min(2, settings.policy.minimum_patients),
        "sites.minimum": 2,
        "split.pair_share": 1.0,
        "selection.mode": "scores",
        "selection.input_position": None,
        "selection.output_position": None,
        "selection.folds": 2,
        "selection.windows_per_patient": 4 * windows,
        "train.rounds": 2,
        "train.local_steps": 1,
        "train.patients_per_batch": 2,
        "train.windows_per_patient": windows,
        # Full-size networks, each site with its own: one site at a time.
        "workers": 1,
        "controls": [],
        "baselines": [],
    }
    if source != "isruc":
        # No window overlaps another: as many as there are stretches of a label.
        changed[f"data.{source}.step_seconds"] = getattr(settings.data, source).window_seconds
    head = settings.encoders.old.head
    if (head is None or head.folder is None) and not settings.encoders.old.is_compact:
        changed["encoders.old.head.epochs"] = 1 if head is not None and head.train == "whole" else 5
        changed["encoders.old.head.batch"] = 4
    return changed

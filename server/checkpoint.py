"""Checkpoints: everything that a run needs to go on as if it had never stopped, in one file a round.

A file appears whole or not at all (written beside, then renamed) and holds a hash of its own content, so a damaged one
is recognised and the one before it used. Safetensors and JSON: nothing in it can run code.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from bridge.files import write_whole
from bridge.hashing import sha256_array, sha256_json
from bridge.prototype import Arrays
from server.errors import ResumeError, RunFolderError

_SCHEMA = "fedbridge.checkpoint/1"
_KEPT = 3
_SECONDS_BETWEEN_SYNCS = 1.0
_PATTERN = "round-*.safetensors"


@dataclass(frozen=True)
class Best:
    """The best bridge so far, by the job's criterion."""

    round: int
    criterion: float
    arrays: Arrays


@dataclass(frozen=True)
class Checkpoint:
    """The state after `round` (0: positions chosen, nothing trained yet).

    `arrays` is the next broadcast, `optimiser` the strategy's moments (`m_t`, `v_t`) by name, `progress` what the run
    record knows so far, `stopped` why the run could not go on, where it could not.
    """

    round: int
    job_sha256: str
    arrays: Arrays
    optimiser: dict[str, Arrays] = field(default_factory=dict)
    best: Best | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""


class CheckpointFolder:
    """Writes checkpoints in one atomic rename each, and drops all but the newest three.

    A killed process loses nothing. Against a power cut a file must be synced to the disk too, which may take longer
    than a short round: that is done at most once a second, and the newest synced file is kept beside the newest three.
    `always_sync`: at each, since a noised aggregate that is lost after its broadcast would be noised anew, which is a
    second release.
    """

    def __init__(self, path: Path, *, always_sync: bool = False) -> None:
        self.path = path
        self._always = always_sync
        self._synced = -_SECONDS_BETWEEN_SYNCS
        self._durable: Path | None = None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint; raises `RunFolderError` where that fails."""
        path = self.path / f"round-{checkpoint.round:06d}.safetensors"
        due = self._always or bool(checkpoint.stopped)
        sync = due or time.monotonic() - self._synced >= _SECONDS_BETWEEN_SYNCS
        try:
            write_whole(path, _pack(checkpoint), sync=sync)
            if sync:
                self._synced, self._durable = time.monotonic(), path
            for old in sorted(self.path.glob(_PATTERN))[:-_KEPT]:
                if old != self._durable:
                    old.unlink()
        except OSError as error:
            raise RunFolderError(
                f"{path}: the checkpoint can't be written",
                why=error.strerror or "",
                fix="free space, then resume the run",
            ) from error
        return path


def newest_checkpoint(folder: Path, job_sha256: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and the names of damaged ones that were passed over.

    `(None, [])` where there is none. Raises `ResumeError` where all are damaged, or the run was started with another
    job.
    """
    damaged: list[str] = []
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        checkpoint = _read(path)
        if checkpoint is None:
            damaged.append(path.name)
        elif checkpoint.job_sha256 != job_sha256:
            raise changed_config(folder.parent)
        else:
            return checkpoint, damaged
    if damaged:
        raise ResumeError(
            f"{folder}: no checkpoint can be used",
            why=f"damaged: {', '.join(damaged)}",
            fix="start the run anew in another folder",
        )
    return None, []


def changed_config(folder: Path, keys: str = "") -> ResumeError:
    """The error of a resume with another job."""
    return ResumeError(
        f"{folder}: resume with a changed config",
        why=f"the run was started with another job{keys}",
        fix="resume with the run's own job.yaml, or start a new run in another folder",
    )


def _pack(checkpoint: Checkpoint) -> bytes:
    tensors: dict[str, NDArray[Any]] = {f"arrays/{name}": array for name, array in checkpoint.arrays.items()}
    for moment, arrays in checkpoint.optimiser.items():
        tensors |= {f"{moment}/{name}": array for name, array in arrays.items()}
    best = checkpoint.best
    if best is not None:
        tensors |= {f"best/{name}": array for name, array in best.arrays.items()}
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    state = json.dumps(
        {
            "schema": _SCHEMA,
            "round": checkpoint.round,
            "job_sha256": checkpoint.job_sha256,
            "best": None if best is None else {"round": best.round, "criterion": best.criterion},
            "progress": checkpoint.progress,
            "stopped": checkpoint.stopped,
        },
        allow_nan=False,
    )
    return to_bytes(tensors, metadata={"state": state, "sha256": _seal(state, tensors)})


def _seal(state: str, tensors: dict[str, NDArray[Any]]) -> str:
    return sha256_json([state, {name: sha256_array(array) for name, array in tensors.items()}])


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint of a file, None where it is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["sha256"] != _seal(metadata["state"], tensors):
            return None
        state = json.loads(metadata["state"])
        groups = _grouped(tensors)
        best = state["best"]
        return Checkpoint(
            round=state["round"],
            job_sha256=state["job_sha256"],
            arrays=groups.pop("arrays"),
            best=None if best is None else Best(best["round"], best["criterion"], groups.pop("best")),
            optimiser=groups,
            progress=state["progress"],
            stopped=state["stopped"],
        )
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _grouped(tensors: dict[str, NDArray[Any]]) -> dict[str, Arrays]:
    groups: dict[str, Arrays] = {}
    for key, array in tensors.items():
        group, name = key.split("/")
        groups.setdefault(group, {})[name] = array
    return groups

"""The cohort on disk: made once a configuration, then read as any other source."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.hashing import keyed_hash, sha256_json
from simulations.cohort.config import CohortConfig
from simulations.cohort.devices import Device, draw_device, store_ecg, store_ppg
from simulations.cohort.physiology import STATES, Segment, beat, draw_segments, draw_traits
from simulations.cohort.waves import ecg, ppg
from simulations.errors import CohortError, UnwritableError
from simulations.source import LabelRow, PatientData, SignalSource, Source, cache_root

GENERATOR = 1
"""Raised whenever the same configuration would give other files, so that no old cohort is taken for a new one."""
INDEX = "cohort.json"
PUBLIC_DEVICES = 6
"""Monitors among the public recordings: other ones than the hospitals'."""
READER_OPTIONS: dict[str, Any] = {
    "subject": "subject",
    "signals": {
        name: {"array": name, "rate": f"fs_{name}", "scale": f"scale_{name}", "channels": [name], "ok": f"{name}_ok"}
        for name in ("ECG", "PPG")
    },
}
"""How the reader `npz` finds its way in these files."""
_STALE_SECONDS = 3600.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Plan:
    patient: str
    role: str
    device: str


def built_in_cohort(config: CohortConfig, *, progress: Progress | None = None) -> Source:
    """The source of this configuration, its files made first where they aren't in the cache.

    `progress(done, total)` is called after each patient that is made. Files lie in
    `cache_root()/cohorts/<key of configuration and generator>`, one `.npz` a patient, laid out as `READER_OPTIONS` say.
    Making is atomic: a folder that exists is whole. Raises `UnwritableError`, and `CohortError` where it is damaged.
    """
    root = cache_root() / "cohorts"
    folder = root / cohort_key(config)
    if not (folder / INDEX).is_file():
        _make(config, root, folder, progress)
    return _source(config, folder)


def cohort_key(config: CohortConfig) -> str:
    """Name of the cohort's folder: one for each configuration and version of the generator."""
    return sha256_json({"config": config.model_dump(mode="json"), "generator": GENERATOR})[:16]


def _make(config: CohortConfig, root: Path, folder: Path, progress: Progress | None) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        making = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
    except OSError as error:
        raise _unwritable(root, error) from error
    try:
        _write(config, making, progress)
        making.rename(folder)
    except OSError as error:
        # Another process may have finished the very same files first.
        if not (folder / INDEX).is_file():
            raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> UnwritableError:
    return UnwritableError(
        f"{path}: the built-in cohort can't be written",
        why=error.strerror or str(error),
        fix="free some disk space, or set FEDBRIDGE_CACHE to a folder that can be written",
    )


def _sweep(root: Path) -> None:
    """Remove what a killed process left."""
    for left in root.glob(".making-*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _plans(config: CohortConfig) -> list[_Plan]:
    """Who there is. Devices go round, so that each has as many patients."""
    counts = {
        "public_old": config.public_old_patients,
        "public_new": config.public_new_patients,
        "hospital": config.hospital_patients,
    }
    plans = []
    for role, count in counts.items():
        for i in range(count):
            public = role != "hospital"
            device = f"public-{i % PUBLIC_DEVICES}" if public else f"device-{i % config.devices}"
            plans.append(_Plan(f"{role.replace('_', '-')}-{i:03d}", role, device))
    return plans


def _write(config: CohortConfig, folder: Path, progress: Progress | None) -> None:
    plans = _plans(config)
    devices = {name: draw_device(config, _stream(config, "device", name)) for name in sorted({p.device for p in plans})}
    rows = []
    for done, plan in enumerate(plans, start=1):
        segments = _write_patient(config, plan, devices[plan.device], folder)
        rows.append({**asdict(plan), "segments": [[s.start, s.end, STATES[s.state]] for s in segments]})
        if progress is not None:
            progress(done, len(plans))
    index = {"generator": GENERATOR, "config": config.model_dump(mode="json"), "patients": rows}
    # Written last: the mark of a whole cohort.
    with (folder / INDEX).open("w", encoding="utf-8") as file:
        json.dump(index, file)
        file.flush()
        os.fsync(file.fileno())


def _stream(config: CohortConfig, *parts: str) -> np.random.Generator:
    """Random numbers of one patient or device: the same however many others there are."""
    return np.random.default_rng(keyed_hash("cohort", config.seed, *parts))


def _write_patient(config: CohortConfig, plan: _Plan, device: Device, folder: Path) -> list[Segment]:
    traits = draw_traits(config, _stream(config, "traits", plan.patient))
    rng = _stream(config, "course", plan.patient)
    segments = draw_segments(config, traits.mix, rng)
    heart = beat(config, traits, segments, rng)
    content: dict[str, NDArray[Any]] = {"subject": np.array(plan.patient), "device": np.array(plan.device)}
    if plan.role != "public_new":
        sensor = _stream(config, "ecg", plan.patient)
        stored = store_ecg(ecg(heart, traits, config.ecg_rate_hz, config.seconds, sensor), device, config, sensor)
        content |= {"ECG": stored.samples, "scale_ECG": np.array(stored.scale, dtype=np.float32), "ECG_ok": stored.ok}
        content["fs_ECG"] = np.array(config.ecg_rate_hz)
    if plan.role != "public_old":
        sensor = _stream(config, "ppg", plan.patient)
        stored = store_ppg(ppg(heart, traits, config.ppg_rate_hz, config.seconds), device, config, sensor)
        content |= {"PPG": stored.samples, "scale_PPG": np.array(stored.scale, dtype=np.float32), "PPG_ok": stored.ok}
        content["fs_PPG"] = np.array(config.ppg_rate_hz)
    np.savez(folder / f"{plan.patient}.npz", allow_pickle=False, **content)
    return segments


def _source(config: CohortConfig, folder: Path) -> Source:
    rows = json.loads((folder / INDEX).read_text(encoding="utf-8"))["patients"]
    missing = [row["patient"] for row in rows if not (folder / f"{row['patient']}.npz").is_file()]
    if missing:
        raise CohortError(
            f"{folder}: the cached cohort is damaged",
            why=f"{len(missing)} of {len(rows)} recordings are gone, {missing[0]}.npz first",
            fix="delete the folder: it is made again",
        )
    return Source(
        patients=tuple(_patient(row, folder) for row in rows),
        old=SignalSource("ECG", ("ECG",), config.ecg_rate_hz),
        new=SignalSource("PPG", ("PPG",), config.ppg_rate_hz),
        reader="npz",
        reader_options=READER_OPTIONS,
        classes=STATES[: config.classes],
        window_seconds=config.window_seconds,
        step_seconds=config.step_seconds,
        description=(
            f"Built-in cohort: {config.hospital_patients} made-up hospital patients on {config.devices} monitors, "
            f"{config.public_old_patients} + {config.public_new_patients} public ones, {config.seconds:g} s each, "
            f"seed {config.seed}"
        ),
        license="CC0-1.0",
    )


def _patient(row: dict[str, Any], folder: Path) -> PatientData:
    """One patient of the index. What a public patient lends decides whether there are labels."""
    patient, role = row["patient"], row["role"]
    labels = [LabelRow(patient, start, end, state) for start, end, state in row["segments"]]
    seconds = {
        state: sum(row.end_seconds - row.start_seconds for row in labels if row.label == state) for state in STATES
    }

    def commonest(state: str) -> tuple[float, int]:
        return seconds[state], keyed_hash("commonest", patient, state)

    return PatientData(
        patient=patient,
        files=(folder / f"{patient}.npz",),
        labels=() if role == "public_new" else tuple(labels),
        stratum="" if role == "public_new" else max(STATES, key=commonest),
        role=role,
        device=row["device"],
    )

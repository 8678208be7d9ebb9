"""A whole simulated run: prepare, run on an engine, compute the controls, evaluate, render the report.

Every step leaves its result in the run folder, so a run that was killed goes on where it stood.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from bridge.errors import FedbridgeError
from bridge.files import write_whole
from bridge.hashing import sha256_json
from server.errors import ResumeError, RunFolderError
from server.record import (
    RUN_JSON,
    SIMULATED_EVALUATION,
    Evaluation,
    RunRecord,
    read_record,
    write_evaluation,
    write_record,
)
from simulations.config import SimulationConfig
from simulations.errors import EngineError
from simulations.evaluation import PREDICTIONS, PREDICTIONS_CSV, Predictions, evaluate
from simulations.federation import federation_config
from simulations.prepare import CONFIG, JOB, prepare, read_config, run_config, site_folders
from simulations.progress import Progress, following, no_progress
from simulations.source import cache_root

EngineName = Literal["local", "flower"]
_SERVER_CONTENT = (RUN_JSON, "checkpoints", "releases", "bridge", "log.jsonl")


def run(
    config: SimulationConfig,
    out: Path,
    *,
    engine: EngineName = "local",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> RunRecord:
    """Run a study in the folder `out` to its report and return its record.

    `resume` goes on with what `out` holds (nothing: begins), `overwrite` removes a run that is there. Raises
    `RunFolderError` where `out` holds something else or another process runs there, `ResumeError` where the
    configuration changed, and whatever stopped the run.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - a link is kept as the user named it
    with _alone(out):
        _make_way(out, config, resume, overwrite)
        if config.split.rotations > 1:
            return _run_rotations(config, out, engine, progress)
        return _run_once(config, out, engine, progress)


def _run_once(config: SimulationConfig, folder: Path, engine: EngineName, progress: Progress) -> RunRecord:
    if not (folder / JOB).is_file():
        prepare(config, folder, progress=progress)
    record = read_record(folder) if (folder / RUN_JSON).is_file() else None
    if record is None or record.status != "completed":
        with following(folder, progress):
            _run_engine(config, folder, engine)
        record = read_record(folder)
        if record.status != "completed":
            raise EngineError(
                f"{folder}: the run ended with the status '{record.status}'",
                why=record.error or "its record names no reason",
                fix="see log.jsonl there, then go on with --resume",
            )
    return _finish(config, folder, record, progress)


def _run_engine(config: SimulationConfig, folder: Path, engine: EngineName) -> None:
    """Run the federation; what is in the folder already is gone on with."""
    values = run_config(folder, engine=engine, resume=any((folder / name).exists() for name in _SERVER_CONTENT))
    sites = len(site_folders(folder))
    if engine == "flower":
        from simulations.flower_engine import run_flower

        run_flower(None, values, federation_config(sites, config.workers), folder, ended=lambda: _has_ended(folder))
        return
    import torch

    from client.app import app as client_app
    from server.app import app as server_app
    from simulations.local_grid import run_local

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_local(server_app, client_app, values, sites, config.workers)


def _has_ended(folder: Path) -> bool:
    """Whether the run record says so already; a record of an earlier start says `running` soon."""
    try:
        return read_record(folder).status != "running"
    except FedbridgeError:
        return False


def _finish(config: SimulationConfig, folder: Path, record: RunRecord, progress: Progress) -> RunRecord:
    """Controls, figures with intervals, predictions and the report of a completed run."""
    path = folder / PREDICTIONS
    if not path.is_file():
        from simulations.controls import predict_all

        try:
            predict_all(folder, config, progress).save(path)
        except OSError as error:
            raise RunFolderError(
                f"{folder}: the controls can't be read or written",
                why=error.strerror or str(error),
                fix="free space or correct the permissions, then --resume",
            ) from error
    return _report(folder, record, Predictions.load(path), config, progress)


def _report(
    folder: Path, record: RunRecord, predictions: Predictions, config: SimulationConfig, progress: Progress
) -> RunRecord:
    from server.report.render import write_report

    progress("figures and report", 0, 1)
    classes = record.evaluation.classes
    predictions.write_csv(folder / PREDICTIONS_CSV, classes)
    evaluation = evaluate(predictions, classes, config.bootstrap, config.seed)
    if record.threat_model == "none":
        record = record.model_copy(update={"evaluation": evaluation})
    else:
        # What only the simulator knows stays apart from what the run has released.
        write_evaluation(folder / SIMULATED_EVALUATION, evaluation)
    write_record(folder, record)
    write_report(folder)
    progress("figures and report", 1, 1)
    return record


def _run_rotations(config: SimulationConfig, out: Path, engine: EngineName, progress: Progress) -> RunRecord:
    """One run for each rotation, and their test patients pooled: between them each patient was tested once."""
    names = [f"rotation-{number}" for number in range(config.split.rotations)]
    records = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / CONFIG, config.text())
    except OSError as error:
        raise RunFolderError(
            f"{out}: can't be written", why=error.strerror or "", fix="choose a writable --out"
        ) from error
    for number, name in enumerate(names):
        progress("rotations", number, len(names))
        split = config.split.model_copy(update={"rotation": number})
        records.append(_run_once(config.model_copy(update={"split": split}), out / name, engine, progress))
    progress("rotations", len(names), len(names))
    first = records[0]
    pooled = Predictions.joined([Predictions.load(out / name / PREDICTIONS) for name in names])
    if (out / names[0] / "example_windows.json").is_file():
        shutil.copyfile(out / names[0] / "example_windows.json", out / "example_windows.json")
    whole = RunRecord(
        status="completed",
        run_id=first.run_id,
        name=config.name,
        config=config.model_dump(mode="json", by_alias=True),
        seed=config.seed,
        engine=engine,
        threat_model=first.threat_model,
        evaluation=Evaluation(classes=first.evaluation.classes),
        versions=first.versions,
        started=first.started,
        seconds=None if config.privacy.private else round(sum(record.seconds or 0.0 for record in records), 3),
        rotations=names,
    )
    return _report(out, whole, pooled, config, progress)


def _make_way(out: Path, config: SimulationConfig, resume: bool, overwrite: bool) -> None:
    """See to it that the run may use `out`: empty, its own to go on with, or cleared."""
    if not out.exists() or (out.is_dir() and not any(each for each in out.iterdir() if not _left_over(each))):
        return
    if not (out / CONFIG).is_file():
        raise RunFolderError(
            f"{out}: is not an empty folder",
            why=f"it is no run either: it has no {CONFIG}",
            fix="name another --out, or remove it yourself",
        )
    if overwrite:
        shutil.rmtree(out)
        return
    started = any((out / name).exists() for name in _SERVER_CONTENT) or any(out.glob("rotation-*"))
    if started and not resume:
        raise RunFolderError(
            f"{out}: already holds a run{_status(out)}",
            why="a run is never overwritten unasked",
            fix="--resume goes on with it, --overwrite replaces it, --out names another folder",
        )
    _check_same(out, config)


def _left_over(path: Path) -> bool:
    """Half a configuration that a killed process left."""
    return path.name.startswith(f".{CONFIG}.")


def _check_same(out: Path, config: SimulationConfig) -> None:
    before, now = read_config(out), config
    if before == now:
        return
    changed = differences(yaml.safe_load(before.text()), yaml.safe_load(now.text()))
    raise ResumeError(
        f"{out}: its run was prepared with another configuration",
        why=f"other values at: {', '.join(changed)}",
        fix="use the same configuration, --overwrite to begin anew, or another --out",
    )


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted keys at which two nested mappings differ."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [path] if old != new else []
    keys = dict.fromkeys([*old, *new])
    return [
        found
        for key in keys
        for found in differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    ]


def _status(out: Path) -> str:
    try:
        return f" ({read_record(out).status})"
    except FedbridgeError:
        return ""


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder against a second `fedbridge-sim run`; the lock lies in the cache, `out` may not exist yet."""
    locks = cache_root() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{sha256_json(str(out))[:32]}.lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunFolderError(
            f"{out}: another fedbridge-sim runs there", why="its lock is held", fix="wait for it, or name another --out"
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"{locks}: can't be written", why=error.strerror or "", fix="set FEDBRIDGE_CACHE to a writable folder"
        ) from error
    try:
        yield
    finally:
        lock.release()

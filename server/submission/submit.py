"""Hand a study to Flower as a run of its own folder: the first time, or once more to go on where it stood."""

from __future__ import annotations

import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from bridge.bundle import build_app
from bridge.errors import ConfigError
from bridge.files import cause, write_whole
from bridge.run_config import RUN_CONFIG_DEFAULTS, Value, toml_text
from bridge.study.archive import Study
from server.coordinator.folder import CONNECTION
from server.errors import ResumeError, RunError, RunFolderError
from server.events import now
from server.flower_command import FlowerCommand, words
from server.runfolder import holds_a_run, is_held
from server.submission.flower import flower_status, stop_in_flower
from server.submission.record import SUBMITTED, Submission, read_submission, write_submission

RUN_KEY, RUN_CONFIG = "run-key", "run-config.toml"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,90}\Z")
_LOCK = ".submitting"
_GIVE_UP_SECONDS = 30.0
"""How long Flower may take to notice that a run's process is gone, before it is told to stop."""
_POLL_SECONDS = 3.0


def choose_folder(runs: Path, study: Study, name: str | None, resume: bool) -> Path:
    """The run folder of this call: the one named, or the study's next free one, to resume its latest.

    Raises `ConfigError` for a name that is no plain word, `ResumeError` where there is nothing to resume or it is
    another study's, `RunFolderError` where a run that is there would be overwritten.
    """
    if name is not None and not _NAME.match(name):
        raise ConfigError(
            f"--name {name}: can't be the name of a run",
            why="letters, digits, '.', '_' and '-' are",
            fix="choose another",
        )
    taken = [folder for folder in _folders(runs, study.id) if _is_taken(folder)]
    if resume:
        folder = runs / name if name is not None else taken[-1] if taken else runs / study.id
        _check_resumable(folder, study)
        return folder
    if name is None:
        return next(folder for folder in _numbered(runs, study.id) if not _is_taken(folder))
    if _is_taken(runs / name):
        raise RunFolderError(
            f"{runs / name}: already holds a run",
            why="a run is never overwritten",
            fix="--resume goes on with it, --name takes another folder",
        )
    return runs / name


def _numbered(runs: Path, study: str) -> Iterator[Path]:
    yield runs / study
    number = 2
    while True:
        yield runs / f"{study}-{number}"
        number += 1


def _folders(runs: Path, study: str) -> list[Path]:
    """The folders `study`, `study-2`, ... that are there, in this order."""
    found: list[Path] = []
    for folder in _numbered(runs, study):
        if not folder.exists():
            return found
        found.append(folder)
    return found


def _is_taken(folder: Path) -> bool:
    return (folder / SUBMITTED).exists() or holds_a_run(folder)


def _check_resumable(folder: Path, study: Study) -> None:
    submission = read_submission(folder)
    if submission is None:
        raise ResumeError(
            f"{folder}: nothing to resume", why=f"there is no {SUBMITTED}", fix="start it without --resume"
        )
    if submission.study_sha256 != study.sha256:
        raise ResumeError(
            f"{folder}: is a run of another study",
            why=f"it belongs to {submission.study}, the file is {study.id}",
            fix=f"resume with {submission.study_file}, or start a new run",
        )


@contextmanager
def reserved(runs: Path, study: Study, name: str | None, resume: bool) -> Iterator[Path]:
    """The folder of `choose_folder`, held against other submissions; raises as it does."""
    folder = choose_folder(runs, study, name, resume)
    with alone(folder):
        if choose_folder(runs, study, name, resume) != folder:
            raise RunFolderError(f"{folder}: was taken by another command meanwhile", fix="try again")
        yield folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run folder, made where it is missing, against a second submission. Raises `RunFolderError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunFolderError(
            f"{folder}: another `fedbridge-server run` submits it", why=f"{_LOCK} is held", fix="wait for it"
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"{folder}: the run folder can't be written", why=cause(error), fix="correct the permissions or free space"
        ) from error
    try:
        yield
    finally:
        lock.release()


def wait_until_over(folder: Path, flower: FlowerCommand) -> None:
    """For a resume: make sure that the run's last submission is over.

    Raises `RunFolderError` where its process is at work. Where Flower calls it running and no process is there (killed,
    or the SuperLink was), that is given some time to show, then Flower is told to stop it.
    """
    submission = read_submission(folder)
    assert submission is not None
    deadline = time.monotonic() + _GIVE_UP_SECONDS
    while True:
        if is_held(folder):
            raise RunFolderError(
                f"{folder}: the run is still going on",
                why="its process is at work",
                fix=f"`fedbridge-server follow {folder.name}` shows it, `end {folder.name}` ends it",
            )
        if not submission.flower_run or flower_status(flower, submission.flower_run).is_over:
            return
        if time.monotonic() >= deadline:
            stop_in_flower(flower, submission.flower_run)
            return
        time.sleep(_POLL_SECONDS)


def submit(study: Study, models: Path, folder: Path, flower: FlowerCommand) -> Submission:
    """Submit a run in its folder and write down as what; it goes on where the folder has something to go on with.

    Raises `RunError` with Flower's words where it does not take the run, `RunFolderError` where the folder can't be
    written.
    """
    submission = Submission(
        study=study.id, study_sha256=study.sha256, study_file=str(study.path.resolve()), submitted=now()
    )
    values = _run_config(study, models, folder)
    try:
        write_whole(folder / RUN_CONFIG, toml_text(values))
    except OSError as error:
        raise RunFolderError(
            f"{folder / RUN_CONFIG}: can't be written", why=cause(error), fix="free space or correct the permissions"
        ) from error
    before = read_submission(folder)
    write_submission(folder, submission)
    try:
        run = _flower_run(flower, folder / RUN_CONFIG, study)
    except BaseException:
        if before is not None:
            write_submission(folder, before)
        else:
            (folder / SUBMITTED).unlink(missing_ok=True)
        raise
    submission = submission.model_copy(update={"flower_run": run})
    write_submission(folder, submission)
    return submission


def _flower_run(flower: FlowerCommand, run_config: Path, study: Study) -> str:
    with tempfile.TemporaryDirectory(prefix="fedbridge-") as place:
        app = build_app(Path(place) / "app")
        answer = flower.ask("run", str(app), CONNECTION, "--run-config", str(run_config))
    run, built = str(answer.get("run-id") or ""), str(answer.get("fab-hash") or "")
    if not answer.get("success") or not run:
        raise RunError(
            "Flower did not start the run",
            why=words(answer),
            fix="see that the SuperLink runs (fedbridge-server status), then try again",
        )
    # Flower tells the first digits of what it was sent.
    if not study.manifest.code.sha256.startswith(built):
        stop_in_flower(flower, run)
        raise RunError("the code changed while it was submitted", why="another bundle hash", fix="try again")
    return run


def _run_config(study: Study, models: Path, folder: Path) -> Mapping[str, Value]:
    return {
        **RUN_CONFIG_DEFAULTS,
        "job": study.job_text,
        "run-folder": str(folder),
        "models-folder": str(models),
        "run-key": _run_key(folder),
        "engine": "deployment",
        "resume": holds_a_run(folder),
    }


def _run_key(folder: Path) -> str:
    """The run's name in the sites' privacy ledgers: made once, so that a resumed run stays the same run."""
    path = folder / RUN_KEY
    try:
        if not path.exists():
            write_whole(path, secrets.token_hex(16) + "\n", sync=True)
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = cause(error) if isinstance(error, OSError) else "it is no text"
        raise RunFolderError(f"{path}: can't be used", why=why, fix="bring it back from a backup") from error
    if not re.fullmatch(r"[0-9a-f]{32}", key):
        raise RunFolderError(
            f"{path}: is damaged",
            why="32 hex digits are expected; with another key the patients' budget would be charged a second time",
            fix="bring it back from a backup",
        )
    return key

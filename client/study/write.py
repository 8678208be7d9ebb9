"""Put an acceptance on record: in the audit log first, then the folder, so that a record that holds is always known."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from filelock import Timeout

from bridge.errors import StudyError
from bridge.files import cause, sync_to_disk, write_whole
from bridge.study.archive import Study
from bridge.study.manifest import JOB_YAML, PAGE, STUDY_JSON, STUDY_SIG
from client.audit import AuditLog, Entry
from client.errors import NotAcceptedError, OutputError
from client.site import Site
from client.study.record import ACCEPTANCE, Acceptance, Accepted, now, purpose_of, read_record, studies_lock


def record(site: Site, study: Study, who: str) -> Accepted:
    """Record that `who` accepted a study whose signature was checked; over a withdrawn or damaged record of it.

    Raises `StudyError` where another study has its short id, `OutputError` and `AuditError` where it can't be written.
    """
    acceptance = Acceptance(
        study_sha256=study.sha256, bundle_sha256=study.manifest.code.sha256, who=who, when=now(), state="accepted"
    )
    folder = site.studies_folder / study.id
    content: dict[str, bytes] = {
        STUDY_JSON: study.content,
        STUDY_SIG: study.signature,
        JOB_YAML: study.job_text.encode(),
        PAGE: study.page.encode(),
        ACCEPTANCE: acceptance.content(),
    }
    try:
        site.studies_folder.mkdir(parents=True, exist_ok=True)
        with studies_lock(site):
            _refuse_other(site, folder, study)
            _sweep(folder)
            staged = folder.with_name(f".{folder.name}.{os.getpid()}")
            staged.mkdir()
            for name, each in content.items():
                write_whole(staged / name, each, sync=True)
            entry = Entry(study.id, "", purpose_of(acceptance), event="accepted", sha256=study.sha256)
            AuditLog(site.audit_path).append([entry])
            _replace(staged, folder)
    except (OSError, Timeout) as error:
        why = "another process holds the lock of the studies" if isinstance(error, Timeout) else cause(error)
        raise OutputError(
            f"{folder}: the acceptance can't be recorded", why=why, fix="free space or correct the permissions"
        ) from error
    return read_record(site, folder)


def holding(site: Site, study: Study) -> Accepted | None:
    """The record of a study that was accepted before and holds; None where there is none that can be relied on."""
    try:
        found = read_record(site, site.studies_folder / study.id)
    except NotAcceptedError:
        return None
    return found if found.holds and found.sha256 == study.sha256 else None


def _refuse_other(site: Site, folder: Path, study: Study) -> None:
    try:
        found = read_record(site, folder)
    except NotAcceptedError:
        return
    if found.sha256 != study.sha256:
        raise StudyError(
            f"another study is called '{study.id}' here",
            why=f"its sha256 is {found.sha256[:16]}..., this one's {study.sha256[:16]}...",
            fix="ask the coordinator to build the study again: it gets another id then",
        )


def _replace(staged: Path, folder: Path) -> None:
    """Put a folder in the place of another; killed in between, there is none, and the study counts as not accepted."""
    if folder.exists():
        folder.rename(folder.with_name(f".{folder.name}.old"))
    staged.rename(folder)
    sync_to_disk(folder.parent)
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Delete what an earlier, killed recording of the same study left."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(path)

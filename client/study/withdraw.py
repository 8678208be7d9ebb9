"""Leave a study: nothing more of it leaves, what was cached for it is deleted, and the records stay."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from bridge.errors import StudyError
from bridge.files import cause, write_whole
from bridge.job import parse_job
from bridge.study.manifest import STUDY_JSON
from client.audit import AuditLog, Entry
from client.cache import Cache
from client.errors import NotAcceptedError, OutputError
from client.site import Site
from client.study.acceptance import records
from client.study.record import ACCEPTANCE, Acceptance, folders, now, quoted, read_acceptance, studies_lock


@dataclass(frozen=True)
class Withdrawal:
    """What a withdrawal did: whether the study had been left before, and how many cache entries were deleted.

    `kept_for` names another accepted study that needs the cache; empty where none does.
    """

    again: bool
    entries: int
    kept_for: str


def withdraw(site: Site, study_id: str, who: str) -> Withdrawal:
    """Withdraw a study: first on disk, then in the audit log, then the feature cache. Interrupted or done twice, it may
    be repeated; a damaged record can be withdrawn as well.

    Raises `StudyError` where no such study was accepted, `OutputError` and `AuditError` where it can't be written.
    """
    folder = _folder(site, study_id)
    try:
        with studies_lock(site):
            acceptance = _known(folder)
            again = acceptance.state == "withdrawn"
            if not again:
                acceptance = acceptance.model_copy(update={"state": "withdrawn", "withdrawn": now()})
                write_whole(folder / ACCEPTANCE, acceptance.content(), sync=True)
            _record_leaving(site, study_id, acceptance, who)
    except (OSError, Timeout) as error:
        why = "another process holds the lock of the studies" if isinstance(error, Timeout) else cause(error)
        raise OutputError(
            f"{folder}: the study can't be withdrawn",
            why=why,
            fix="stop the site with `fedbridge-site stop`, see to the cause, and withdraw it again",
        ) from error
    kept_for = needing_cache(site, folder)
    return Withdrawal(again, 0 if kept_for else clear_cache(site), kept_for)


def clear_cache(site: Site) -> int:
    """Delete what the site keeps of its recordings' features; returns how many entries there were."""
    return Cache(site.cache_folder, site.file.cache.max_gigabytes).clear()


def tidy(site: Site, folder: Path) -> None:
    """Delete what a computation put into the cache while its study in `folder` was withdrawn."""
    if not needing_cache(site, folder):
        clear_cache(site)


def needing_cache(site: Site, folder: Path) -> str:
    """The id of a study that holds and needs the same encoders' features as the one in `folder`; empty for none.

    A site has one pair of encoders, so any other study that holds needs them, unless its models were replaced since.
    """
    sound = records(site).sound
    mine = [each for each in sound if each.folder == folder]
    for other in sound:
        if other.folder == folder or not other.holds:
            continue
        if not mine or _encoders(mine[0].job_text) & _encoders(other.job_text):
            return other.id
    return ""


def _encoders(job_text: str) -> set[str]:
    models = parse_job(job_text).models
    return {models.old_encoder, models.new_encoder}


def _folder(site: Site, study_id: str) -> Path:
    known = folders(site)
    for folder in known:
        if folder.name == study_id:
            return folder
    raise StudyError(
        f"no study '{study_id}' was accepted at the site '{site.name}'",
        why=f"{site.studies_folder} knows {[folder.name for folder in known]}",
        fix="`fedbridge-site studies` lists them",
    )


def _known(folder: Path) -> Acceptance:
    """What the record says; of a damaged one, as much as makes it refused for good."""
    try:
        return read_acceptance(folder)
    except NotAcceptedError:
        study = folder / STUDY_JSON
        digest = hashlib.sha256(study.read_bytes()).hexdigest() if study.is_file() else ""
        return Acceptance(study_sha256=digest, bundle_sha256="", who="", when="")


def _record_leaving(site: Site, study_id: str, acceptance: Acceptance, who: str) -> None:
    audit = AuditLog(site.audit_path)
    last = audit.newest_of(study_id, ("accepted", "left"))
    if last is not None and last.event == "left":
        return
    purpose = f"left by {quoted(who)}; code {acceptance.bundle_sha256}"
    audit.append([Entry(study_id, "", purpose, event="left", sha256=acceptance.study_sha256)])

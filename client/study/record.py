"""The record of one accepted study: a folder with what was agreed to, word for word, and who agreed.

    studies/<id>/
        study.json, study.sig   what the coordinator signed
        job.yaml, page.md       what is asked of the site
        acceptance.json         who accepted it and when, which study and code, and whether it still holds

A record is believed only where the signature is that of the coordinator's file, every hash is the listed one, and the
audit log knows the acceptance. Whoever can write all of these files can accept a study too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import Field, ValidationError

from bridge.config import Settings, load_model
from bridge.enrolment import CoordinatorFile
from bridge.errors import ConfigError
from bridge.hashing import canonical_json
from bridge.messages import ReasonCode
from bridge.study.manifest import JOB_YAML, PAGE, STUDY_JSON, STUDY_SIG, Manifest, study_id
from bridge.study.signing import is_signed
from client.audit import AuditLog
from client.errors import NotAcceptedError
from client.site import Site

ACCEPTANCE = "acceptance.json"
FILES = (STUDY_JSON, STUDY_SIG, JOB_YAML, PAGE, ACCEPTANCE)
LOCK = "studies.lock"
LOCK_SECONDS = 60.0

State = Literal["accepted", "withdrawn"]


class Acceptance(Settings):
    """`acceptance.json`."""

    schema_: Literal["fedbridge.acceptance/1"] = Field(default="fedbridge.acceptance/1", alias="schema")
    study_sha256: str
    bundle_sha256: str
    who: str
    """Who accepted it, as they called themselves."""
    when: str
    """UTC, ISO 8601."""
    state: State = "accepted"
    withdrawn: str = ""
    """When it was withdrawn; empty while it holds."""

    def content(self) -> bytes:
        """The bytes of the file."""
        return canonical_json(self.model_dump(mode="json", by_alias=True)) + b"\n"


@dataclass(frozen=True)
class Accepted:
    """One record, checked: what the study says and asks, and what became of it."""

    folder: Path
    manifest: Manifest
    acceptance: Acceptance
    job_text: str
    page: str

    @property
    def id(self) -> str:
        """How the study is called in commands and folders."""
        return self.folder.name

    @property
    def sha256(self) -> str:
        """Hex sha256 of `study.json`."""
        return self.acceptance.study_sha256

    @property
    def bundle_sha256(self) -> str:
        """Hex sha256 of the code that the study runs."""
        return self.acceptance.bundle_sha256

    @property
    def holds(self) -> bool:
        """Whether it is still accepted."""
        return self.acceptance.state == "accepted"


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def studies_lock(site: Site) -> FileLock:
    """Held while a study is accepted or withdrawn, and while a reply is handed over: one is wholly before the other.

    The folder of the studies must exist.
    """
    return FileLock(site.studies_folder / LOCK, timeout=LOCK_SECONDS)


def folders(site: Site) -> list[Path]:
    """The folders of all records, sorted by name."""
    place = site.studies_folder
    if not place.is_dir():
        return []
    return sorted(each for each in place.iterdir() if each.is_dir() and not each.name.startswith("."))


def read_record(site: Site, folder: Path) -> Accepted:
    """One record. Raises `NotAcceptedError` (STUDY_UNUSABLE) that names the file which is not what was accepted, and
    `AuditError` where the audit log is damaged."""
    content = {name: _bytes(folder / name) for name in FILES}
    try:
        acceptance = Acceptance.model_validate_json(content[ACCEPTANCE])
        manifest = Manifest.model_validate_json(content[STUDY_JSON])
        record = Accepted(folder, manifest, acceptance, content[JOB_YAML].decode(), content[PAGE].decode())
    except (ValidationError, UnicodeDecodeError) as error:
        raise unusable(folder, f"one of its files is damaged: {str(error).splitlines()[0]}") from error
    _check_hashes(record, content)
    if not is_signed(coordinator_of(site).verify_key, content[STUDY_SIG], content[STUDY_JSON]):
        raise unusable(folder / STUDY_SIG, f"the study is not signed by the key in {site.coordinator_path}")
    _check_audit(site, record)
    return record


def read_acceptance(folder: Path) -> Acceptance:
    """Who accepted a study and whether it holds, without a look at the rest. Raises `NotAcceptedError`."""
    try:
        return Acceptance.model_validate_json(_bytes(folder / ACCEPTANCE))
    except ValidationError as error:
        raise unusable(folder / ACCEPTANCE, str(error).splitlines()[0]) from error


def coordinator_of(site: Site) -> CoordinatorFile:
    """The coordinator that the site enrolled with. Raises `NotAcceptedError` (STUDY_UNUSABLE)."""
    try:
        return load_model(site.coordinator_path, CoordinatorFile)
    except ConfigError as error:
        raise NotAcceptedError(
            ReasonCode.STUDY_UNUSABLE, error.what, why=error.why, fix="get the file from the coordinator again"
        ) from error


def unusable(path: Path, why: str) -> NotAcceptedError:
    """The error of a record that is not what was accepted."""
    return NotAcceptedError(
        ReasonCode.STUDY_UNUSABLE,
        f"{path}: is not as it was when the study was accepted",
        why=why,
        fix="accept the study again with `fedbridge-site accept`, or withdraw it",
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unusable(path, error.strerror or str(error)) from error


def _check_hashes(record: Accepted, content: dict[str, bytes]) -> None:
    """Each file against the one that names it; `acceptance.json` is named by the audit log (`_check_audit`)."""
    folder, manifest = record.folder, record.manifest
    digest = hashlib.sha256(content[STUDY_JSON]).hexdigest()
    if digest != record.sha256 or study_id(manifest.name, digest) != folder.name:
        raise unusable(folder / STUDY_JSON, f"its sha256 is {digest[:16]}..., {record.sha256[:16]}... was accepted")
    if manifest.code.sha256 != record.bundle_sha256:
        raise unusable(folder / ACCEPTANCE, "it names other code than the study")
    for name in (JOB_YAML, PAGE):
        listed = manifest.members.get(name)
        if listed is None or hashlib.sha256(content[name]).hexdigest() != listed.sha256:
            raise unusable(folder / name, f"its sha256 is not the one that {STUDY_JSON} lists")


def _check_audit(site: Site, record: Accepted) -> None:
    """A record that holds is one whose acceptance is the last thing that the audit log knows of the study."""
    if not record.holds:
        return
    audit = AuditLog(site.audit_path)
    last = audit.newest_of(record.id, ("accepted", "left"))
    if last is None or last.event == "left":
        audit.verify()  # a log that lacks the acceptance because lines are gone says so itself
        known = "no acceptance of it" if last is None else "that the site has left it"
        raise unusable(record.folder / ACCEPTANCE, f"the audit log {site.audit_path} knows {known}")
    if (last.sha256, last.purpose) != (record.sha256, purpose_of(record.acceptance)):
        raise unusable(record.folder / ACCEPTANCE, f"the audit log {site.audit_path} knows another acceptance")


def purpose_of(acceptance: Acceptance) -> str:
    """What the audit log says of an acceptance: who, when, and which code."""
    return f"accepted by {quoted(acceptance.who)} at {acceptance.when}; code {acceptance.bundle_sha256}"


def quoted(who: str) -> str:
    """A person's name as one unmistakable word of the audit log."""
    return json.dumps(who, ensure_ascii=False)

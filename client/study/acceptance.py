"""What this site has accepted, and what it refuses because it did not: other code, another job, a study it has left.

Nothing here reads a recording or a model: a refusal comes before any data is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from filelock import Timeout

from bridge.job import Job, parse_job
from bridge.messages import ReasonCode
from client.errors import NotAcceptedError
from client.site import Site
from client.study.record import LOCK, Accepted, folders, read_acceptance, read_record, studies_lock

_KEYS_SHOWN = 12


@dataclass(frozen=True)
class Records:
    """The records that were sound, and what is wrong with the others."""

    sound: tuple[Accepted, ...]
    damaged: tuple[NotAcceptedError, ...]

    def running(self, bundle_sha256: str) -> list[Accepted]:
        """Those of this code, the newest first."""
        mine = [each for each in self.sound if each.bundle_sha256 == bundle_sha256]
        return sorted(mine, key=lambda each: each.acceptance.when, reverse=True)


def records(site: Site) -> Records:
    """Every record of the site, withdrawn ones too: signature and hashes are checked each time."""
    sound, damaged = [], []
    for folder in folders(site):
        try:
            sound.append(read_record(site, folder))
        except NotAcceptedError as error:
            damaged.append(error)
    return Records(tuple(sound), tuple(damaged))


def accepted(site: Site) -> list[Accepted]:
    """Every record, withdrawn ones too (`Accepted.holds`). Raises `NotAcceptedError` (STUDY_UNUSABLE) where one is not
    what was accepted."""
    found = records(site)
    if found.damaged:
        raise found.damaged[0]
    return list(found.sound)


def require_code(site: Site, bundle_sha256: str) -> None:
    """Raise `NotAcceptedError` unless the site takes part in a study with this code: CODE_NOT_ACCEPTED, STUDY_WITHDRAWN
    where it has left all of them, STUDY_UNUSABLE where a damaged record may be the one."""
    _require_code(site, records(site), bundle_sha256)


def admitted(site: Site, job_text: str, bundle_sha256: str) -> Accepted:
    """The study that holds of this very job text and code; of several the one that was accepted last.

    Raises `NotAcceptedError`: as `require_code`, and JOB_NOT_ACCEPTED that names the keys in which the job differs.
    """
    found = records(site)
    _require_code(site, found, bundle_sha256)
    same = [each for each in found.running(bundle_sha256) if each.job_text == job_text]
    holding = [each for each in same if each.holds]
    if holding:
        return holding[0]
    if same:
        raise _withdrawn(same[0])
    if found.damaged:
        raise found.damaged[0]
    if any(each.job_text == job_text and each.holds for each in found.sound):
        raise _other_code(bundle_sha256, "the study with this job was accepted with other code")
    raise _other_job(job_text, [each for each in found.running(bundle_sha256) if each.holds])


def require_holding(study: Accepted) -> None:
    """Raise `NotAcceptedError` (STUDY_WITHDRAWN) where the study was withdrawn meanwhile."""
    if read_acceptance(study.folder).state == "withdrawn":
        raise _withdrawn(study)


@contextmanager
def leaving(site: Site, study: Accepted) -> Iterator[None]:
    """While a reply is handed over: the study holds, and nobody withdraws it before the block ends.

    Raises `NotAcceptedError`: STUDY_WITHDRAWN, and STORAGE where the lock can't be had.
    """
    try:
        with studies_lock(site):
            require_holding(study)
            yield
    except Timeout as error:
        raise NotAcceptedError(
            ReasonCode.STORAGE,
            f"{site.studies_folder / LOCK}: another process holds it",
            why="a study is being accepted or withdrawn",
            fix="end the process that hangs",
        ) from error


def differences(asked: Job, agreed: Job) -> list[str]:
    """The keys in which two jobs differ, sorted."""
    ours, theirs = (_flat(job.model_dump(mode="json", by_alias=True)) for job in (agreed, asked))
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    parts = (_flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items())
    return {key: each for part in parts for key, each in part.items()}


def _require_code(site: Site, found: Records, bundle_sha256: str) -> None:
    if not bundle_sha256:
        raise NotAcceptedError(
            ReasonCode.CODE_NOT_ACCEPTED,
            "nobody compared the code of this run with what was accepted",
            why="the message did not come through the executor of this site",
            fix="start the site with `fedbridge-site start`, and SuperNodes with --isolation process alone",
        )
    mine = found.running(bundle_sha256)
    if any(each.holds for each in mine):
        return
    if mine:
        raise _withdrawn(mine[0])
    if found.damaged:
        raise found.damaged[0]
    raise _other_code(bundle_sha256, _accepted_codes(found.sound) or f"no study was accepted ({site.studies_folder})")


def _accepted_codes(sound: Iterable[Accepted]) -> str:
    holding = [f"'{each.id}' with {each.bundle_sha256[:16]}..." for each in sound if each.holds]
    return "accepted: " + ", ".join(holding) if holding else ""


def _other_code(bundle_sha256: str, why: str) -> NotAcceptedError:
    return NotAcceptedError(
        ReasonCode.CODE_NOT_ACCEPTED,
        f"the run's code {bundle_sha256[:16]}... was not accepted",
        why=why,
        fix="accept the study of this run, or tell the coordinator to run the code of the study that was accepted",
    )


def _other_job(job_text: str, holding: list[Accepted]) -> NotAcceptedError:
    asked = parse_job(job_text)
    compared = [(each, differences(asked, parse_job(each.job_text))) for each in holding]
    nearest, keys = min(compared, key=lambda pair: (pair[0].manifest.name != asked.name, len(pair[1])))
    more = f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
    differ = f"in {', '.join(keys[:_KEYS_SHOWN])}{more}" if keys else "in its wording alone, in no key"
    return NotAcceptedError(
        ReasonCode.JOB_NOT_ACCEPTED,
        f"the run's job '{asked.name}' was not accepted",
        why=f"it differs from the accepted study '{nearest.id}' {differ}",
        fix="accept the study of this run, or tell the coordinator to run the one that was accepted",
    )


def _withdrawn(study: Accepted) -> NotAcceptedError:
    return NotAcceptedError(
        ReasonCode.STUDY_WITHDRAWN,
        f"the study '{study.id}' was withdrawn",
        why=f"its record in {study.folder} says so",
        fix="accept it again if the hospital takes part again",
    )

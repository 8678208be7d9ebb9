"""A patient withdraws: out of the caches and the stored replies, and out of all that follows.

What was spent of the patient's budget stays spent, and what has left the site can't be called back.
"""

from __future__ import annotations

from dataclasses import dataclass

from client.cache import Cache
from client.errors import RecordingError
from client.ledger import Ledger
from client.ledger.opening import exists
from client.patients import patients_of
from client.site import Site
from client.vault import Vault


@dataclass(frozen=True)
class Withdrawn:
    """The patients of a site who have withdrawn, as keyed hashes; `patient in withdrawn` asks for one."""

    hashes: frozenset[str]
    vault: Vault | None

    def __contains__(self, patient: str) -> bool:
        return self.vault is not None and bool(self.hashes) and self.vault.patient(patient) in self.hashes


@dataclass(frozen=True)
class Forgotten:
    """What a withdrawal has deleted: stored replies, and entries of the feature cache."""

    replies: int
    entries: int


def withdrawn(site: Site) -> Withdrawn:
    """Who has withdrawn. A site without a ledger has nobody, and gets none by asking. Raises `LedgerError`."""
    if not exists(site):
        return Withdrawn(frozenset(), None)
    with Ledger.open(site) as ledger:
        return Withdrawn(ledger.withdrawn(), ledger.vault)


def forget(site: Site, patient: str) -> Forgotten:
    """Book a patient's withdrawal in the ledger and, by keyed hash, in the audit log; then delete what is stored.

    Interrupted, or done twice, it may be repeated. Raises `RecordingError` where the site knows no such patient (a
    typing error must not look like a withdrawal), and `LedgerError`.
    """
    with Ledger.open(site) as ledger:
        if not (ledger.knows(patient) or _has_recordings(site, patient)):
            raise RecordingError(
                "no recording and no plan is of this patient",
                why=f"looked in {site.resolve(site.file.folder)}, in splits and in the ledger",
                fix="write the patient's id as the recordings have it",
            )
        replies = ledger.forget(patient)
    cache = Cache(site.cache_folder, site.file.cache.max_gigabytes)
    return Forgotten(replies, cache.delete({"patient": patient}))


def _has_recordings(site: Site, patient: str) -> bool:
    return patient in site.file.splits.listed or patient in patients_of(site)

"""What `accept` would refuse, refused before a message is computed."""

from __future__ import annotations

from pathlib import Path

from bridge.study.archive import Study
from client.errors import NotAcceptedError
from client.policy import Policy
from client.site import Site
from client.study.compare import Finding, compare
from client.study.record import coordinator_of
from simulations.rehearse.books import copy_books


def judge(site: Site, policy: Policy, study: Study, workplace: Path) -> None:
    """Compare the study with the site as `accept` does, on copies of its ledger and audit log in `workplace`.

    Raises `StudyError` where the study is damaged or not signed by the site's coordinator, and `NotAcceptedError` with
    the codes of all that stands in the way.
    """
    coordinator = coordinator_of(site)
    study.require_signed_by(coordinator.verify_key, f"the coordinator '{coordinator.name}'")
    workplace.mkdir()
    places = {"ledger": workplace / "ledger.sqlite", "audit": workplace / "audit.jsonl"}
    copy = Site(site.path, site.file.model_copy(update=places))
    copy_books(site, copy)
    (workplace / "compared").mkdir()
    refused = compare(study, copy, policy, coordinator, workplace / "compared").refused
    if refused:
        raise _error(study, refused)


def _error(study: Study, refused: list[Finding]) -> NotAcceptedError:
    names = ", ".join(dict.fromkeys(each.reason.name for each in refused))
    return NotAcceptedError(
        refused[0].reason,
        f"the study '{study.id}' could not be accepted here: {names}",
        why="; ".join(f"{each.topic}: {each.what}" + (f" ({each.why})" if each.why else "") for each in refused),
        fix="; ".join(dict.fromkeys(each.fix for each in refused if each.fix)),
    )

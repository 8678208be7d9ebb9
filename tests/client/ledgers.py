"""Sites that have a ledger and nothing else, and what the tests of the ledger ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import dp_accounting
from dp_accounting import pld, rdp

from bridge.privacy.accounting import Release
from client.ledger import Ledger, MessageKey, Plan
from client.site import Site, open_site

DELTA = 1e-3
PROBE = Release("probe", "pair", 8.0)
STEPS = Release("training", "pair", 4.0, 0.25, 6)
STEP = Release("training", "pair", 4.0, 0.25)
METRICS = Release("metrics", "test", 6.0)

SITE = """
schema: fedbridge.site/1
site: alpha
folder: recordings
new: {modality: PPG, channels: [P], rate_hz: 32}
window: {seconds: 4, step_seconds: 4}
"""


def ledger_site(folder: Path) -> Site:
    """A site file in `folder`, without recordings: the ledger needs none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.yaml").write_text(SITE, encoding="utf-8")
    return open_site(folder)


def plan(
    cap: float = 100.0,
    releases: tuple[Release, ...] = (PROBE, STEPS),
    sha256: str = "a" * 64,
    delta: float = DELTA,
    cohorts: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """A plan of one probe and six steps for two patients."""
    return Plan(sha256, releases, delta, cap, {"pair": ["p1", "p2"]} if cohorts is None else cohorts)


def ask(
    ledger: Ledger,
    round_: int = 1,
    reply: Callable[[], bytes] = lambda: b"reply",
    *,
    run: str = "run",
    request: str = "q" * 64,
    encrypt: bool = False,
    wait_seconds: float = 60.0,
) -> bytes:
    """One train message of one step."""
    key = MessageKey("train", round_)
    return ledger.answer(run, key, request, (STEP,), "pair", reply, encrypt=encrypt, wait_seconds=wait_seconds)


def event_of(*releases: Release) -> dp_accounting.DpEvent:
    """dp-accounting's event, written anew."""
    events: list[dp_accounting.DpEvent] = []
    for each in releases:
        gaussian: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(each.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(each.sampling_rate, gaussian)
        events.append(dp_accounting.SelfComposedDpEvent(sampled, each.count))
    return dp_accounting.ComposedDpEvent(events)


def pld_epsilon(*releases: Release, delta: float = DELTA) -> float:
    """One plan's epsilon, by dp-accounting alone."""
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    return float(pld.PLDAccountant(relation).compose(event_of(*releases)).get_epsilon(delta))


def rdp_epsilon(*releases: Release, delta: float = DELTA) -> float:
    """Several plans' epsilon, by dp-accounting alone."""
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    return float(accountant.compose(event_of(*releases)).get_epsilon(delta))

"""The pretend sites: the first is the site as it is, the others are its own patients dealt out.

Each has its own site file and policy, ledger, key, audit log, cache and log in the rehearsal's working folder. They
read the site's recordings where these lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, count, islice
from pathlib import Path

from bridge.job import Job
from bridge.study.manifest import MODEL_NAMES
from client.forget import withdrawn
from client.patients import cohorts_of
from client.policy import Policy, load_policy
from client.site import SITE_FILE, Site
from client.site_file import (
    SPLITS,
    CacheSection,
    DeploymentSection,
    ModelsSection,
    Split,
    SplitsSection,
    write_site_file,
)
from simulations.errors import RehearsalError
from simulations.hospital_files import policy_text
from simulations.rehearse.books import copy_books

SITES = "sites"
_AT_LEAST = 2
"""Patients of a split at each other pretend site, where the site has so many: choosing positions compares patients."""
_FOR_EVER = 1e9


def names_of(site: str, job: Job, pretend: int) -> tuple[str, ...]:
    """The names of the pretend sites: the site's own, then others that the study expects, then made-up ones.

    Raises `RehearsalError` where the study does not expect the site.
    """
    expected = job.sites.expected or tuple(job.sites.weights)
    if expected and site not in expected:
        raise RehearsalError(
            f"the study does not expect a site named '{site}'",
            why=f"it names {', '.join(expected)}",
            fix="correct the site's name in its site file, or ask the coordinator for a study that names the site",
        )
    made_up = (f"pretend-{number}" for number in count(2))
    others = (name for name in chain(expected, made_up) if name != site)
    return (site, *islice(others, pretend - 1))


def rehearsed_job(job: Job, names: Sequence[str]) -> Job:
    """The job as asked of the pretend sites. All that a site computes stays; other are who takes part, and how long the
    coordinator waits: pretend sites compute one after the other, hospitals at the same time."""
    weights = {name: job.sites.weight(name) if name in job.sites.weights else 1.0 for name in names}
    sites = job.sites.model_copy(
        update={
            "expected": tuple(names),
            "weights": weights if job.sites.weights else {},
            "minimum": min(job.sites.minimum, len(names)),
            "timeout_seconds": _FOR_EVER,
        }
    )
    return job.model_copy(update={"sites": sites})


def write_sites(site: Site, names: Sequence[str], models: Path, folder: Path) -> list[Site]:
    """Write the pretend sites into `folder/sites/site-<i>` and return them.

    The first begins with copies of the site's own ledger, key and audit log: what patients have spent, and who has
    withdrawn, holds in a rehearsal too. Raises as `Site.files` and `client.forget.withdrawn`.
    """
    policy = load_policy(site.policy_path)
    places = [folder / SITES / f"site-{number}" for number in range(len(names))]
    sites = [_write(site, names[0], site.file.splits, policy, models, places[0], folder / "cache")]
    copy_books(site, sites[0])
    if len(names) == 1:
        return sites
    gone = withdrawn(sites[0])
    cohorts = {split: [each for each in patients if each not in gone] for split, patients in cohorts_of(site).items()}
    small = policy.model_copy(update={"minimum_patients": 1, "minimum_group": 1})
    for place, name, splits in zip(places[1:], names[1:], deal(cohorts, len(names) - 1), strict=True):
        own = small.model_copy(update={"site": name if policy.site else ""})
        sites.append(_write(site, name, splits, own, models, place, folder / "cache-of-others"))
    return sites


def deal(cohorts: Mapping[Split, Sequence[str]], sites: int) -> list[SplitsSection]:
    """Each split's patients dealt out in turn; where they are few, to more than one site."""

    def hand(patients: Sequence[str], number: int) -> tuple[str, ...]:
        own = list(patients[number::sites])
        turn = number
        while len(own) < min(_AT_LEAST, len(patients)):
            turn += 1
            own += [each for each in [patients[turn % len(patients)]] if each not in own]
        return tuple(sorted(own))

    return [SplitsSection(**{split: hand(cohorts[split], number) for split in SPLITS}) for number in range(sites)]


def _write(
    site: Site, name: str, splits: SplitsSection, policy: Policy, models: Path, place: Path, cache: Path
) -> Site:
    place.mkdir(parents=True)
    (place / "policy.yaml").write_text(policy_text(policy, policy.site), encoding="utf-8")
    labels = site.file.labels
    if labels.path is not None:
        labels = labels.model_copy(update={"path": site.resolve(labels.path)})
    file = site.file.model_copy(
        update={
            "site": name,
            "folder": site.resolve(site.file.folder),
            "labels": labels,
            "splits": splits,
            "models": ModelsSection(**{each: models / each for each in MODEL_NAMES}),
            "policy": Path("policy.yaml"),
            "cache": CacheSection(folder=cache, max_gigabytes=site.file.cache.max_gigabytes),
            "audit": Path("audit.jsonl"),
            "ledger": Path("ledger.sqlite"),
            "log": Path("site.log"),
            "deployment": DeploymentSection(),
        }
    )
    write_site_file(place / SITE_FILE, file)
    return Site(place / SITE_FILE, file)

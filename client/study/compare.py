"""What a study asks, held against what the site has: code, policy, models, recordings' description and budget.

Nothing is changed at the site. Every comparison is made, so that its engineer sees all that stands in the way at once.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from bridge.bundle import BundleHash, installed_bundle
from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.enrolment import CoordinatorFile
from bridge.errors import FedbridgeError, WeightsError
from bridge.messages import ReasonCode
from bridge.study.archive import Study
from bridge.study.manifest import MODEL_NAMES, Manifest
from client.errors import LedgerError, SiteError
from client.forecast import forecast_job
from client.policy import Policy
from client.site import Site, occupied
from client.site_file import ModelsSection

Verdict = Literal["fits", "note", "refused"]
ModelName = Literal["old_encoder", "new_encoder", "task_head"]

_FILES_SHOWN = 6


@dataclass(frozen=True)
class Finding:
    """One comparison: what it is about, how it came out, and what to do where it did not fit."""

    topic: str
    verdict: Verdict
    what: str
    why: str = ""
    fix: str = ""
    reason: ReasonCode = ReasonCode.OK


@dataclass
class Comparison:
    """All findings, and the model folders of the study that the site does not have yet, by where they must go."""

    findings: list[Finding] = field(default_factory=list)
    install: dict[Path, Path] = field(default_factory=dict)
    """Place in the site's model folders, to the unpacked folder of the study."""

    @property
    def refused(self) -> list[Finding]:
        """Those that stand in the way."""
        return [each for each in self.findings if each.verdict == "refused"]


def compare(study: Study, site: Site, policy: Policy, coordinator: CoordinatorFile, workplace: Path) -> Comparison:
    """Hold a study, whose signature was checked, against a site. `workplace` is an empty folder of its own.

    Raises `StudyError` where a file of the study is damaged, and whatever keeps the site from being looked at.
    """
    found = Comparison()
    found.findings += [
        _coordinator(study.manifest, coordinator),
        *_sites(study, site),
        *_code(study.manifest, _installed()),
        _policy(study, policy),
    ]
    models = _Models(study, site, workplace / "models")
    found.findings += models.findings
    found.install = models.install
    if models.complete:
        found.findings += _description(models.as_installed())
    if study.job.privacy.private:
        found.findings.append(_budget(study, site, policy, workplace))
    return found


def _installed() -> BundleHash:
    from flwr.cli.build import build_fab_from_disk

    return installed_bundle(build_fab_from_disk)


def _refusal(topic: str, reason: ReasonCode, error: FedbridgeError) -> Finding:
    return Finding(topic, "refused", error.what, error.why, error.fix, reason)


def _coordinator(manifest: Manifest, coordinator: CoordinatorFile) -> Finding:
    if manifest.coordinator == coordinator.name:
        return Finding("coordinator", "fits", f"signed by '{coordinator.name}', with whom the site enrolled")
    return Finding(
        "coordinator",
        "refused",
        f"the study names the coordinator '{manifest.coordinator}'",
        f"the site enrolled with '{coordinator.name}', whose key signed it",
        "ask the coordinator to build the study again under its own name",
        ReasonCode.COORDINATOR_UNKNOWN,
    )


def _sites(study: Study, site: Site) -> Iterator[Finding]:
    sites = study.job.sites
    if (sites.expected and site.name not in sites.expected) or (sites.weights and site.name not in sites.weights):
        named = list(sites.expected or sites.weights)
        yield Finding(
            "sites", "note", f"the study does not ask '{site.name}'", f"it names {named}", "tell the coordinator"
        )


def _code(manifest: Manifest, installed: BundleHash) -> Iterator[Finding]:
    """Whether the study's code is the installed one, file by file, and which packages have other versions here."""
    other = [
        f"{name} {_version(name)} (study: {wanted})"
        for name, wanted in sorted(manifest.versions.items())
        if _version(name) != wanted
    ]
    if installed.sha256 == manifest.code.sha256:
        yield Finding("code", "fits", f"the installed code is the study's, {installed.sha256[:16]}...")
        if other:
            yield Finding(
                "code", "note", "versions differ: " + ", ".join(other), "results may differ in the last digits"
            )
        return
    differing = _differing(installed.files, manifest.code.files)
    yield Finding(
        "code",
        "refused",
        f"the installed code is not the study's: {differing}",
        "versions that differ: " + (", ".join(other) or "none"),
        "install the fedbridge of the study, or ask the coordinator to build the study with the one installed here",
        ReasonCode.CODE_NOT_ACCEPTED,
    )


def _version(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _differing(installed: Mapping[str, str], study: Mapping[str, str]) -> str:
    kinds = {
        "changed": [name for name in installed.keys() & study.keys() if installed[name] != study[name]],
        "only in the study": study.keys() - installed.keys(),
        "only installed": installed.keys() - study.keys(),
    }
    parts = []
    for kind, names in kinds.items():
        if names:
            more = f" and {len(names) - _FILES_SHOWN} more" if len(names) > _FILES_SHOWN else ""
            parts.append(f"{kind}: {', '.join(sorted(names)[:_FILES_SHOWN])}{more}")
    return "; ".join(parts) or "the files are the same, the bundle made of them is not"


def _policy(study: Study, policy: Policy) -> Finding:
    if study.job.privacy.simulation_seed is not None:
        return Finding(
            "policy",
            "refused",
            "the job has privacy.simulation_seed",
            "noise that can be computed from a seed protects nobody; seeds are for simulations alone",
            "the coordinator must leave it out",
            ReasonCode.JOB_INVALID,
        )
    try:
        policy.judge(study.job)
    except SiteError as error:
        return _refusal("policy", error.reason, error)
    return Finding("policy", "fits", "the policy permits what the job needs")


class _Models:
    """The three models: present and equal, to be installed from the study, or in the way."""

    def __init__(self, study: Study, site: Site, workplace: Path) -> None:
        self._study, self._site, self._workplace = study, site, workplace
        self._folders: dict[ModelName, Path] = {}
        self.findings: list[Finding] = []
        self.install: dict[Path, Path] = {}
        old, new, head = study.cards()
        cards: dict[ModelName, EncoderCard | HeadCard] = {"old_encoder": old, "new_encoder": new, "task_head": head}
        self.findings += [self._look(name, card) for name, card in cards.items()]

    @property
    def complete(self) -> bool:
        """Whether the site will have the study's three models."""
        return set(self._folders) == set(MODEL_NAMES)

    def as_installed(self) -> Site:
        """The site as it will be, with the study's models."""
        section = ModelsSection.model_validate(self._folders)
        return Site(self._site.path, self._site.file.model_copy(update={"models": section}))

    def _look(self, name: ModelName, card: EncoderCard | HeadCard) -> Finding:
        try:
            folder = self._site.model_folder(name)
            if occupied(folder):
                return self._present(name, card, folder)
        except SiteError as error:
            return _refusal(name, error.reason, error)
        except WeightsError as error:
            return _refusal(name, ReasonCode.WEIGHTS_MISSING, error)
        entry = self._study.manifest.models[name]
        if entry.included:
            self._folders[name] = self.install[folder] = self._unpacked() / name
            return Finding(name, "fits", f"{card.digest[:16]}... comes with the study, for {folder}")
        return Finding(
            name,
            "refused",
            f"{folder}: there is no model, and the study does not hold it",
            f"the study names {card.digest[:16]}... (weights {entry.weights_sha256[:16]}...)",
            f"put it there; the study says where it is from: {entry.source or 'nothing'}",
            ReasonCode.WEIGHTS_MISSING,
        )

    def _present(self, name: ModelName, card: EncoderCard | HeadCard, folder: Path) -> Finding:
        held = read_card(folder, HeadCard) if isinstance(card, HeadCard) else read_card(folder, EncoderCard)
        if held.digest == card.digest:
            self._folders[name] = folder
            return Finding(name, "fits", f"the site has {card.digest[:16]}...")
        return Finding(
            name,
            "refused",
            f"{folder}: another model, {held.digest[:16]}...",
            f"the study names {card.digest[:16]}...; what is there is not overwritten",
            f"move it aside, or name another folder as models.{name} in the site file",
            ReasonCode.WEIGHTS_DIFFER,
        )

    def _unpacked(self) -> Path:
        """The study's models, unpacked once and each file checked."""
        if not self._workplace.exists():
            self._study.extract_models(self._workplace)
        return self._workplace


def _description(site: Site) -> Iterator[Finding]:
    """Whether the recordings, as the site file describes them, can be read by the study's models."""
    checks: tuple[tuple[str, Callable[[], object]], ...] = (
        ("old signal", lambda: site.old_card),
        ("new signal", lambda: site.new_card),
        ("labels", lambda: site.head_card),
    )
    for topic, check in checks:
        try:
            check()
        except SiteError as error:
            yield _refusal(topic, error.reason, error)
        else:
            yield Finding(topic, "fits", "as the site file describes it, it fits the study's models")


def _budget(study: Study, site: Site, policy: Policy, workplace: Path) -> Finding:
    """What the plan would cost the patients; a site without a ledger gets none by asking."""
    from client.ledger import Ledger
    from client.ledger.opening import exists

    cap = policy.privacy.epsilon_cap
    place = site if exists(site) else _beside(site, workplace)
    try:
        with Ledger.open(place) as ledger:
            found = forecast_job(ledger, site, study.job, cap)
    except (SiteError, LedgerError) as error:
        return _refusal("budget", error.reason, error)
    spent = f"the most charged patient has spent epsilon {found.before:.3f} and would come to {found.after:.3f}"
    if found.fits:
        return Finding("budget", "fits", f"{spent}, of {cap:g}")
    return Finding(
        "budget",
        "refused",
        spent,
        f"the policy's privacy.epsilon_cap is {cap:g}",
        "ask for a stronger plan, or change the policy if the hospital agrees",
        ReasonCode.BUDGET_SPENT,
    )


def _beside(site: Site, workplace: Path) -> Site:
    """The site with a ledger and an audit log in another place."""
    places = {"ledger": workplace / "ledger.sqlite", "audit": workplace / "audit.jsonl"}
    return Site(site.path, site.file.model_copy(update=places))

"""From a coordinator's study configuration to the one signed file that goes to the sites."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from bridge.bundle import BundleHash, installed_bundle
from bridge.config import Settings, load_model
from bridge.encoders.cards import CARD, WEIGHTS, EncoderCard, HeadCard, read_card
from bridge.enrolment import COORDINATOR_FILE, CoordinatorFile
from bridge.errors import EnrolmentError, StudyError, WeightsError
from bridge.files import cause
from bridge.job import (
    AlignmentJob,
    BridgeJob,
    EvaluateJob,
    Job,
    Models,
    SelectionJob,
    SitesJob,
    StrategyJob,
    TrainJob,
    check_closed_form,
    check_private,
    job_text,
)
from bridge.job_privacy import PrivacyJob
from bridge.privacy.calibration import resolved
from bridge.study.archive import Study, members_of, write_study
from bridge.study.checks import check_plain
from bridge.study.manifest import JOB_YAML, MODEL_NAMES, MODELS, PAGE, Code, Manifest, ModelEntry, study_id
from bridge.study.page import study_page
from bridge.study.signing import public_of
from server.book import versions
from server.events import now
from server.initialisation import PUBLIC_VECTORS
from server.models import FrozenModels, read_models


class StudyModels(Settings):
    """The frozen models, and how the sites get them."""

    folder: Path
    """Folder of old_encoder, new_encoder and task_head, as `fedbridge-sim prepare` makes one."""
    include: bool = True
    """Whether the study file holds the weights; the cards always travel."""
    source: str = ""
    """Where to get the weights, in words or as an address, where they are not included."""

    @model_validator(mode="after")
    def _can_be_had(self) -> StudyModels:
        if not self.include and not self.source:
            raise ValueError("models.source must say where to get weights that are not included")
        return self


class StudyConfig(Settings):
    """What `fedbridge-server study build` reads: a job without what the coordinator's folder and the models tell."""

    schema_: Literal["fedbridge.study-config/1"] = Field(default="fedbridge.study-config/1", alias="schema")
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    purpose: str = ""
    """What the study is for, in plain words; the hospitals' page shows it."""
    contact: str = ""
    """Whom hospitals may ask."""
    attempts: int = Field(default=5, ge=1)
    """How often a site answers one and the same question over the whole study: first, and after interruptions."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Starts the bridge, orders the batches."""
    models: StudyModels
    selection: SelectionJob = SelectionJob()
    bridge: BridgeJob = BridgeJob()
    alignment: AlignmentJob = AlignmentJob()
    train: TrainJob = TrainJob()
    strategy: StrategyJob = StrategyJob()
    sites: SitesJob = SitesJob()
    evaluate: EvaluateJob = EvaluateJob()
    privacy: PrivacyJob = PrivacyJob()

    @model_validator(mode="after")
    def _holds_together(self) -> StudyConfig:
        check_closed_form(self)
        check_private(self)
        if self.privacy.simulation_seed is not None:
            raise ValueError("privacy.simulation_seed is for simulations alone: every site refuses it")
        if self.attempts <= self.sites.retries:
            raise ValueError(
                f"attempts {self.attempts} must be more than sites.retries {self.sites.retries}: "
                "a run may ask a question once and so often again"
            )
        return self

    def job(self, coordinator: str, models: Models) -> Job:
        """The job that every site is asked to do, not yet resolved."""
        names = set(Job.model_fields) & set(type(self).model_fields) - {"schema_", "models"}
        return Job(coordinator=coordinator, models=models, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class BuiltStudy:
    """A study file that was written: where, its manifest, and the sha256 of its `study.json`."""

    path: Path
    manifest: Manifest
    sha256: str

    @property
    def id(self) -> str:
        """How the study is called in commands and folders."""
        return study_id(self.manifest.name, self.sha256)


def build_study(
    config: Path, coordinator: CoordinatorFile, secret: bytes, out: Path, *, force: bool = False
) -> BuiltStudy:
    """Write the signed study of a configuration to `out`, whole or not at all.

    The noise multipliers of its privacy plan are resolved, and the code is that of this installation. Raises
    `ConfigError`, `WeightsError`, `CodeError`, `EnrolmentError` where the secret is not the coordinator's, `StudyError`
    where `out` is there and `force` is not given, and `StudyStorageError`.
    """
    if public_of(secret) != coordinator.verify_key:
        raise EnrolmentError(
            "the signing key is not the coordinator's",
            why=f"{COORDINATOR_FILE} names another public key",
            fix="use the key and the coordinator file of one folder",
        )
    if out.exists() and not force:
        raise StudyError(f"{out}: is there already", why="sites may have accepted it", fix="--force, or another --out")
    asked = load_model(config, StudyConfig)
    frozen, job = _models_and_job(asked, config.absolute().parent, coordinator.name)
    manifest = _manifest(asked, coordinator.name, frozen)
    texts = {
        JOB_YAML: job_text(job),
        PAGE: study_page(manifest, job, (frozen.old_encoder, frozen.new_encoder, frozen.task_head)),
    }
    for name, text in texts.items():
        check_plain(out, name, text)
    files = {name: text.encode() for name, text in texts.items()} | _model_files(asked, job, frozen)
    try:
        manifest = manifest.model_copy(update={"members": members_of(files)})
    except OSError as error:
        raise WeightsError(f"{frozen.folder}: can't be read", why=cause(error), fix="correct permissions") from error
    return BuiltStudy(out, manifest, write_study(out, manifest, files, secret))


def _models_and_job(asked: StudyConfig, base: Path, coordinator: str) -> tuple[FrozenModels, Job]:
    folder = base / asked.models.folder.expanduser()
    models = Models(
        old_encoder=read_card(folder / "old_encoder", EncoderCard).digest,
        new_encoder=read_card(folder / "new_encoder", EncoderCard).digest,
        task_head=read_card(folder / "task_head", HeadCard).digest,
    )
    job = asked.job(coordinator, models)
    frozen = read_models(folder, job)
    if asked.selection.mode == "fixed":
        frozen.dimensions(job, (asked.selection.input_position or 0, asked.selection.output_position or 0))
    return frozen, resolved(job)


def _manifest(asked: StudyConfig, coordinator: str, frozen: FrozenModels) -> Manifest:
    """The manifest but for its members."""
    bundle = _bundle()
    cards: tuple[EncoderCard | HeadCard, ...] = (frozen.old_encoder, frozen.new_encoder, frozen.task_head)
    entries = {
        name: ModelEntry(
            digest=card.digest,
            weights_sha256=card.weights_sha256,
            included=asked.models.include,
            source=asked.models.source,
        )
        for name, card in zip(MODEL_NAMES, cards, strict=True)
    }
    return Manifest(
        name=asked.name,
        coordinator=coordinator,
        purpose=asked.purpose.strip(),
        contact=asked.contact.strip(),
        created=now(),
        attempts=asked.attempts,
        code=Code(sha256=bundle.sha256, files=bundle.files),
        versions=versions(),
        models=entries,
        members={},
    )


def _model_files(asked: StudyConfig, job: Job, frozen: FrozenModels) -> dict[str, bytes | Path]:
    parts = (CARD, WEIGHTS) if asked.models.include else (CARD,)
    files: dict[str, bytes | Path] = {
        f"{MODELS}/{name}/{part}": frozen.folder / name / part for name in MODEL_NAMES for part in parts
    }
    public, bridge = frozen.folder / PUBLIC_VECTORS, job.bridge
    needed = bridge.initialisation != "random" or "public" in (bridge.constant, bridge.whitening)
    if needed and not public.is_file():
        raise WeightsError(
            f"{public}: no such file",
            why="the bridge asks for public vectors (its initialisation, whitening or constant), and they lie there",
            fix="copy the file that came with the models, or use initialisation 'random', no whitening and no constant",
        )
    if asked.models.include and public.is_file():
        files[f"{MODELS}/{PUBLIC_VECTORS}"] = public
    return files


def is_own_code(study: Study) -> bool:
    """Whether the study's code is that of this installation."""
    return _bundle().sha256 == study.manifest.code.sha256


def _bundle() -> BundleHash:
    from flwr.cli.build import build_fab_from_disk

    return installed_bundle(build_fab_from_disk)

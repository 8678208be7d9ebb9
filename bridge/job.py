"""The job: what a study asks of every site, as one YAML text that travels with a run (docs/reference/configs.md).

A job is a REQUEST. Each site parses it itself and holds it against its own policy; the stricter of both applies.
This module imports no torch, so that a site can judge a job before anything heavy is loaded.
"""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from bridge.config import Settings, parse_model, parse_yaml
from bridge.job_privacy import PrivacyJob

EvaluationSplit = Literal["validation", "test"]

Strategy = Literal["FedAvg", "FedProx", "FedAdam", "FedYogi", "FedMedian", "FedTrimmedAvg", "Krum"]


class Models(Settings):
    """Digests of the frozen models that every site must hold. Filled in by `prepare`; sites refuse others."""

    old_encoder: str
    new_encoder: str
    task_head: str


class SelectionJob(Settings):
    """Where the bridge goes: two-stage selection, or fixed positions."""

    mode: Literal["scores", "moments", "fixed"] = "scores"
    """`scores`: each site sends one bounded score a position. `moments`: additive sums, which each policy must permit.
    `fixed`: the two positions below."""
    input_position: int | None = Field(default=None, ge=0)
    """m, for mode `fixed`."""
    output_position: int | None = Field(default=None, ge=0)
    """l, for mode `fixed`."""
    windows_per_patient: int = Field(default=16, ge=1)
    """At most so many windows of one patient enter a statistic (w)."""
    folds: int = Field(default=5, ge=2, le=20)
    """Folds of the probe's cross-validation, by patient."""
    ridge: float = Field(default=1e-2, gt=0)
    """Ridge strength of the `moments` probe, relative to the mean feature variance."""
    width_limit: int = Field(default=128, ge=1)
    """Features of a position that the `moments` probe looks at: wider ones pass a public random projection first, which
    bounds the message. Nothing else is projected."""

    @model_validator(mode="after")
    def _fixed_has_positions(self) -> SelectionJob:
        given = self.input_position is not None and self.output_position is not None
        if self.mode == "fixed" and not given:
            raise ValueError("mode 'fixed' needs input_position and output_position")
        if self.mode != "fixed" and (self.input_position is not None or self.output_position is not None):
            raise ValueError(f"input_position and output_position are chosen by mode '{self.mode}': leave them out")
        return self


class BridgeJob(Settings):
    """Size, form and start of the prototype bridge."""

    kind: Literal["prototype", "factored"] = "prototype"
    """`prototype`: the paper's. `factored`: the token axis of B through a fixed basis of cosines; far smaller."""
    rank: int = Field(default=8, ge=1)
    """r: width of the bottleneck between A and B."""
    prototypes: int = Field(default=32, ge=1)
    """Rows of P; every old token is a mixture of them."""
    cosines: int = Field(default=4, ge=1)
    """K, for kind `factored`: cosines that span the token axis."""
    initialisation: Literal["random", "public", "directions"] = "random"
    """Prototypes: standard normal, or of PUBLIC old tokens shipped with the models: centroids (`public`) or principal
    directions."""
    frozen_prototypes: bool = False
    """Whether the prototypes stay as they start: fewer parameters to train, and to add noise to."""
    constant: Literal["none", "public"] = "none"
    """Old tokens that are added to the bridge's output: none, or the mean of PUBLIC ones."""
    whitening: Literal["none", "public"] = "none"
    """Of the features that the bridge reads: none, or by PUBLIC patients' mean and covariance, with a one appended."""
    components: int | None = Field(default=None, ge=1)
    """Whitened components that are read; null: all."""


class AlignmentJob(Settings):
    """The loss between the old encoder's own tokens and those reached through the bridge."""

    loss: Literal["cosine", "mse", "l1", "infonce"] = "cosine"
    """Over the flattened tokens of a window."""
    layer: Literal["final", "bridge"] = "final"
    """Compare the old encoder's final tokens, or the tokens where the bridge ends."""
    negatives: Literal["batch", "patient"] = "batch"
    """InfoNCE: other windows of the whole batch (the paper), or of the same patient alone."""
    temperature: float = Field(default=0.1, gt=0)
    """InfoNCE."""


class TrainJob(Settings):
    """Rounds of local training. A step is one mini-batch; every site takes equally many, so equal weights are fair.

    `train: closed_form` is short for `train: {method: closed_form}`.
    """

    method: Literal["gradient", "closed_form"] = "gradient"
    """`gradient`: rounds of training. `closed_form`: one message with a ridge regression's statistics, no rounds."""
    start: Literal["initial", "closed_form"] = "initial"
    """For `gradient`: from the initial bridge, or from the closed form's."""
    ridge: float = Field(default=0.1, gt=0)
    """Ridge strength of the closed form, relative to the whitened features' variance."""
    rounds: int = Field(default=20, ge=1)
    """Broadcasts of the bridge; each policy bounds them, too."""
    local_steps: int = Field(default=20, ge=1)
    """Mini-batches a site takes in a round."""
    patients_per_batch: int = Field(default=8, ge=1)
    """Patients in a mini-batch."""
    windows_per_patient: int = Field(default=8, ge=1)
    """Windows of each of them, at most."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of Adam at the site, whose moments start fresh each round."""
    keep: Literal["last", "best"] = "last"
    """Which round's bridge is exported."""
    criterion: Literal["train_loss", "agreement", "balanced_accuracy"] = "agreement"
    """For `keep: best`, on validation patients (train_loss: on the training ones); needs the policies' permission."""

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @property
    def solves(self) -> bool:
        """Whether the closed form's statistics are asked for."""
        return "closed_form" in (self.method, self.start)


class StrategyJob(Settings):
    """Flower's strategy by name, with its own options."""

    name: Strategy = "FedAvg"
    """How the server makes one bridge of the sites' updates."""
    server_learning_rate: float = Field(default=0.1, gt=0)
    """FedAdam, FedYogi: eta."""
    proximal_mu: float = Field(default=0.01, ge=0)
    """FedProx."""
    trim: float = Field(default=0.2, ge=0, lt=0.5)
    """FedTrimmedAvg: share cut at each end."""
    malicious_sites: int = Field(default=0, ge=0)
    """Krum: how many sites may answer anything."""


class SitesJob(Settings):
    """Who takes part, and what a round needs to count."""

    minimum: int = Field(default=2, ge=1)
    """Fewer good replies than this: the phase or round is repeated, then the run stops with a checkpoint."""
    expected: tuple[str, ...] = ()
    """Agreed names, others are not asked; empty: any site whose describe says yes (a simulation: all its hospitals)."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Public weights by site name; empty: equal weights of 1.0. Never a count."""
    wait_seconds: float = Field(default=60, gt=0)
    """How long to wait for the sites to come online."""
    timeout_seconds: float = Field(default=600, gt=0)
    """How long to wait for the replies of one exchange."""
    retries: int = Field(default=2, ge=0)
    """How often an exchange with too few good replies is repeated."""

    @model_validator(mode="after")
    def _weights_are_positive(self) -> SitesJob:
        bad = {name: weight for name, weight in self.weights.items() if not 0 < weight <= 1}
        if bad:
            raise ValueError(f"weights must lie in (0, 1], not {bad}")
        if self.weights and self.expected and set(self.weights) != set(self.expected):
            raise ValueError("weights and expected must name the same sites")
        return self

    def weight(self, site: str) -> float:
        """The public weight of a site; 1.0 where equal weights hold."""
        return self.weights.get(site, 1.0) if self.weights else 1.0


class EvaluateJob(Settings):
    """Federated evaluation: confusion sums of the sites that permit them."""

    final: bool = True
    """Evaluate the kept bridge on the test patients at the end."""
    every: int = Field(default=0, ge=0)
    """Evaluate on the validation patients every so many rounds; 0: only where `keep: best` needs it."""


class Job(Settings):
    """One study's job. `fedbridge-sim prepare` writes it resolved, with the digests of the models."""

    schema_: Literal["fedbridge.job/1"] = Field(default="fedbridge.job/1", alias="schema")
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    coordinator: str = Field(default="simulation", min_length=1, max_length=64)
    """Judged by each policy's `coordinators`."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    models: Models
    selection: SelectionJob = SelectionJob()
    bridge: BridgeJob = BridgeJob()
    alignment: AlignmentJob = AlignmentJob()
    train: TrainJob = TrainJob()
    strategy: StrategyJob = StrategyJob()
    sites: SitesJob = SitesJob()
    evaluate: EvaluateJob = EvaluateJob()
    privacy: PrivacyJob = PrivacyJob()

    @model_validator(mode="after")
    def _holds_together(self) -> Job:
        check_closed_form(self)
        check_private(self)
        return self

    @property
    def rounds(self) -> int:
        """Rounds of gradient training: none in the closed form."""
        return self.train.rounds if self.train.method == "gradient" else 0

    def judges(self, round_: int) -> bool:
        """Whether the bridge of this round is judged by `train.criterion`."""
        every = self.evaluate.every
        if not every or not self.rounds:
            return self.train.keep == "best"
        return round_ % every == 0 or round_ == self.rounds

    def evaluates(self, split: EvaluationSplit, round_: int) -> bool:
        """Whether the bridge of this round may be evaluated on a split: the server asks no more, a site answers no
        more. Test patients judge a bridge that is kept, and nothing else."""
        if split == "validation":
            return self.train.criterion != "train_loss" and self.judges(round_)
        kept = self.judges(round_) if self.train.keep == "best" else round_ == self.rounds
        return self.evaluate.final and kept


def check_closed_form(job: Any) -> None:
    """Raise `ValueError` where a job, or a simulation's configuration, asks for a closed form that has none."""
    bridge = job.bridge
    if job.train.solves and not (
        bridge.kind == "factored"
        and bridge.whitening == "public"
        and bridge.frozen_prototypes
        and bridge.initialisation != "random"
    ):
        raise ValueError(
            "the closed form needs bridge.kind factored, bridge.whitening public, bridge.frozen_prototypes true and "
            "bridge.initialisation public or directions"
        )
    if job.train.method == "closed_form" and job.train.keep == "best":
        raise ValueError("train.keep 'best' has no rounds to choose from with the closed form: leave it out")


def check_private(job: Any) -> None:
    """Raise `ValueError` where a job, or a simulation's configuration, asks for what no private mechanism can give."""
    if not job.privacy.private:
        return
    mechanism, train = job.privacy.mechanism, job.train
    refused = (
        (job.selection.mode == "moments", "selection.mode 'moments': the sums are not bounded by patient"),
        (
            job.strategy.name not in ("FedAvg", "FedAdam", "FedYogi"),
            f"strategy.name '{job.strategy.name}': its step is not a bounded sum of the updates",
        ),
        (
            job.alignment.loss == "infonce" and job.alignment.negatives == "batch",
            "alignment.negatives 'batch': a patient's loss would depend on others; use 'patient'",
        ),
        (
            train.keep == "best" and train.criterion == "train_loss",
            "train.criterion 'train_loss': the loss is not released; use 'agreement' or 'balanced_accuracy'",
        ),
        (
            mechanism == "central" and train.method == "gradient" and train.local_steps != 1,
            f"train.local_steps {train.local_steps}: a message is ONE gradient evaluation under central; use 1",
        ),
    )
    for wrong, what in refused:
        if wrong:
            raise ValueError(f"privacy.mechanism '{mechanism}' does not go with {what}")


def parse_job(text: str) -> Job:
    """The job in a run's text; raises `ConfigError` that names the key."""
    return parse_model(parse_yaml(text, "job"), Job, "job")


def job_text(job: Job) -> str:
    """The one YAML text of a job, every key written out; `parse_job` gives the job back."""
    return yaml.safe_dump(job.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)

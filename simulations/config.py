"""A simulation's configuration: one YAML, every key explained in the files of `configs/`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, model_validator

from bridge.config import Settings, load_yaml, parse_model, parse_yaml
from bridge.distil import Rival, RivalSettings
from bridge.errors import ConfigError
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
)
from bridge.job_privacy import MechanismName, PrivacyJob
from bridge.messages import CONFUSION_ITEMS, DEFAULT_ITEMS
from client.policy import Policy, PrivacyPolicy
from client.site_file import ComputeSection
from simulations.cohort import CohortConfig
from simulations.datasets.cinc2015 import Cinc2015Config
from simulations.datasets.eegmat import EegmatConfig
from simulations.datasets.fog import FogConfig
from simulations.datasets.isruc import IsrucConfig
from simulations.datasets.wesad import WesadConfig
from simulations.models.config import EncodersConfig
from simulations.partitions import PartitionConfig
from simulations.split import SplitConfig

Control = Literal["shuffled_pairs", "centralised", "linear_student", "site_alone"]
CONTROLS: tuple[Control, ...] = get_args(Control)


class DataConfig(Settings):
    """Where the recordings come from: `source` names the section whose keys count."""

    source: Literal["builtin", "cinc2015", "eegmat", "isruc", "fog", "wesad"] = "builtin"
    unlabelled: Literal["keep", "reject"] = "keep"
    """What becomes of windows without one label: kept as pairs (a bridge needs none), or rejected and counted."""
    builtin: CohortConfig = CohortConfig()
    cinc2015: Cinc2015Config | None = None
    eegmat: EegmatConfig | None = None
    isruc: IsrucConfig | None = None
    fog: FogConfig | None = None
    wesad: WesadConfig | None = None

    @model_validator(mode="after")
    def _section_is_there(self) -> DataConfig:
        if getattr(self, self.source) is None:
            raise ValueError(f"source '{self.source}' needs the section '{self.source}' with the key 'folder'")
        return self

    def placed(self, base: Path) -> DataConfig:
        """The same with every folder absolute; relative ones are relative to `base`."""
        sections = {name: getattr(self, name) for name in ("cinc2015", "eegmat", "isruc", "fog", "wesad")}
        changed = {
            name: section.model_copy(update={"folder": (base / section.folder.expanduser()).resolve()})
            for name, section in sections.items()
            if section is not None
        }
        return self.model_copy(update=changed)


class BootstrapConfig(Settings):
    """Intervals by resampling whole patients."""

    samples: int = Field(default=2000, ge=1000)
    level: float = Field(default=0.95, gt=0.5, lt=1)


class CacheConfig(Settings):
    """The feature cache that all simulated sites share (in the folder FEDBRIDGE_CACHE, or the user's own)."""

    max_gigabytes: float = Field(default=20.0, gt=0)


class SimulatedPrivacyPolicy(PrivacyPolicy):
    """Bounds that stand in no experiment's way."""

    mechanisms: tuple[MechanismName, ...] = ("none", "local", "central")
    epsilon_cap: float = Field(default=1000.0, gt=0)
    delta: float = Field(default=0.1, gt=0, lt=1)
    clip_max: float = Field(default=1000.0, gt=0)
    noise_multiplier_min: float = Field(default=0.0, ge=0)
    sampling_rate_max: float = Field(default=1.0, gt=0, le=1)


class SimulatedPolicy(Policy):
    """A hospital's policy with the defaults of a simulation, where hospitals are small and nobody is harmed."""

    items: tuple[str, ...] = (*DEFAULT_ITEMS, "train_loss", *CONFUSION_ITEMS, "closed_form_moments")
    minimum_patients: int = Field(default=2, ge=1)
    minimum_group: int = Field(default=1, ge=1)
    privacy: SimulatedPrivacyPolicy = SimulatedPrivacyPolicy()


class SimulationConfig(Settings):
    """A simulated study. `seed` varies hospitals, initialisation and order; `split.seed` who is tested."""

    schema_: Literal["fedbridge.simulation/1"] = Field(default="fedbridge.simulation/1", alias="schema")
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: DataConfig = DataConfig()
    split: SplitConfig = SplitConfig()
    partition: PartitionConfig = PartitionConfig()
    encoders: EncodersConfig = EncodersConfig()
    selection: SelectionJob = SelectionJob()
    bridge: BridgeJob = BridgeJob()
    alignment: AlignmentJob = AlignmentJob()
    train: TrainJob = TrainJob()
    strategy: StrategyJob = StrategyJob()
    sites: SitesJob = SitesJob()
    evaluate: EvaluateJob = EvaluateJob()
    privacy: PrivacyJob = PrivacyJob()
    policy: SimulatedPolicy = SimulatedPolicy()
    """What `prepare` writes into every site's policy file."""
    controls: tuple[Control, ...] = CONTROLS
    """Which controls are computed after the run; teacher and chance always are."""
    baselines: tuple[Rival, ...] = ()
    """Which rivals are trained beside them, centralised and by each hospital alone; and what all of it costs."""
    rivals: RivalSettings = RivalSettings()
    bootstrap: BootstrapConfig = BootstrapConfig()
    cache: CacheConfig = CacheConfig()
    compute: ComputeSection = ComputeSection()
    """How the simulated sites run the frozen networks, each of those that compute at the same time."""
    workers: int = Field(default=2, ge=1)
    """Sites, and controls, that compute at the same time; each has one torch thread."""

    @model_validator(mode="after")
    def _holds_together(self) -> SimulationConfig:
        check_closed_form(self)
        check_private(self)
        return self

    def job(self, models: Models) -> Job:
        """The job that every site is asked to do, with the digests of the models."""
        names = set(Job.model_fields) & set(type(self).model_fields) - {"schema_"}
        return Job(models=models, **{name: getattr(self, name) for name in names})

    def text(self) -> str:
        """The resolved configuration as YAML, every key written out; `load_simulation` gives it back."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def load_simulation(path: Path, overrides: Iterable[str] = ()) -> SimulationConfig:
    """The configuration in a YAML file, with `key.inner=value` overrides; paths become absolute.

    Raises `ConfigError` where a key is unknown (it names the closest) or a value is out of bounds.
    """
    content = load_yaml(path)
    if not isinstance(content, dict):
        return parse_model(content, SimulationConfig, str(path))
    listed = list(overrides)
    for override in listed:
        _override(content, override)
    name = str(path) + (f" with --set {' '.join(listed)}" if listed else "")
    config = parse_model(content, SimulationConfig, name)
    base = path.absolute().parent
    return config.model_copy(update={"data": config.data.placed(base), "encoders": config.encoders.placed(base)})


def _override(content: dict[str, Any], override: str) -> None:
    """Put one `key.inner=value` into plain values; the value is YAML, so `[1, 2]` and `null` mean what they say."""
    key, value = read_override(override)
    set_key(content, key, value, f"--set {override!r}")


def read_override(override: str) -> tuple[str, Any]:
    """Key and YAML value of a `key.inner=value`; raises `ConfigError` where it is none."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"--set {override!r} is no key=value", why="a dotted key and a value are needed", fix="--set train.rounds=5"
        )
    return key, parse_yaml(text, f"--set {key}")


def set_key(content: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Put a value at a dotted key of nested plain values, in place; `name` is how errors call it."""
    *outer, last = key.split(".")
    inner: dict[str, Any] = content
    for part in outer:
        found = inner.get(part)
        if found is not None and not isinstance(found, Mapping):
            raise ConfigError(
                f"{name}: '{part}' holds a value, no keys", why=f"it is {found!r}", fix=f"set {part} itself"
            )
        inner[part] = dict(found or {})
        inner = inner[part]
    inner[last] = value

"""A sweep's configuration, and its points: which runs a grid, its rules and its seeds ask for.

schema: fedbridge.sweep/1
name: tradeoff
base: demo.yaml                               # or the keys of a simulation
seeds: [0, 1]
grid:
  privacy.mechanism: [local, central]         # a key and its values
  privacy.epsilon: [1, 8, none]
  bridge:                                     # a name, and bundles of keys
    paper: {}
    factored: {bridge.kind: factored}
rules:                                        # what holds where
  - {where: {privacy.mechanism: central}, set: {train.local_steps: 1}}
  - {where: {privacy.mechanism: local, bridge: paper}, skip: true}
curves: {x: privacy.epsilon, series: [privacy.mechanism, bridge]}
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from bridge.config import Settings, load_yaml, parse_model
from bridge.errors import ConfigError
from bridge.hashing import sha256_json
from simulations.config import SimulationConfig, read_override, set_key

MECHANISM, EPSILON = "privacy.mechanism", "privacy.epsilon"
NONE = "none"
Label = str | int | float | bool
Axis = list[Any] | dict[str, dict[str, Any]]


class Rule(Settings):
    """What holds at every point whose axes have the named values: keys to set, or that there is no such run."""

    where: dict[str, Any]
    """Axis and value, or a list of values."""
    set_: dict[str, Any] = Field(default_factory=dict, alias="set")
    skip: bool = False

    @model_validator(mode="after")
    def _does_something(self) -> Rule:
        if bool(self.set_) == self.skip:
            raise ValueError("a rule has either `set` (keys and values) or `skip: true`")
        return self

    def holds(self, labels: Mapping[str, Label]) -> bool:
        """Whether a point of these labels is meant."""
        return all(
            any(labels[axis] == label_of(value) for value in (wanted if isinstance(wanted, list) else [wanted]))
            for axis, wanted in self.where.items()
        )


class CurvesConfig(Settings):
    """What is drawn: one axis along x, the others as lines; of two series, the first becomes panels."""

    x: str
    series: tuple[str, ...] = Field(default=(), max_length=2)
    metric: Literal["balanced_accuracy", "f1_macro", "f1_weighted", "agreement"] = "balanced_accuracy"


class SweepConfig(Settings):
    """A sweep: a base configuration, axes, rules, seeds, and what to draw."""

    schema_: Literal["fedbridge.sweep/1"] = Field(alias="schema")
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    base: str | dict[str, Any]
    """A simulation's configuration: the path of its file, relative to this one, or its keys."""
    grid: dict[str, Axis] = Field(min_length=1)
    """By axis: values of the dotted key that names it, or named bundles of dotted keys and values."""
    rules: tuple[Rule, ...] = ()
    """Applied in their order, after the axes."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Each point is run with each `seed` (and `privacy.simulation_seed`, where the base asks for seeded noise)."""
    curves: CurvesConfig | None = None
    """null: a table alone."""

    @model_validator(mode="after")
    def _names_axes(self) -> SweepConfig:
        empty = [axis for axis, values in self.grid.items() if not values]
        if empty:
            raise ValueError(f"axis '{empty[0]}' has no value")
        drawn = [self.curves.x, *self.curves.series] if self.curves else []
        for axis in [*drawn, *(axis for rule in self.rules for axis in rule.where)]:
            if axis not in self.grid:
                raise ValueError(f"'{axis}' is no axis of the grid, which has {', '.join(self.grid)}")
        return self


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the value of each axis, the seed, and the whole configuration."""

    labels: Mapping[str, Label]
    seed: int
    config: SimulationConfig

    @property
    def key(self) -> str:
        """Names the run by its configuration, so that a grid which grew computes only what is new."""
        return sha256_json(self.config.model_dump(mode="json", by_alias=True))[:16]


def load_sweep(path: Path, overrides: Iterable[str] = ()) -> SweepConfig:
    """The sweep in a YAML file, with `key=value` overrides: `seeds=[0, 1]`, `grid.<axis>=...`, `base.<key>=...`.

    The base is read here: what is returned holds all its keys, with absolute folders. Raises `ConfigError`.
    """
    content = load_yaml(path)
    if not isinstance(content, dict):
        return parse_model(content, SweepConfig, str(path))
    content = copy.deepcopy(content)
    folder = path.absolute().parent
    base, folder = _base(content.get("base"), folder, path)
    for override in overrides:
        key, value = read_override(override)
        head, _, rest = key.partition(".")
        if head == "base" and rest:
            set_key(base, rest, value, f"--set {override!r}")
        elif head == "grid" and rest:
            content["grid"] = {**content.get("grid", {}), rest: value}
        else:
            set_key(content, key, value, f"--set {override!r}")
    simulation = parse_model({"name": content.get("name"), **base}, SimulationConfig, f"{path}: base")
    placed = simulation.model_copy(update={"data": simulation.data.placed(folder)})
    content["base"] = placed.model_dump(mode="json", by_alias=True)
    return parse_model(content, SweepConfig, str(path))


def _base(base: Any, folder: Path, path: Path) -> tuple[dict[str, Any], Path]:
    """Plain keys of the base, and the folder that its paths are relative to."""
    if isinstance(base, str):
        file = folder / base
        content = load_yaml(file)
        if isinstance(content, dict):
            return content, file.absolute().parent
        raise ConfigError(f"{file}: holds no keys", why="it should be a simulation's configuration", fix="correct base")
    if isinstance(base, dict):
        return base, folder
    raise ConfigError(f"{path}: key 'base' is missing", why="every run starts from it", fix="name a simulation's file")


def expand(sweep: SweepConfig) -> list[Point]:
    """Every run of the sweep once, in the order of the grid, seeds innermost.

    Without a mechanism there is no epsilon, and without an epsilon no mechanism: such points become one, labelled
    `none` on both axes. Raises `ConfigError` where a point has a wrong key or value; it names the point.
    """
    points: dict[str, Point] = {}
    for labels, settings in _combinations(sweep):
        if any(rule.skip and rule.holds(labels) for rule in sweep.rules):
            continue
        for rule in sweep.rules:
            if rule.holds(labels):
                settings = settings | rule.set_
        for seed in sweep.seeds:
            point = Point(labels, seed, _config(sweep, labels, settings, seed))
            points.setdefault(point.key, point)
    if not points:
        raise ConfigError(f"sweep '{sweep.name}' has no run", why="its rules skip every point", fix="skip fewer")
    return list(points.values())


def _combinations(sweep: SweepConfig) -> Iterator[tuple[dict[str, Label], dict[str, Any]]]:
    """Labels and settings of every combination of the axes' values."""
    axes = [list(_values(axis, values)) for axis, values in sweep.grid.items()]
    for chosen in itertools.product(*axes):
        labels = {axis: label for axis, (label, _) in zip(sweep.grid, chosen, strict=True)}
        settings = {key: value for _, bundle in chosen for key, value in bundle.items()}
        if MECHANISM in labels or EPSILON in labels:
            _without_privacy(labels, settings)
        yield labels, settings


def _values(axis: str, values: Axis) -> Iterator[tuple[Label, dict[str, Any]]]:
    if isinstance(values, dict):
        yield from values.items()
    else:
        yield from ((label_of(value), {axis: value}) for value in values)


def _without_privacy(labels: dict[str, Label], settings: dict[str, Any]) -> None:
    if NONE in (labels.get(MECHANISM), labels.get(EPSILON)):
        labels |= {axis: NONE for axis in (MECHANISM, EPSILON) if axis in labels}
        settings |= {MECHANISM: NONE, EPSILON: None}


def _config(
    sweep: SweepConfig, labels: Mapping[str, Label], settings: Mapping[str, Any], seed: int
) -> SimulationConfig:
    assert isinstance(sweep.base, dict)
    content = copy.deepcopy(sweep.base)
    name = f"sweep '{sweep.name}' at {', '.join(f'{axis} {label}' for axis, label in labels.items())}"
    for key, value in settings.items():
        set_key(content, key, value, name)
    content |= {"name": sweep.name, "seed": seed, "workers": 1}
    if content["privacy"].get("simulation_seed") is not None:
        content["privacy"]["simulation_seed"] = seed
    return parse_model(content, SimulationConfig, name)


def label_of(value: Any) -> Label:
    """How a value is called in rules, tables and pictures: numbers and words as they are, null as `none`."""
    if value is None:
        return NONE
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)

"""Configurations: those that ship, overrides, and every wrong key told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.config import load_yaml
from bridge.errors import ConfigError
from bridge.job import Job, Models, job_text, parse_job
from simulations.config import SimulationConfig, load_simulation
from tests.conftest import ROOT
from tests.simulations.studies import SMOKE

EVERY = sorted((ROOT / "configs").glob("*.yaml"))
SHIPPED = [path for path in EVERY if load_yaml(path)["schema"] == "fedbridge.simulation/1"]
"""Those of one simulation; the others are sweeps."""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_load_and_come_back_from_their_text(path: Path, tmp_path: Path) -> None:
    config = load_simulation(path)
    assert config.name == path.stem
    (tmp_path / "again.yaml").write_text(config.text(), encoding="utf-8")
    assert load_simulation(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_every_key_is_commented_where_it_stands(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    bare = [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if line.strip() and not line.strip().startswith("#") and "#" not in line and not above.strip().startswith("#")
    ]
    assert bare == []


def test_the_four_configurations_are_there() -> None:
    assert {path.stem for path in SHIPPED} >= {"demo", "smoke", "cinc2015", "eegmat"}


def test_set_overrides_one_key_with_a_yaml_value() -> None:
    config = load_simulation(SMOKE, ["train.rounds=7", "controls=[]", "partition={hospitals: 2}", "seed = 3"])
    assert config.train.rounds == 7
    assert config.controls == ()
    assert config.partition.hospitals == 2
    assert config.partition.kind == "equal"  # the whole section was set
    assert config.seed == 3
    assert config.train.local_steps == load_simulation(SMOKE).train.local_steps


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.ronds=5", "did you mean 'train.rounds'"),
        ("tarin.rounds=5", "did you mean 'train'"),
        ("data.builtin.hospital_patient=5", "did you mean 'data.builtin.hospital_patients'"),
        ("train.rounds=0", "greater than or equal to 1"),
        ("controls=[teacher]", "controls.0"),
        ("train.rounds", "no key=value"),
        ("=5", "no key=value"),
        ("name.inner=5", "'name' holds a value"),
        ("train.rounds=[", "not valid YAML"),
        ("bootstrap.samples=100", "greater than or equal to 1000"),
        ("data.source=cinc2015", "needs the section 'cinc2015'"),
    ],
)
def test_a_wrong_override_is_told(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_simulation(SMOKE, [override])
    shown = str(caught.value).replace("did you mean 'rounds'", "did you mean 'train.rounds'")
    shown = shown.replace("did you mean 'hospital_patients'", "did you mean 'data.builtin.hospital_patients'")
    assert told in shown


def test_an_unknown_key_in_the_file_names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(SMOKE.read_text(encoding="utf-8") + "\nboostrap: {samples: 2000}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"wrong\.yaml.*'boostrap', did you mean 'bootstrap'"):
        load_simulation(path)


def test_a_folder_is_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "study.yaml"
    path.write_text("name: study\ndata: {source: eegmat, eegmat: {folder: ../recordings}}\n", encoding="utf-8")
    data = load_simulation(path).data
    assert data.eegmat is not None
    assert data.eegmat.folder == tmp_path / "recordings"


def test_the_job_has_every_section_of_the_configuration() -> None:
    config = load_simulation(SMOKE, ["strategy.name=FedYogi", "alignment.loss=mse", "evaluate.every=2", "seed=9"])
    job = config.job(Models(old_encoder="a", new_encoder="b", task_head="c"))
    shared = set(Job.model_fields) & set(SimulationConfig.model_fields) - {"schema_"}
    assert shared >= {"selection", "bridge", "alignment", "train", "strategy", "sites", "evaluate", "privacy", "seed"}
    for name in shared:
        assert getattr(job, name) == getattr(config, name), name
    assert parse_job(job_text(job)) == job


def test_a_configuration_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump([1, 2]), encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no keys"):
        load_simulation(path)


def keys(value: Any, path: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {path}
    return {found for key, inner in value.items() for found in keys(inner, f"{path}.{key}" if path else str(key))}


REAL_SETS = ("data.cinc2015", "data.eegmat", "data.isruc", "data.fog", "data.wesad")


def test_the_demo_explains_every_key_there_is() -> None:
    path = ROOT / "configs" / "demo.yaml"
    everything = keys(yaml.safe_load(load_simulation(path).text()))
    # The real sets' sections stand in their own files, a site's name is its own, and the new encoder's keys are those
    # of the old one, explained once.
    elsewhere = (*REAL_SETS, "policy.site", "encoders.new.")
    missing = {key for key in everything - keys(yaml.safe_load(path.read_text())) if not key.startswith(elsewhere)}
    assert missing == set()

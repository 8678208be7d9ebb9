"""Prepared studies: real site folders, a job that fits them, all or nothing."""

from __future__ import annotations

import csv
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.errors import FedbridgeError
from bridge.job import parse_job
from client.policy import Policy, load_policy
from client.site import open_site
from client.windowing import windows_of
from server.errors import RunFolderError
from server.report.windows import read_example_windows
from simulations.config import SimulationConfig
from simulations.hospital_files import policy_text
from simulations.prepare import flwr_command, prepare, read_config, read_job, site_folders
from tests.simulations.studies import tiny


def test_sites_are_whole_hospitals_and_nobody_is_in_two_places(prepared: Path) -> None:
    folders = site_folders(prepared)
    assert [folder.name for folder in folders] == ["site-0", "site-1"]
    seen: list[str] = []
    for number, folder in enumerate(folders):
        site = open_site(folder)
        assert site.name == f"hospital-{number + 1}"
        splits = site.file.splits
        patients = [*splits.pair, *splits.validation, *splits.test]  # type: ignore[misc]
        recordings = sorted(path.stem for path in (folder / "recordings").iterdir())
        assert recordings == sorted(patients)
        with (folder / "labels.csv").open() as file:
            assert {row["recording"] for row in csv.DictReader(file)} == set(patients)
        seen += patients
    assert len(seen) == len(set(seen)) == 14
    assert all(name.startswith("hospital-") for name in seen)  # no public patient


def test_a_site_walks_through_the_hospitals_own_door(prepared: Path) -> None:
    site = open_site(prepared / "sites" / "site-0")
    assert site.head_card.classes == ("rest", "stress", "arrhythmia")
    windows = windows_of(site, "pair")
    assert windows.old is not None
    assert windows.new is not None
    assert windows.old.shape[1:] == (1, 500)  # 10 s at 50 Hz, as smoke.yaml asks
    assert windows.new.shape[1:] == (1, 320)
    assert set(windows.table.patients) <= set(site.file.splits.pair)  # type: ignore[arg-type]


def test_recordings_are_links_unless_copies_are_asked_for(prepared: Path, tmp_path: Path) -> None:
    linked = next((prepared / "sites" / "site-0" / "recordings").iterdir())
    assert linked.is_symlink()
    copied = prepare(tiny(), tmp_path / "copied", copy=True) / linked.relative_to(prepared)
    assert not copied.is_symlink()
    assert copied.read_bytes() == linked.read_bytes()


def test_sites_run_the_networks_as_the_configuration_says(tmp_path: Path, session_cache: Path) -> None:
    prepare(tiny("compute={device: auto, memory_gigabytes: 0.5}"), tmp_path / "run")
    for path in site_folders(tmp_path / "run"):
        site = open_site(path)
        assert site.file.compute.device == "auto"
        assert site.compute.memory_bytes == 500_000_000


def test_standalone_sites_reach_for_nothing_outside_their_folder(prepared: Path, tmp_path: Path) -> None:
    folder = prepare(tiny(), tmp_path / "alone", standalone=True)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert not any((folder / name).exists() for name in ("app", "run-config.toml", "federation-config.toml", "run-key"))
    sites = [open_site(path) for path in site_folders(folder)]
    for site in sites:
        places = [site.cache_folder, site.model_folder("old_encoder"), site.studies_folder, site.keys_folder]
        assert all(path.is_relative_to(site.folder) for path in places)
        assert not (site.folder / "models").exists()  # they come with the study
    assert [site.file.deployment.port for site in sites] == [9094, 9095]
    names = [site.name for site in sites]
    assert names == [open_site(path).name for path in site_folders(prepared)]


def test_the_study_of_standalone_sites_asks_what_the_job_asks(prepared: Path, tmp_path: Path) -> None:
    folder = prepare(tiny(), tmp_path / "alone", standalone=True)
    study = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
    assert study.pop("models") == {"folder": "models"}
    assert study.pop("schema") == "fedbridge.study-config/1"
    job = yaml.safe_load((prepared / "job.yaml").read_text(encoding="utf-8"))
    assert study == {key: value for key, value in job.items() if key not in ("schema", "models", "coordinator")}


def test_the_job_names_the_models_that_lie_beside_it(prepared: Path) -> None:
    job = read_job(prepared)
    models = prepared / "models"
    assert job.models.old_encoder == read_card(models / "old_encoder", EncoderCard).digest
    assert job.models.new_encoder == read_card(models / "new_encoder", EncoderCard).digest
    head = read_card(models / "task_head", HeadCard)
    assert job.models.task_head == head.digest
    assert head.old_encoder == job.models.old_encoder
    assert read_config(prepared) == tiny()


def test_the_job_expects_the_sites_that_were_made(prepared: Path) -> None:
    names = tuple(open_site(folder).name for folder in site_folders(prepared))
    assert names == ("hospital-1", "hospital-2")
    assert read_job(prepared).sites.expected == names
    assert read_config(prepared).sites.expected == ()


def test_the_job_expects_whom_the_configuration_names(tmp_path: Path, session_cache: Path) -> None:
    named = prepare(tiny("sites.expected=[hospital-2]", "sites.minimum=1"), tmp_path / "named")
    assert read_job(named).sites.expected == ("hospital-2",)
    weighted = prepare(tiny("sites.weights={hospital-1: 0.5}", "sites.minimum=1"), tmp_path / "weighted")
    assert read_job(weighted).sites.expected == ("hospital-1",)


def test_flowers_two_files_hold_the_job_and_absolute_paths(prepared: Path) -> None:
    values = tomllib.loads((prepared / "run-config.toml").read_text())
    assert parse_job(values["job"]) == read_job(prepared)
    assert {key: values[key] for key in values if key.endswith("-folder")} == {
        "run-folder": str(prepared),
        "models-folder": str(prepared / "models"),
        "simulation-folder": str(prepared / "sites"),
    }
    assert tomllib.loads((prepared / "federation-config.toml").read_text())["num-supernodes"] == 2
    command = flwr_command(prepared)
    assert command.startswith('cd "$(mktemp -d)" && flwr run /')
    assert str(prepared / "run-config.toml") in command


def test_every_policy_is_explained_and_says_what_the_configuration_says(prepared: Path) -> None:
    for folder in site_folders(prepared):
        text = (folder / "policy.yaml").read_text()
        policy = load_policy(folder / "policy.yaml")
        assert policy.model_dump() == tiny().policy.model_dump() | {"site": open_site(folder).name}
        assert "confusion.bridge" in policy.items
        lines = text.splitlines()
        for key in yaml.safe_load(text):
            above = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
            assert key == "privacy" or lines[above - 1].startswith("#"), key


def test_a_policy_of_other_values_reads_back_equal(tmp_path: Path) -> None:
    policy = Policy(
        coordinators=("north",),
        items=("site", "can_take_part", "reason"),
        minimum_patients=17,
        minimum_group=3,
        max_rounds=9,
        max_seconds_per_message=1.5,
        encoders={"old": ("abc",)},  # type: ignore[arg-type]
        privacy={"epsilon_cap": 0.25},  # type: ignore[arg-type]
    )
    path = tmp_path / "policy.yaml"
    path.write_text(policy_text(policy, "north"))
    assert load_policy(path) == policy.model_copy(update={"site": "north"})


def test_example_windows_are_of_made_up_patients_and_of_both_modalities(prepared: Path) -> None:
    shown = read_example_windows(prepared)
    assert {window.role for window in shown} == {"old", "new"}
    assert all("hospital-" not in window.title for window in shown)
    for title in {window.title for window in shown}:
        assert [window.modality for window in shown if window.title == title] == ["ECG", "PPG"]
    assert {len(window.values) for window in shown} == {500, 320}
    assert all(np.std(window.values) > 0 for window in shown)


def test_the_seed_deals_hospitals_anew_but_tests_the_same_patients(prepared: Path, tmp_path: Path) -> None:
    other = prepare(tiny("seed=1"), tmp_path / "other")

    def dealt(folder: Path) -> tuple[list[set[str]], set[str]]:
        splits = [open_site(site).file.splits for site in site_folders(folder)]
        return [set(each.pair) for each in splits], {name for each in splits for name in each.test}  # type: ignore

    assert dealt(prepared)[0] != dealt(other)[0]
    assert dealt(prepared)[1] == dealt(other)[1]
    assert read_job(prepared).models == read_job(other).models  # encoders are the cached ones


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(RunFolderError, match="is not an empty folder"):
        prepare(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("kind", ["below a file", "/proc"])
def test_an_unwritable_place_is_told(kind: str, tmp_path: Path, session_cache: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "study" if kind == "below a file" else Path("/proc/study")
    with pytest.raises(RunFolderError, match="can't be written") as caught:
        prepare(tiny(), out)
    assert caught.value.exit_code == 7
    assert caught.value.fix


def test_what_fails_half_way_leaves_nothing(tmp_path: Path, session_cache: Path) -> None:
    # 5 hospitals of 2 pair patients exist, but no window is long enough for the encoders: it fails after the split.
    config: SimulationConfig = tiny("data.builtin.seconds=30", "data.builtin.losses_per_hour=100000")
    with pytest.raises(FedbridgeError):
        prepare(config, tmp_path / "study")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_used(tmp_path: Path, session_cache: Path) -> None:
    out = tmp_path / "study"
    out.mkdir()
    prepare(tiny(), out)
    assert (out / "job.yaml").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["study"]

"""What stops a run before it begins: the run config, the models, the run folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file, save_file

from bridge.errors import ConfigError, FedbridgeError, WeightsError
from server.app import app
from server.errors import RunFolderError
from server.initialisation import centroids
from server.record import read_record
from tests.server.conftest import Models
from tests.server.wire import WIDTH_OLD, Site, WireGrid, run_server

NAMES = ("alpha", "beta")
SITES = {"minimum": 2, "wait_seconds": 5, "timeout_seconds": 5, "retries": 0, "expected": NAMES}


def grid() -> WireGrid:
    return WireGrid([Site(name) for name in NAMES])


def job(models: Models, **changes: Any) -> str:
    return models.job(**{"sites": SITES, "train": {"rounds": 2}, **changes})


def test_a_folder_with_a_run_is_refused(models: Models, tmp_path: Path) -> None:
    run_server(grid(), tmp_path, models.folder, job(models))
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(RunFolderError, match="already holds a run") as caught:
        run_server(grid(), tmp_path, models.folder, job(models))
    assert "status completed" in caught.value.why
    assert caught.value.exit_code == 7
    assert (tmp_path / "run.json").read_bytes() == before


def test_what_a_simulation_writes_beforehand_is_welcome(models: Models, tmp_path: Path) -> None:
    for name in ("sites/site-0", "models"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "job.yaml").write_text("name: x")
    run_server(grid(), tmp_path, models.folder, job(models))
    assert read_record(tmp_path).status == "completed"


def test_an_unwritable_folder_is_refused_before_any_site_is_asked(models: Models, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    idle = grid()
    for folder in (tmp_path / "file" / "run", Path("/proc/fedbridge-run")):
        with pytest.raises(RunFolderError, match="can't be written"):
            run_server(idle, folder, models.folder, job(models))
    assert all(site.seen == [] for site in idle.sites.values())


def test_a_folder_in_which_another_process_runs_is_refused(models: Models, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(RunFolderError, match="another process runs here"):
        run_server(grid(), tmp_path, models.folder, job(models))


def test_a_job_with_an_unknown_key_names_the_closest(models: Models, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'train\.local_step', did you mean 'local_steps'\?"):
        run_server(grid(), tmp_path / "run", models.folder, job(models, train={"local_step": 3}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"run-folder": "relative/run"}, "'run-folder' is 'relative/run'"),
        ({"models-folder": ""}, "'models-folder' is ''"),
        ({"engine": "ray"}, "engine 'ray'"),
        ({"resume": "yes"}, "resume 'yes'"),
        ({"job": ""}, "holds no keys"),
        ({"job": "a: [1"}, "is not valid YAML"),
    ],
)
def test_a_run_config_that_cannot_be_used_is_refused(
    models: Models, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    good = {"job": job(models), "run-folder": str(tmp_path / "run"), "models-folder": str(models.folder)}
    run_config = {**good, "engine": "local", "resume": False, **change}
    with pytest.raises(ConfigError) as caught:
        app(grid(), Context(7, 1, {}, RecordDict(), run_config))
    assert text in caught.value.what


def copied(models: Models, folder: Path) -> Path:
    shutil.copytree(models.folder, folder)
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_other_or_damaged_models_are_refused(models: Models, tmp_path: Path) -> None:
    other = job(Models(models.folder, {**models.digests, "new_encoder": "0" * 64}))
    with pytest.raises(WeightsError, match="not the model of the job"):
        run_server(grid(), tmp_path / "run", models.folder, other)
    damaged = copied(models, tmp_path / "damaged")
    flip(damaged / "old_encoder" / "weights.safetensors")
    with pytest.raises(WeightsError, match="not the weights that the card describes"):
        run_server(grid(), tmp_path / "run", damaged, job(models))
    missing = copied(models, tmp_path / "missing")
    shutil.rmtree(missing / "task_head")
    with pytest.raises(WeightsError, match="no complete model folder"):
        run_server(grid(), tmp_path / "run", missing, job(models))
    assert not (tmp_path / "run").exists()


PUBLIC = {"rank": 2, "prototypes": 4, "initialisation": "public"}


def test_public_prototypes_are_the_centroids_of_public_vectors(models: Models, tmp_path: Path) -> None:
    run_server(grid(), tmp_path, models.folder, job(models, bridge=PUBLIC))
    start = load_file(tmp_path / "checkpoints" / "round-000000.safetensors")["arrays/P"]
    vectors = load_file(models.folder / "public_vectors.safetensors")["in.2"].astype(np.float64)
    nearest = ((vectors[:, None] - start[None].astype(np.float64)) ** 2).sum(-1).argmin(1)
    assert start.shape == (4, WIDTH_OLD)
    for i in range(4):
        np.testing.assert_allclose(start[i], vectors[nearest == i].mean(axis=0), atol=1e-5)
    np.testing.assert_array_equal(centroids(vectors, 4, 3), centroids(vectors, 4, 3))


@pytest.mark.parametrize("trouble", ["missing", "too few", "other width", "other position", "damaged"])
def test_public_vectors_that_do_not_fit_are_refused(models: Models, tmp_path: Path, trouble: str) -> None:
    folder = copied(models, tmp_path / "models")
    path = folder / "public_vectors.safetensors"
    path.unlink()
    vectors = np.zeros((3 if trouble == "too few" else 40, 5 if trouble == "other width" else WIDTH_OLD), np.float32)
    if trouble == "damaged":
        path.write_bytes(b"no safetensors")
    elif trouble != "missing":
        save_file({"in.0" if trouble == "other position" else "in.2": vectors}, path)
    with pytest.raises(WeightsError, match=r"public_vectors\.safetensors"):
        run_server(grid(), tmp_path / "run", folder, job(models, bridge=PUBLIC))
    record = read_record(tmp_path / "run")
    assert record.status == "failed"
    assert record.error is not None
    assert "What to do" in record.error


def test_an_unforeseen_error_is_written_down_and_raised(models: Models, tmp_path: Path) -> None:
    broken = grid()

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("the network is gone")

    broken.send_and_receive = fail  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        run_server(broken, tmp_path, models.folder, job(models))
    record = read_record(tmp_path)
    assert (record.status, record.error) == ("failed", "the network is gone")
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["error"] == "the network is gone"


def test_errors_have_three_parts(models: Models, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(FedbridgeError) as caught:
        run_server(grid(), tmp_path / "file" / "run", models.folder, job(models))
    assert caught.value.what
    assert caught.value.why
    assert caught.value.fix


def test_importing_the_app_loads_nothing_heavy() -> None:
    code = "import server.app, sys; print([m for m in ('torch', 'sklearn', 'scipy', 'pydantic') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

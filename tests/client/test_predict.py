from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from bridge.chain import export_chain
from bridge.errors import ExportError
from client.errors import ModelsDifferError
from client.predict import predict_site, write_predictions
from client.site import open_site
from client.site_file import Split
from tests.client.sites import (
    CLASSES,
    RATES,
    Small,
    ask,
    bridge_shape,
    build_job,
    build_models,
    start_arrays,
    train_config,
)

Exported = tuple[Path, dict[str, NDArray[np.float32]]]


@pytest.fixture(scope="module")
def exported(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bridge after three rounds, and its folder."""
    job, bridge = build_job(small.models, train={"local_steps": 20}), start_arrays()
    for round_ in (1, 2, 3):
        content = ask(small.site, job, "train", train_config(round_), bridge).content["arrays"]
        bridge = {name: value + content[f"update.{name}"].numpy() for name, value in bridge.items()}
    folder = tmp_path_factory.mktemp("bridge") / "bridge"
    export_chain(
        folder,
        models=small.models,
        bridge=bridge,
        shape=bridge_shape(),
        positions=(2, 1),
        job_name="small",
        kept_round=3,
    )
    return folder, bridge


def new_only(small: Small, folder: Path) -> Path:
    """The same recordings without their old modality, in a site that knows nothing of it."""
    recordings = folder / "recordings"
    recordings.mkdir(parents=True)
    for path in (small.site / "recordings").glob("*.npz"):
        with np.load(path) as file:
            np.savez(recordings / path.name, subject=file["subject"], PPG=file["PPG"])
    file_ = yaml.safe_load((small.site / "site.yaml").read_text())
    del file_["old"], file_["labels"], file_["policy"]
    file_["reader"]["options"] = {
        "subject": "subject",
        "signals": {"PPG": {"array": "PPG", "rate": RATES["PPG"], "channels": ["P"]}},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(file_))
    return folder


def test_a_fresh_process_gives_the_predictions_of_the_evaluation_from_the_new_modality_alone(
    small: Small, exported: Exported, tmp_path: Path
) -> None:
    folder, bridge = exported
    out = tmp_path / "predictions.csv"
    site = new_only(small, tmp_path / "s")
    command = [
        Path(sys.executable).with_name("fedbridge-site"),
        "predict",
        folder,
        site,
        "--out",
        out,
        "--split",
        "test",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("patient", "recording", "start_seconds", "prediction", "probability_slow", "probability_fast")
    ]
    truth, guess = [], []
    for row in rows:
        with np.load(small.site / "recordings" / f"{row['recording']}.npz") as recording:
            truth.append(int(recording["label"][int(float(row["start_seconds"]))]))
        guess.append(CLASSES.index(row["prediction"]))
        probabilities = [float(row[f"probability_{name}"]) for name in CLASSES]
        assert sum(probabilities) == pytest.approx(1, abs=2e-6)
        assert int(np.argmax(probabilities)) == guess[-1]
    config = {**train_config(3), "split": "test"}
    content = ask(small.site, build_job(small.models), "evaluate", config, bridge).content["arrays"]
    evaluated = content["confusion.bridge"].numpy()
    np.testing.assert_array_equal(confusion_matrix(truth, guess, labels=[0, 1]), evaluated)
    assert evaluated.trace() > 45


def test_all_patients_or_those_of_a_split(small: Small, exported: Exported, tmp_path: Path) -> None:
    site = open_site(new_only(small, tmp_path / "s"))
    splits: tuple[Split | None, ...] = (None, "pair", "validation", "test")
    assert [len(predict_site(exported[0], site, split)[0].table) for split in splits] == [240, 120, 60, 60]


def test_a_damaged_bridge_is_named(small: Small, exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "bridge"
    shutil.copytree(exported[0], folder)
    file = folder / "bridge.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ExportError, match=r"bridge\.safetensors"):
        predict_site(folder, open_site(small.site), None)


def test_a_bridge_of_another_new_encoder(small: Small, exported: Exported, tmp_path: Path) -> None:
    models = build_models(tmp_path / "models", seed=5)
    site = new_only(small, tmp_path / "s")
    file = yaml.safe_load((site / "site.yaml").read_text())
    file["models"]["new_encoder"] = str(models / "new_encoder")
    (site / "site.yaml").write_text(yaml.safe_dump(file))
    with pytest.raises(ModelsDifferError, match="is not the bridge's"):
        predict_site(exported[0], open_site(site), None)


def test_predictions_that_cannot_be_written(small: Small, exported: Exported, tmp_path: Path) -> None:
    windows, probabilities, manifest = predict_site(exported[0], open_site(small.site), "test")
    with pytest.raises(ExportError, match="can't be written"):
        write_predictions(tmp_path / "none" / "p.csv", windows, probabilities, manifest.classes)
    assert list(tmp_path.iterdir()) == []

"""Models made from public windows: complete, repeatable, cached by content."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bridge.encoders.contract import check_encoder
from bridge.encoders.loading import load_encoder, read_encoder_card
from bridge.errors import SelectionError
from bridge.head import load_head, read_head_card
from bridge.windows import Modality, Preprocessing, WindowSpec
from simulations.errors import CohortError
from simulations.models.compact import train_models
from simulations.models.config import EncodersConfig
from simulations.models.places import is_complete
from simulations.models.windows import PublicWindows, spread_rows

SMALL = {"width": 16, "blocks": 2, "heads": 2, "tokens": 10}
CONFIG = EncodersConfig.model_validate(
    {
        "public_vectors": 12,
        "old": {"architecture": SMALL, "pretrain": {"steps": 4, "batch": 8}, "supervised": {"steps": 6, "batch": 8}},
        "new": {"architecture": SMALL, "pretrain": {"steps": 4, "batch": 8}},
    }
)
CLASSES = ("slow", "fast")


def public(modality: Modality, seed: int, labelled: bool) -> PublicWindows:
    rng = np.random.default_rng(seed)
    return PublicWindows(
        x=rng.standard_normal((48, 1, 100)).astype(np.float32),
        patients=np.array([f"p{i % 8}" for i in range(48)]),
        labels=np.arange(48) % 3 - 1 if labelled else np.full(48, -1),
        spec=WindowSpec(modality=modality, channels=(modality,), rate_hz=25, samples=100),
        preprocessing=Preprocessing(bandpass_hz=(0.5, 8.0)),
    )


@dataclass
class Made:
    cache: Path
    folder: Path
    progress: list[tuple[str, int, int]]


OLD, NEW = public("ECG", 0, True), public("PPG", 1, False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A models folder, trained once for this module with a cache of its own."""
    cache, seen = tmp_path_factory.mktemp("cache"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDBRIDGE_CACHE", str(cache))
        out = tmp_path_factory.mktemp("out") / "models"
        train_models(OLD, NEW, CLASSES, CONFIG, out, data="noise", progress=lambda *each: seen.append(each))
        yield Made(cache, out, seen)


def digests(folder: Path) -> list[str]:
    cards = [read_encoder_card(folder / name).digest for name in ("old_encoder", "new_encoder")]
    return [*cards, read_head_card(folder / "task_head").digest]


def test_a_models_folder_is_whole(made: Made) -> None:
    assert {path.name for path in made.folder.iterdir()} == {
        *("old_encoder", "new_encoder", "task_head"),
        "public_vectors.safetensors",
    }
    assert is_complete(made.folder)
    for name in ("old_encoder", "new_encoder"):
        check_encoder(load_encoder(made.folder / name))
    card = read_encoder_card(made.folder / "new_encoder")
    assert (card.window.modality, card.preprocessing, card.training["data"]) == ("PPG", NEW.preprocessing, "noise")
    assert (card.training["public_patients"], card.training["windows"]) == (8, 48)
    head = read_head_card(made.folder / "task_head")
    assert (head.classes, head.old_encoder) == (CLASSES, digests(made.folder)[0])
    assert ("new encoder: masked pretraining", 4, 4) in made.progress
    assert ("old encoder: teacher", 6, 6) in made.progress


def test_the_head_fits_and_public_vectors_are_centroids_of_its_tokens(made: Made) -> None:
    encoder, head = load_encoder(made.folder / "old_encoder"), load_head(made.folder / "task_head")
    taps = encoder.taps(torch.from_numpy(OLD.x), lambda h: h)
    assert head(taps.tokens.mean(1)).shape == (48, 2)
    vectors = load_file(made.folder / "public_vectors.safetensors")
    public_keys = {f"{kind}.{position}" for kind in ("in", "tokens", "mean", "covariance") for position in range(2)}
    assert set(vectors) == public_keys
    for position in range(2):
        tokens = taps.inputs[position].flatten(0, 1).numpy()
        centroids = vectors[f"in.{position}"]
        assert centroids.shape == (12, 16)
        assert (centroids.min(0) >= tokens.min(0) - 1e-5).all()
        assert (centroids.max(0) <= tokens.max(0) + 1e-5).all()
        nearest = np.linalg.norm(tokens[:, None] - centroids[None], axis=-1).min(1)
        assert nearest.mean() < 0.8 * np.linalg.norm(tokens - tokens.mean(0), axis=-1).mean()


def test_public_tokens_are_those_of_whole_windows_of_all_patients(made: Made) -> None:
    inputs = load_encoder(made.folder / "old_encoder").taps(torch.from_numpy(OLD.x), lambda h: h).inputs
    vectors = load_file(made.folder / "public_vectors.safetensors")
    for position in range(2):
        # All 48 windows: fewer than are kept at most.
        np.testing.assert_allclose(vectors[f"tokens.{position}"], inputs[position].detach().numpy(), atol=1e-5)


def test_public_moments_are_those_of_the_new_encoders_outputs(made: Made) -> None:
    outputs = load_encoder(made.folder / "new_encoder").taps(torch.from_numpy(NEW.x)).outputs
    vectors = load_file(made.folder / "public_vectors.safetensors")
    for position in range(2):
        # The patients have equally many windows, so weighing each the same changes nothing.
        h = outputs[position].detach().double().numpy()
        np.testing.assert_allclose(vectors[f"mean.{position}"], h.mean(0), atol=1e-5)
        np.testing.assert_allclose(vectors[f"covariance.{position}"], np.cov(h.T, ddof=0), atol=1e-5)


def test_spread_rows_take_one_window_of_each_patient_before_a_second_of_any() -> None:
    patients = np.repeat(["a", "b", "c"], [1, 5, 40])
    for count, expected in (
        (3, {"a": 1, "b": 1, "c": 1}),
        (8, {"a": 1, "b": 4, "c": 3}),
        (99, {"a": 1, "b": 5, "c": 40}),
    ):
        rows = spread_rows(patients, count)
        assert Counter(patients[rows].tolist()) == expected
        assert (np.diff(rows) > 0).all()


def test_a_second_run_takes_all_from_the_cache(made: Made, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    again = train_models(
        OLD, NEW, CLASSES, CONFIG, tmp_path / "again", data="noise", progress=lambda *each: seen.append(each)
    )
    assert seen == []
    assert digests(again) == digests(made.folder)
    assert not [path for path in (made.cache / "models").iterdir() if path.name.startswith(".")]


def test_a_damaged_entry_is_made_again_with_the_same_bytes(made: Made, tmp_path: Path) -> None:
    (entry,) = (made.cache / "models").iterdir()
    weights = entry / "new_encoder" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not is_complete(entry)
    again = train_models(OLD, NEW, CLASSES, CONFIG, tmp_path / "again", data="noise")
    assert digests(again) == digests(made.folder)
    vectors = [load_file(folder / "public_vectors.safetensors") for folder in (again, made.folder)]
    assert all(np.array_equal(vectors[0][key], vectors[1][key]) for key in vectors[0])


def test_labels_reach_the_old_encoder_alone(made: Made, tmp_path: Path) -> None:
    labels = np.where(OLD.labels >= 0, 1 - OLD.labels, -1)
    new = dataclasses.replace(NEW, labels=np.zeros(48, np.int64))
    other = train_models(
        dataclasses.replace(OLD, labels=labels), new, CLASSES, CONFIG, tmp_path / "other", data="noise"
    )
    assert digests(other)[0] != digests(made.folder)[0]
    assert digests(other)[1] == digests(made.folder)[1]


def test_a_missing_class_is_told_from_the_training_process(made: Made, tmp_path: Path) -> None:
    old = dataclasses.replace(OLD, labels=np.zeros(48, np.int64))
    before = sorted((made.cache / "models").iterdir())
    with pytest.raises(SelectionError, match="lack a class"):
        train_models(old, NEW, CLASSES, CONFIG, tmp_path / "models")
    assert not (tmp_path / "models").exists()
    assert sorted((made.cache / "models").iterdir()) == before


def test_an_unwritable_cache_is_told(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDBRIDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CohortError, match="the models can't be written"):
        train_models(OLD, NEW, CLASSES, CONFIG, tmp_path / "models")

"""The inference chain and its exported folder: whole, verified, and the same in a fresh process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge.chain import BATCH, MANIFEST, MODELS, InferenceChain, Manifest, export_chain, load_chain, read_manifest
from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.encoders.protocol import mean_over_tokens
from bridge.errors import ExitCode, ExportError, PositionError, WeightsError, WindowError
from bridge.hashing import sha256_file
from bridge.head import TaskHead, load_head, save_head
from bridge.prototype import PrototypeBridge
from bridge.shape import BridgeShape
from bridge.windows import Preprocessing, WindowSpec
from tests.conftest import ROOT

M, L = 1, 2
SHAPE = BridgeShape(width_new=16, rank=3, tokens_old=10, prototypes=5, width_old=24)


@dataclass
class Made:
    models: Path
    arrays: dict[str, np.ndarray]
    windows: np.ndarray


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    models = tmp_path_factory.mktemp("models")
    old = CompactEncoder(
        WindowSpec(modality="ECG", channels=("II",), rate_hz=50, samples=100),
        CompactArchitecture(width=24, blocks=3, heads=2, tokens=10),
    )
    new = CompactEncoder(
        WindowSpec(modality="PPG", channels=("PLETH",), rate_hz=40, samples=80),
        CompactArchitecture(width=16, blocks=2, heads=2, tokens=8),
    )
    digest = save_encoder(models / "old_encoder", old.state_dict(), old.card(Preprocessing(scale=2.0), {})).digest
    save_encoder(
        models / "new_encoder", new.state_dict(), new.card(Preprocessing(normalise="segment"), {"data": "made"})
    )
    head = TaskHead(24, 3)
    torch.nn.init.normal_(head.linear.weight, std=3.0)
    save_head(models / "task_head", head, classes=("slow", "usual", "fast"), old_encoder=digest, training={})
    (models / "public_vectors.safetensors").write_bytes(b"not part of an export")
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPE.arrays().items()}
    windows = (
        rng.normal(size=(2 * BATCH + 13, 1, 80)).astype(np.float32)
        * np.geomspace(0.1, 30, 2 * BATCH + 13)[:, None, None]
    )
    return Made(models, arrays, windows.astype(np.float32))


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    export(made, tmp_path / "bridge")
    return tmp_path / "bridge"


def export(made: Made, folder: Path, **changes: object) -> Manifest:
    arguments = {
        "models": made.models,
        "bridge": made.arrays,
        "shape": SHAPE,
        "positions": (M, L),
        "job_name": "study",
        "kept_round": 7,
    }
    return export_chain(folder, **(arguments | changes))


def test_the_chain_is_the_product_of_its_parts(made: Made, folder: Path) -> None:
    chain = load_chain(folder)
    old, new = load_encoder(made.models / "old_encoder"), load_encoder(made.models / "new_encoder")
    head = load_head(made.models / "task_head")
    logits, tokens = [], []
    for window in torch.from_numpy(made.windows):
        h = new.prefix(window[None], M)[0].mean(dim=0)
        mixing = (h @ torch.from_numpy(made.arrays["A"]) @ torch.from_numpy(made.arrays["B"])).view(10, 5)
        tokens.append(old.suffix((mixing @ torch.from_numpy(made.arrays["P"]))[None], L)[0])
        logits.append(head.linear.weight @ tokens[-1].mean(dim=0) + head.linear.bias)
    torch.testing.assert_close(chain.tokens(made.windows), torch.stack(tokens).detach(), rtol=1e-3, atol=1e-3)
    expected = torch.stack(logits).detach()
    torch.testing.assert_close(chain.logits(made.windows), expected, rtol=1e-3, atol=1e-3)
    clear = (expected.topk(2).values @ torch.tensor([1.0, -1.0])) > 1e-2
    predicted = chain.predict(made.windows)
    np.testing.assert_array_equal(predicted[clear.numpy()], expected.argmax(dim=1)[clear].numpy())
    assert predicted.dtype == np.int64
    assert clear.sum() > 100
    assert len(set(predicted)) > 1


def test_evaluation_from_cached_features_gives_the_same_bits(made: Made, folder: Path) -> None:
    torch.set_num_threads(1)
    chain = load_chain(folder)
    encoder = load_encoder(made.models / "new_encoder")
    with torch.no_grad():
        pooled = [mean_over_tokens(encoder.prefix(part, M)) for part in torch.from_numpy(made.windows).split(BATCH)]
    cached = torch.cat(pooled).numpy()
    cached.flags.writeable = False
    assert torch.equal(chain.logits_from_features(cached), chain.logits(torch.from_numpy(made.windows)))


def test_no_windows_have_no_predictions(made: Made, folder: Path) -> None:
    chain = load_chain(folder)
    assert chain.predict(made.windows[:0]).shape == (0,)
    assert chain.logits(made.windows[:0]).shape == (0, 3)


def test_other_windows_are_refused(folder: Path) -> None:
    with pytest.raises(WindowError, match="do not fit the encoder"):
        load_chain(folder).predict(np.zeros((2, 1, 81), np.float32))


def test_the_folder_is_complete_and_hashed(made: Made, folder: Path) -> None:
    manifest = read_manifest(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"manifest.json", "bridge.safetensors"} | {
        f"{model}/{name}" for model in MODELS for name in ("card.json", "weights.safetensors")
    }
    assert manifest.files == {name: sha256_file(folder / name) for name in files - {"manifest.json"}}
    written = json.loads((folder / MANIFEST).read_text())
    assert written["schema"] == "fedbridge.bridge/1"
    assert (manifest.job, manifest.kept_round, manifest.input_position, manifest.output_position) == ("study", 7, M, L)
    assert written["shapes"] == {"A": [16, 3], "B": [3, 50], "P": [5, 24]}
    assert manifest.parameters == 16 * 3 + 3 * 10 * 5 + 5 * 24
    assert manifest.classes == ("slow", "usual", "fast")
    assert (manifest.new_window.modality, manifest.old_window.modality) == ("PPG", "ECG")
    assert (manifest.new_preprocessing.normalise, manifest.old_preprocessing.scale) == ("segment", 2.0)
    assert manifest.models.new_encoder == load_encoder(folder / "new_encoder").digest
    assert list(folder.parent.iterdir()) == [folder], "nothing half-written is left"


_LOAD = """
import sys, numpy as np
from pathlib import Path
from bridge.chain import load_chain
import torch; torch.set_num_threads(1)
chain = load_chain(Path(sys.argv[1]))
windows = np.load(sys.argv[2])
np.savez(sys.argv[3], predictions=chain.predict(windows), logits=chain.logits(windows).numpy())
assert "flwr" not in sys.modules
"""


def test_a_fresh_process_predicts_the_same_from_the_folder_alone(made: Made, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    models = tmp_path / "models"
    shutil.copytree(made.models, models)
    export(made, tmp_path / "bridge", models=models)
    chain = load_chain(tmp_path / "bridge")
    logits, predictions = chain.logits(made.windows).numpy(), chain.predict(made.windows)
    shutil.rmtree(models)
    moved = tmp_path / "elsewhere"
    (tmp_path / "bridge").rename(moved)
    np.save(tmp_path / "windows.npy", made.windows)
    command = [sys.executable, "-c", _LOAD, str(moved), str(tmp_path / "windows.npy"), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_array_equal(out["predictions"], predictions)
        np.testing.assert_array_equal(out["logits"], logits)


FILES = [
    "bridge.safetensors",
    *(f"{model}/{name}" for model in MODELS for name in ("card.json", "weights.safetensors")),
]


def damaged(folder: Path, name: str) -> ExportError:
    with pytest.raises(ExportError) as caught:
        load_chain(folder)
    assert str(folder / name) in caught.value.what
    assert caught.value.exit_code == ExitCode.STORAGE
    return caught.value


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert "can't be read" in str(damaged(folder, name))


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_truncated_file_is_named(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    damaged(folder, name)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_is_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(content))
    assert "sha256" in damaged(folder, name).why


def test_a_changed_manifest_is_refused(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    for old, new in (('"input_position": 1', '"input_position": 0'), ('"slow"', '"fast"'), ("bridge/1", "bridge/2")):
        assert old in text
        (folder / MANIFEST).write_text(text.replace(old, new))
        damaged(folder, MANIFEST)


def test_files_of_another_export_are_named(made: Made, folder: Path, tmp_path: Path) -> None:
    other = {name: array + 1 for name, array in made.arrays.items()}
    export(made, tmp_path / "other", bridge=other)
    shutil.copy(tmp_path / "other" / "bridge.safetensors", folder / "bridge.safetensors")
    damaged(folder, "bridge.safetensors")


def test_an_export_replaces_the_one_before(made: Made, folder: Path) -> None:
    (folder / "left-over.txt").write_text("x")
    half = folder.parent / ".bridge.123.partial"
    half.mkdir()
    other = {name: array * -2 for name, array in made.arrays.items()}
    export(made, folder, bridge=other, kept_round=9)
    assert read_manifest(folder).kept_round == 9
    found = load_chain(folder).bridge.arrays()
    for name, array in other.items():
        np.testing.assert_array_equal(found[name], array)
    assert list(folder.parent.iterdir()) == [folder]
    assert not (folder / "left-over.txt").exists()


def test_an_export_that_fails_leaves_the_one_before(made: Made, folder: Path) -> None:
    models = folder.parent / "models"
    shutil.copytree(made.models, models)
    (models / "task_head" / "notes.txt").symlink_to(folder.parent / "nowhere")
    with pytest.raises(ExportError, match="can't be exported"):
        export(made, folder, models=models, kept_round=9)
    assert read_manifest(folder).kept_round == 7
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bridge", "models"]


def test_an_export_to_no_folder_is_an_error(made: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="can't be exported"):
        export(made, tmp_path / "file" / "bridge")


def test_parts_that_do_not_fit_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(PositionError):
        export(made, tmp_path / "x", positions=(2, 2))
    with pytest.raises(WeightsError, match="parameter A"):
        export(made, tmp_path / "x", bridge=made.arrays | {"A": made.arrays["A"][1:]})
    with pytest.raises(WeightsError, match="no complete model folder"):
        export(made, tmp_path / "x", models=tmp_path)
    assert not (tmp_path / "x").exists()
    old, new = load_encoder(made.models / "old_encoder"), load_encoder(made.models / "new_encoder")
    head = load_head(made.models / "task_head")
    with pytest.raises(PositionError):
        InferenceChain(new, PrototypeBridge(SHAPE), old, head, 0, 3)
    with pytest.raises(WeightsError, match="the bridge does not fit between positions 0 and 2"):
        InferenceChain(new, PrototypeBridge(BridgeShape(16, 3, 9, 5, 24)), old, head, 0, 2)

"""Made-up checkpoints have exactly the published files' entries, and convert like them."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.encoders.checkpoint_file import Inert, read_checkpoint
from bridge.encoders.convert import Conversion, convert, window_for
from bridge.encoders.loading import load_encoder
from bridge.encoders.published import MODELS, published_model
from bridge.errors import ConfigError, WeightsError
from simulations.errors import UnwritableError
from simulations.made_up.checkpoint_keys import SIZES, published_keys
from simulations.made_up.checkpoints import file_content, filled_state, write_checkpoint
from simulations.parity.fill import checkpoint_sha256

FIXTURES = {
    ("labram", "base"): "labram-base",
    ("papagei", "base"): "papagei-s",
    ("normwear", "base"): "normwear",
    ("ecg-fm", "base"): "ecgfm",
    **{("hubert-ecg", size): f"hubertecg-{size}" for size in ("small", "base", "large")},
    **{(m.name, "tiny"): f"{m.name.replace('-', '')}-tiny" for m in MODELS},
}
TINY: dict[str, dict[str, Any]] = {
    "labram": {"channels": ("F3", "C3"), "seconds": 2},
    "hubert-ecg": {"seconds": 5},
    "papagei": {"seconds": 4},
    "normwear": {"channels": ("A", "B"), "seconds": 1},
    "ecg-fm": {"seconds": 1},
}
HEADS = {"hubert-ecg", "normwear", "ecg-fm"}


def test_there_is_a_file_of_every_model_and_size() -> None:
    for model in MODELS:
        assert SIZES[model.name].keys() == {*model.parameters, "tiny"}
    assert set(FIXTURES) == {(model, size) for model, sizes in SIZES.items() for size in sizes}


@pytest.mark.parametrize(("model", "size"), FIXTURES)
def test_names_and_shapes_are_the_published_ones(oracle: Path, model: str, size: str) -> None:
    keys = json.loads((oracle / "keys" / f"{FIXTURES[model, size]}.json").read_text())["keys"]
    assert published_keys(model, size) == {name: tuple(shape) for name, (shape, _) in keys.items()}


@pytest.mark.parametrize("model", TINY)
def test_numbers_are_those_of_the_fixtures(oracle: Path, model: str) -> None:
    case = json.loads((oracle / f"{model.replace('-', '')}_tiny.json").read_text())
    assert checkpoint_sha256(filled_state(model, "tiny", case["seed"])) == case["checkpoint_sha256"]


def test_the_other_number_of_a_name_is_another_seeds() -> None:
    first, second = filled_state("papagei", "tiny"), filled_state("papagei", "tiny", seed=1)
    assert first.keys() == second.keys()
    assert not torch.equal(first["module.dense.weight"], second["module.dense.weight"])
    assert first["module.final_bn.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("older", [False, True])
def test_a_file_is_read_and_converted(tmp_path: Path, model: str, older: bool) -> None:
    path = write_checkpoint(model, tmp_path / "weights" / "official.pt", "tiny", older_names=older)
    assert [each.name for each in path.parent.iterdir()] == ["official.pt"]
    known = published_model(model)
    asked = Conversion(known, window_for(known, **TINY[model]), {"heads": 4} if model in HEADS else {})
    convert(asked, path, tmp_path / "model")
    encoder = load_encoder(tmp_path / "model")
    x = torch.randn(2, len(asked.window.channels), asked.window.samples)
    assert torch.isfinite(encoder.prefix(x, 0)).all()  # type: ignore[arg-type]


def test_wrappers_and_what_lies_beside_are_the_published_ones(tmp_path: Path) -> None:
    wrappers = {"labram": "model", "hubert-ecg": "model_state_dict", "normwear": "model", "ecg-fm": "model"}
    for model in TINY:
        content = read_checkpoint(write_checkpoint(model, tmp_path / model, "tiny")).content
        state = content[wrappers[model]] if model in wrappers else content
        assert state.keys() == published_keys(model, "tiny").keys()
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    assert isinstance(read_checkpoint(tmp_path / "hubert-ecg").content["model_config"], Inert)
    assert isinstance(read_checkpoint(tmp_path / "ecg-fm").content["cfg"], Inert)


def test_older_files_have_the_older_names_of_the_weight_norm() -> None:
    state = filled_state("hubert-ecg", "tiny")
    content = file_content("hubert-ecg", state, older_names=True)
    assert isinstance(content["model_config"], argparse.Namespace)
    today = {name for name in state if "parametrizations" in name}
    before = content["model_state_dict"].keys() - state.keys()
    assert before == {f"encoder.pos_conv_embed.conv.weight_{letter}" for letter in "gv"}
    assert state.keys() - content["model_state_dict"].keys() == today


def test_the_same_arguments_give_the_same_file(tmp_path: Path) -> None:
    files = [write_checkpoint("papagei", tmp_path / name / "w.pt", "tiny", seed=3) for name in "ab"]
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    assert first == second


def test_unknown_models_and_sizes_are_refused(tmp_path: Path) -> None:
    for model, size in (("labram", "large"), ("bert", "base")):
        with pytest.raises(ConfigError, match=f"no {model} of size '{size}'"):
            write_checkpoint(model, tmp_path / "x.pt", size)
    assert not list(tmp_path.iterdir())


def test_a_place_that_can_not_be_written_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnwritableError, match="can't be written") as caught:
        write_checkpoint("papagei", tmp_path / "file" / "w.pt", "tiny")
    assert "file" in caught.value.what
    (tmp_path / "w.pt").mkdir()
    with pytest.raises(UnwritableError, match=r"w\.pt: can't be written"):
        write_checkpoint("papagei", tmp_path / "w.pt", "tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "w.pt"]


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_told_so_and_nothing_is_made(tmp_path: Path, model: str, share: float) -> None:
    whole = write_checkpoint(model, tmp_path / "w.pt", "tiny").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: int(share * len(whole))])
    known = published_model(model)
    with pytest.raises(WeightsError, match="no checkpoint that can be read"):
        convert(Conversion(known, window_for(known, **TINY[model]), {}), tmp_path / "w.pt", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_a_hostile_pickle_in_any_format_has_no_effect(tmp_path: Path, model: str, where: str) -> None:
    victim = tmp_path / "written"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(victim), "w"))

    content = file_content(model, filled_state(model, "tiny"))
    inner = next((value for value in content.values() if isinstance(value, dict)), content)
    (content if where == "beside" else inner)["evil"] = Evil()
    torch.save(content, tmp_path / "w.pt")
    known = published_model(model)
    with pytest.raises(WeightsError, match="nothing of it was run"):
        convert(Conversion(known, window_for(known, **TINY[model]), {}), tmp_path / "w.pt", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]

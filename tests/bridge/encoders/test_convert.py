"""From a published file to a model folder and back: every format, and nothing half-made."""

from __future__ import annotations

import collections
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import client.cli
import simulations.cli
from bridge.console import run_app
from bridge.encoders.cards import EncoderCard
from bridge.encoders.convert import CONVERSION, Conversion, convert, window_for
from bridge.encoders.loading import load_encoder, read_encoder_card
from bridge.encoders.published import MODELS, published_model
from bridge.encoders.recipes import HUBERT_ECG, RECIPES
from bridge.errors import ConfigError, WeightsError, WeightsStorageError, WindowError
from bridge.hashing import sha256_file
from bridge.windows import WindowSpec
from tests.bridge.encoders.oracle import Case, assert_parity, converted

CASES: dict[str, tuple[str, dict[str, Any], dict[str, str | int]]] = {
    "labram": ("labram_tiny", {"channels": ("C3", "CZ", "C4"), "seconds": 2}, {}),
    "hubert-ecg": ("hubertecg_tiny", {"seconds": 5}, {"heads": 4}),
    "ecg-fm": ("ecgfm_tiny", {"seconds": 1}, {"heads": 4}),
    "papagei": ("papagei_tiny", {"seconds": 101 / 125}, {}),
    "normwear": ("normwear_tiny", {}, {"heads": 4}),
}
"""By model: a case with tiny weights, its windows, and the options that tiny weights need."""


@pytest.fixture
def configuration(monkeypatch: pytest.MonkeyPatch) -> object:
    """Pickled beside the weights by some authors, of packages that are not installed here."""
    for module, name in (("hubert_ecg", "HuBERTECGConfig"), ("omegaconf.dictconfig", "DictConfig")):
        for dotted in (module.partition(".")[0], module):
            monkeypatch.setitem(sys.modules, dotted, types.ModuleType(dotted))
        monkeypatch.setattr(sys.modules[module], name, type(name, (), {"__module__": module}), raising=False)
    inner = sys.modules["omegaconf.dictconfig"].DictConfig()
    inner.content = collections.defaultdict(dict, {"lr": {"a": 1}})
    outer = sys.modules["hubert_ecg"].HuBERTECGConfig()
    outer.hidden_size, outer.nested = 999, inner
    return outer


def published_file(path: Path, model: str, state: dict[str, Tensor], configuration: object = None) -> Path:
    """The file as its authors publish it, wrapper and all."""
    contents: dict[str, dict[str, Any]] = {
        "labram": {"model": {**state, "lm_head.weight": torch.zeros(4, 4)}},
        "hubert-ecg": {"model_state_dict": state, "model_config": configuration, "global_step": 3},
        "ecg-fm": {"model": state, "cfg": configuration, "optimizer_history": [{"lr": 0.1}], "args": None},
        "papagei": {**state},
        "normwear": {"model": state, "epoch": 7},
    }
    torch.save(contents[model], path)
    return path


def conversion(model: str, **changes: Any) -> Conversion:
    _, window, options = CASES[model]
    known = published_model(model)
    return Conversion(known, window_for(known, **window), options, **changes)


@pytest.mark.parametrize("model", CASES)
def test_every_published_format_round_trips(oracle: Path, tmp_path: Path, configuration: object, model: str) -> None:
    case = Case(oracle, CASES[model][0])
    file = published_file(tmp_path / "official.pt", model, case.checkpoint(), configuration)
    asked = conversion(model)
    card = convert(asked, file, tmp_path / "models" / "out")

    assert card == read_encoder_card(tmp_path / "models" / "out")
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["out"]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "models" / "out").iterdir())
    encoder = load_encoder(tmp_path / "models" / "out")
    assert (encoder.window, encoder.digest) == (asked.window, card.digest)
    loaded: dict[str, Any] = {"model": case.checkpoint(), "model_state_dict": case.checkpoint()}
    options = dict(asked.options)
    wanted = converted(model, loaded if model != "papagei" else loaded["model"], asked.window, "", **options)
    assert card.parameters == sum(p.numel() for p in wanted.parameters())
    assert isinstance(encoder, torch.nn.Module)
    found, known = encoder.state_dict(), wanted.state_dict()
    assert found.keys() == known.keys()
    assert all(torch.equal(found[name], known[name]) for name in found)

    assert card.preprocessing == RECIPES[model]
    assert card.training["source_sha256"] == sha256_file(file)
    assert card.weights_sha256 == sha256_file(tmp_path / "models" / "out" / "weights.safetensors")
    assert card.training["licence_weights"] == asked.model.licence_weights
    assert card.training["commercial_use"] == asked.model.commercial_use
    facts = json.loads((tmp_path / "models" / "out" / CONVERSION).read_text())
    assert (facts["source"], facts["result_sha256"], facts["digest"]) == (
        "official.pt", card.weights_sha256, card.digest
    )  # fmt: skip


@pytest.mark.parametrize("model", ["labram", "papagei"])
def test_a_converted_model_computes_what_the_original_did(oracle: Path, tmp_path: Path, model: str) -> None:
    case = Case(oracle, CASES[model][0])
    convert(conversion(model), published_file(tmp_path / "f.pt", model, case.checkpoint()), tmp_path / "out")
    encoder = load_encoder(tmp_path / "out")
    assert_parity(case, encoder, case.signal() / (100 if model == "labram" else 1))  # type: ignore[arg-type]


def test_the_same_file_gives_the_same_digest_under_any_name(oracle: Path, tmp_path: Path) -> None:
    state = Case(oracle, "papagei_tiny").checkpoint()
    one = published_file(tmp_path / "one.pt", "papagei", state)
    (tmp_path / "two.pt").write_bytes(one.read_bytes())
    cards = [convert(conversion("papagei"), tmp_path / f"{name}.pt", tmp_path / name) for name in ("one", "two")]
    assert cards[0] == cards[1]
    assert cards[0].digest != convert(conversion("papagei", by_window=True), one, tmp_path / "three").digest


def test_options_and_epochs_are_in_the_card(oracle: Path, tmp_path: Path) -> None:
    state = Case(oracle, "hubertecg_tiny").checkpoint()
    file = published_file(tmp_path / "f.pt", "hubert-ecg", state)
    model = published_model("hubert-ecg")
    window = window_for(model, ("V5",), 3)
    card = convert(Conversion(model, window, {"leads": "repeat", "heads": 4}, by_window=True), file, tmp_path / "out")
    assert card.training["options"] == "leads=repeat, heads=4"
    assert card.architecture["leads"] == "repeat"
    assert card.preprocessing == HUBERT_ECG.by_window()
    assert card.training["commercial_use"] == "forbidden"


def nothing_made(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_differences_are_listed_by_name_and_nothing_is_made(oracle: Path, tmp_path: Path) -> None:
    state = dict(Case(oracle, "papagei_tiny").checkpoint())
    state["module.stray"] = torch.zeros(1)
    state["module.first_block_conv.conv.bias"] = torch.zeros(5)
    del state["module.basicblock_list.2.bn1.weight"]
    file = published_file(tmp_path / "f.pt", "papagei", state)
    with pytest.raises(WeightsError) as caught:
        convert(conversion("papagei"), file, tmp_path / "out")
    assert caught.value.why == (
        "missing: basicblock_list.2.bn1.weight; extra: stray; "
        "of another shape: first_block_conv.conv.bias (5,) instead of (4,)"
    )
    nothing_made(tmp_path, "f.pt")


@pytest.mark.parametrize("model", CASES)
def test_another_models_file_is_refused(oracle: Path, tmp_path: Path, model: str) -> None:
    other = "papagei" if model != "papagei" else "normwear"
    file = published_file(tmp_path / "f.pt", other, Case(oracle, CASES[other][0]).checkpoint())
    with pytest.raises(WeightsError, match=r"are not those of|holds no state dict of"):
        convert(conversion(model), file, tmp_path / "out")
    nothing_made(tmp_path, "f.pt")


def test_nothing_is_overwritten(oracle: Path, tmp_path: Path) -> None:
    file = published_file(tmp_path / "f.pt", "papagei", Case(oracle, "papagei_tiny").checkpoint())
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        convert(conversion("papagei"), file, tmp_path / "out")
    nothing_made(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        convert(conversion("papagei"), file, tmp_path / "link")


def test_a_place_that_can_not_be_written_is_told_so(oracle: Path, tmp_path: Path) -> None:
    file = published_file(tmp_path / "f.pt", "papagei", Case(oracle, "papagei_tiny").checkpoint())
    with pytest.raises(WeightsStorageError, match="can't be written") as caught:
        convert(conversion("papagei"), file, file / "out")
    assert int(caught.value.exit_code) == 7


def test_windows_are_those_of_the_publication_unless_told() -> None:
    found = {model.name: window_for(model) for model in MODELS}
    assert {name: (len(w.channels), w.samples) for name, w in found.items()} == {
        "labram": (6, 6000), "hubert-ecg": (1, 3000), "papagei": (1, 7500), "normwear": (3, 390), "ecg-fm": (1, 15000),
    }  # fmt: skip
    normwear = published_model("normwear")
    assert window_for(normwear, ("a",), 2, 65, "PPG") == WindowSpec(
        modality="PPG", channels=("a",), rate_hz=65, samples=130
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"channels": ("a", "a")}, "can't be told apart"),
        ({"channels": ("a", "")}, "can't be told apart"),
        ({"seconds": 0.001}, "can't be cut"),
        ({"seconds": -1}, "no such windows"),
        ({"modality": "BCG"}, "no such windows"),
    ],
)
def test_windows_that_can_not_be_are_refused(words: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        window_for(published_model("papagei"), **words)


def test_windows_that_do_not_fit_are_refused(oracle: Path, tmp_path: Path) -> None:
    file = published_file(tmp_path / "f.pt", "labram", Case(oracle, "labram_tiny").checkpoint())
    model = published_model("labram")
    with pytest.raises(WindowError, match="does not know the electrodes X1"):
        convert(Conversion(model, window_for(model, ("X1",)), {}), file, tmp_path / "out")
    nothing_made(tmp_path, "f.pt")


def run(app: Any, *words: object) -> int:
    try:
        run_app(app.app, [*map(str, words)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("app", [client.cli, simulations.cli], ids=["site", "sim"])
def test_the_command_of_both(oracle: Path, tmp_path: Path, app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = published_file(tmp_path / "f.pt", "hubert-ecg", Case(oracle, "hubertecg_tiny").checkpoint())
    words = ["weights", "convert", "hubert-ecg", file, "--out", tmp_path / "out", "--seconds", 4, "--channels", "I, II"]
    assert run(app, *words, "--option", "heads=4", "--option", "leads=zero_pad", "--by-window") == 0
    out = capsys.readouterr().out
    card: EncoderCard = read_encoder_card(tmp_path / "out")
    assert (card.window.channels, card.window.samples) == (("I", "II"), 400)
    assert card.architecture["leads"] == "zero_pad"
    assert card.digest in out
    assert "commercial use: forbidden" in out
    assert run(app, *words) == 2
    assert "exists already" in capsys.readouterr().err
    words[5] = tmp_path / "again"
    for options, code, says in (
        ((), 2, "give the option heads"),
        (("--option", "heads"), 2, "no value"),
        (("--option", "heads=4", "--option", "heads=4"), 2, "given twice"),
        (("--option", "heads=four"), 2, "give a whole number"),
        (("--option", "speed=4"), 2, "has no option 'speed'"),
        (("--option", "heads=5"), 4, "must divide"),
    ):
        assert run(app, *words, *options) == code
        assert says in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-50])
    assert run(app, *words, "--option", "heads=4") == 4
    assert "truncated" in capsys.readouterr().err
    words[2] = "bert"
    assert run(app, *words) == 2
    nothing_made(tmp_path, "f.pt", "out")


@pytest.mark.parametrize("app", [client.cli, simulations.cli], ids=["site", "sim"])
def test_the_list(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "weights", "list") == 0
    text = capsys.readouterr().out
    for model in MODELS:
        assert all(word in text for word in (model.title, model.official_file, model.positions))
    assert text.count("FORBIDDEN") == 1
    assert run(app, "weights", "list", "--json") == 0
    facts = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert facts["hubert-ecg"]["commercial_use"] == "forbidden"
    assert facts["hubert-ecg"]["parameters"] == {"small": 30_209_664, "base": 92_798_848, "large": 187_644_736}
    assert facts["labram"]["options"]["electrode_embedding"] == ["on", "off"]


def test_the_list_imports_no_torch() -> None:
    import subprocess

    script = (
        "import sys; from bridge.weights_command import list_command; list_command(json=True); "
        "sys.exit(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)

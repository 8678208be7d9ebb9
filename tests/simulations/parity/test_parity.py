"""`fedbridge-sim weights parity`: what it finds in a folder, what it computes there, and what it says of damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridge.encoders.split import SplitEncoder
from bridge.errors import FedbridgeError
from bridge.windows import WindowSpec
from simulations.cli import main
from simulations.errors import FixtureError
from simulations.parity import fill
from simulations.parity.cases import FoundCase, choose, find_cases
from simulations.parity.compare import error_of, run
from simulations.parity.result import CaseResult, in_words, to_json
from simulations.parity.run import run_case
from tests.bridge.encoders.oracle import Case, converted

TINY = (
    "ecgfm_tiny", "ecgfm_tiny_eps", "hubertecg_tiny", "hubertecg_tiny_eps", "labram_tiny", "labram_tiny_eps",
    "labram_tiny_nopos", "normwear_tiny", "normwear_tiny_387", "normwear_tiny_eps", "papagei_tiny", "papagei_tiny_eps",
)  # fmt: skip

STEPS = (
    "constant_lead", "ecgfm_isruc", "ecgfm_wesad", "hubertecg_isruc", "hubertecg_wesad", "labram_fog", "normwear_fog",
    "normwear_scalogram", "papagei_wesad",
)  # fmt: skip


def case_of(folder: Path, name: str) -> FoundCase:
    return choose(find_cases(folder), [name])[0]


@pytest.fixture
def folder(oracle: Path, tmp_path: Path) -> Path:
    """A folder of one small case, to be damaged."""
    made = tmp_path / "fixtures"
    (made / "keys").mkdir(parents=True)
    for name in ("papagei_tiny.json", "papagei_tiny.npz", "keys/papagei-tiny.json"):
        shutil.copyfile(oracle / name, made / name)
    return made


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    np.savez(path, allow_pickle=True, **arrays)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "papagei_tiny.json") -> None:
    facts = json.loads((folder / name).read_text())
    change(facts)
    (folder / name).write_text(json.dumps(facts))


def test_every_case_of_the_folder_is_found(oracle: Path) -> None:
    found = {case.name: case.kind for case in find_cases(oracle)}
    described = {path.stem for path in oracle.glob("*.json")}
    entries = json.loads((oracle / "preprocessing.json").read_text())
    encoders = described - {"preprocessing", "labram_electrodes"}
    assert {name for name, kind in found.items() if kind == "encoder"} == encoders
    assert {name for name, kind in found.items() if kind == "preprocessing"} == {f"preprocessing/{e}" for e in entries}
    assert "unreadable" not in found.values()
    assert choose(find_cases(oracle), ["preprocessing"]) == [c for c in find_cases(oracle) if c.entry]
    assert [case.name for case in choose(find_cases(oracle), ["labram_fog"])] == ["preprocessing/labram_fog"]
    assert [case.name for case in choose(find_cases(oracle), ["ecgfm_isruc"])] == ["ecgfm_isruc"]
    with pytest.raises(FixtureError, match="no case is called nothing"):
        choose(find_cases(oracle), ["labram_tiny", "nothing"])


@pytest.mark.parametrize("name", TINY)
def test_tiny_cases_agree(oracle: Path, name: str) -> None:
    result = run(case_of(oracle, name))
    facts = json.loads((oracle / f"{name}.json").read_text())
    with np.load(oracle / f"{name}.npz") as arrays:
        compared = [each for each in arrays.files if each.rpartition(".")[2] not in facts["extras"]]
    assert result.passed
    assert result.weights == "as stated"
    assert result.arrays == len(compared) >= 4 * result.positions  # type: ignore[operator]
    assert 0 < result.largest <= 1e-5
    assert result.middle is not None


@pytest.mark.parametrize("name", STEPS)
def test_preprocessing_agrees(oracle: Path, name: str) -> None:
    result = run(case_of(oracle, f"preprocessing/{name}"))
    assert result.passed
    assert result.preprocessing is not None
    assert result.preprocessing <= 1e-5


@pytest.mark.slow
def test_full_size_cases_agree_by_the_command(oracle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of each kind; every full-size case is held against its numbers in tests/bridge/encoders."""
    names = ("labram_posembed", "papagei_s_wesad", "hubertecg_small_isruc", "preprocessing/hubertecg_isruc")
    with pytest.raises(SystemExit) as ended:
        main(["weights", "parity", str(oracle), "--json", *(part for name in names for part in ("--case", name))])
    assert not ended.value.code
    results = json.loads(capsys.readouterr().out)
    assert results["passed"]
    assert {case["name"] for case in results["cases"]} == set(names)
    assert all(case["peak_bytes"] > 2**20 for case in results["cases"])


@pytest.mark.parametrize("profile", ["normal", "small"])
def test_weights_and_inputs_are_those_of_the_recipe(oracle: Path, profile: fill.Profile) -> None:
    reference = Case(oracle, "labram_tiny").fill
    names = [
        "a.running_var", "a.running_mean", "x.weight_g", "x.parametrizations.weight.original0", "b.gamma_1",
        "pos_embed",
        "cls_token", "n.weight", "n.q_norm.weight", "n.bias", "conv.weight", "masked_spec_embed", "tokens.bias",
    ]  # fmt: skip
    for name in names:
        for shape in ((7,), (1, 1, 6), (3, 4, 5)):
            found = fill.weight(name, shape, torch.float32, 3, profile)
            assert torch.equal(found, reference.fill_tensor(name, shape, torch.float32, 3, profile)), name
    assert torch.equal(fill.weight("n.num", (), torch.int64, 3, profile), torch.tensor(0))
    for shape in ((501,), (2, 3, 77)):
        assert torch.equal(fill.signal("tag", shape, 60.0), reference.make_signal("tag", shape, 60.0))
        assert torch.equal(fill.tokens("tag", shape, 0.02), reference.make_tokens("tag", shape, 0.02))
    state = {"b": torch.ones(2), "a": torch.tensor(3), "c": torch.zeros(2, 2).half()}
    assert fill.checkpoint_sha256(state) == reference.checkpoint_sha256(state)
    assert fill.tensor_sha256(state["b"]) == reference.tensor_sha256(state["b"])


def unseen(oracle: Path, target: Path, model: str, origin: str, x: Tensor, encoder: SplitEncoder, **facts: Any) -> None:
    """A case of a size that the known folder has not, from the encoder's own interface, every array in full."""
    (target / "keys").mkdir(parents=True, exist_ok=True)
    known = Case(oracle, origin).facts
    shutil.copyfile(oracle / known["checkpoint_keys"], target / known["checkpoint_keys"])
    with torch.no_grad():
        taps = encoder.taps(x, lambda h: h)
    arrays: dict[str, Tensor] = {"final_pool": taps.tokens.mean(1)}
    shapes: dict[str, dict[str, list[int]]] = {}
    for i in range(encoder.positions):
        sides = {"in": taps.inputs[i], "out": taps.outputs[i]}
        shapes[str(i)] = {side: list(h.shape) for side, h in sides.items()}
        arrays |= {f"{side}_pool.{i}": h.mean(1) for side, h in sides.items()}
        arrays |= {f"{side}_full.{i}": h for side, h in sides.items()}
    write_arrays(target / f"{model}_other.npz", {name: array.numpy() for name, array in arrays.items()})
    stated = {**known, "shapes": shapes, "row_index": {}, "mid": {}, "extras": {}, **facts}
    (target / f"{model}_other.json").write_text(json.dumps(stated))


def test_a_folder_that_was_never_seen_works(oracle: Path, tmp_path: Path) -> None:
    case = Case(oracle, "labram_tiny")
    x = case.fill.make_signal("other", (3, 2, 1000), 60.0)
    recipe = {"tag": "other", "shape": [3, 2, 1000], "amplitude": 60.0, "sha256": case.fill.tensor_sha256(x)}
    spec = WindowSpec(modality="EEG", channels=("O2", "Fp1"), rate_hz=200, samples=1000)
    encoder = converted("labram", {"model": case.checkpoint()}, spec)
    unseen(oracle, tmp_path, "labram", "labram_tiny", x / 100, encoder, input=recipe, channels=["O2", "Fp1"])

    x = case.fill.make_signal("other", (2, 1, 333))
    recipe = {"tag": "other", "shape": [2, 1, 333], "sha256": case.fill.tensor_sha256(x)}
    spec = WindowSpec(modality="PPG", channels=("PPG",), rate_hz=125, samples=333)
    encoder = converted("papagei", Case(oracle, "papagei_tiny").checkpoint(), spec)
    digest = {"checkpoint_sha256": None}
    unseen(oracle, tmp_path, "papagei", "papagei_tiny", x, encoder, input=recipe, **digest)

    raw = case.fill.make_signal("raw", (2, 1000), 30.0)
    recipe = {
        "tag": "raw",
        "shape": [2, 1000],
        "amplitude": 30.0,
        "rate_hz": 500,
        "sha256": case.fill.tensor_sha256(raw),
    }
    more = {
        "labram_ward": {"input": recipe, "output_shape": [2, 400], "rate_out_hz": 200, "stored": "item 1 of axis 0"}
    }
    (tmp_path / "steps.json").write_text(json.dumps(more))
    places = np.linspace(0, 399, 1000)
    np.savez(tmp_path / "steps.npz", labram_ward=np.interp(np.arange(400), places, raw[1].numpy()))
    (tmp_path / "names.json").write_text('{"names": ["C3"]}')

    results = {case.name: run(case) for case in find_cases(tmp_path)}
    assert results.keys() == {"labram_other", "papagei_other", "steps/labram_ward"}
    assert all(result.passed for result in results.values())
    assert results["papagei_other"].weights == "no digest stated"
    assert (results["labram_other"].arrays, results["labram_other"].middle) == (13, None)


def test_an_error_is_measured_in_deviations_of_the_reference(folder: Path) -> None:
    with np.load(folder / "papagei_tiny.npz") as file:
        arrays = dict(file)
    array = arrays["out_full.2"]
    array[0, 0, 0] += 3 * array.std()
    wanted = 3 * arrays["out_full.2"].std() / array.std()
    write_arrays(folder / "papagei_tiny.npz", arrays)
    result = run(case_of(folder, "papagei_tiny"))
    assert result.worst == "out_full.2"
    assert result.front == pytest.approx(3, rel=0.1)
    assert result.front != wanted
    assert result.middle is not None
    assert result.middle < 1e-5
    assert not result.passed
    assert "BEYOND 0.0001 in out_full.2" in in_words(result)


def test_errors_of_constants_and_of_what_is_no_number() -> None:
    one = np.ones((2, 2), np.float32)
    assert error_of("x", one, one) == 0
    assert error_of("x", one + 1, one) == float("inf")
    assert error_of("x", one * np.nan, np.eye(2)) == float("inf")
    assert error_of("x", np.eye(2) * 2, np.eye(2)) == 2
    with pytest.raises(FixtureError, match="computed"):
        error_of("x", np.ones(4), one)
    told = json.loads(to_json([CaseResult(name="a", front=float("inf"))]))
    assert (told["passed"], told["cases"][0]["front"]) == (False, "inf")


def broken_arrays(folder: Path) -> None:
    path = folder / "papagei_tiny.npz"
    path.write_bytes(path.read_bytes()[:500])


def missing_array(folder: Path) -> None:
    with np.load(folder / "papagei_tiny.npz") as file:
        kept = {name: file[name] for name in file.files if name != "in_pool.3"}
    write_arrays(folder / "papagei_tiny.npz", kept)


def strange_array(folder: Path) -> None:
    with np.load(folder / "papagei_tiny.npz") as file:
        more = {**file, "surprise": np.ones(3)}
    write_arrays(folder / "papagei_tiny.npz", more)


def pickled_arrays(folder: Path) -> None:
    np.savez(folder / "papagei_tiny.npz", final_pool=np.array([print], dtype=object))


DIGEST: str = fill.tensor_sha256(fill.signal("papagei_tiny", (2, 101), 1.0))
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "model": (lambda f: rewrite(f, lambda c: c.update(model="bert")), "unknown model 'bert'"),
    "key": (lambda f: rewrite(f, lambda c: c.pop("seed")), "seed: Field required"),
    "profile": (lambda f: rewrite(f, lambda c: c.update(profile="big")), "profile"),
    "weights": (lambda f: rewrite(f, lambda c: c.update(seed=5)), "weights that its recipe makes"),
    "input": (lambda f: rewrite(f, lambda c: c["input"].update(tag="x")), "input that its recipe makes"),
    "tokens": (lambda f: rewrite(f, lambda c: c["mid"]["3"].update(tag="x")), "for position 3"),
    "layout": (lambda f: rewrite(f, lambda c: c["shapes"]["2"].update({"in": [2, 5, 4]})), "positions are not those"),
    "absent keys": (lambda f: (f / "keys/papagei-tiny.json").unlink(), "papagei-tiny.json: can't be read"),
    "outside": (lambda f: rewrite(f, lambda c: c.update(checkpoint_keys="../x.json")), "leaves the folder"),
    "absent arrays": (lambda f: (f / "papagei_tiny.npz").unlink(), "arrays can't be read"),
    "broken arrays": (broken_arrays, "arrays can't be read"),
    "pickled arrays": (pickled_arrays, "arrays can't be read"),
    "missing array": (missing_array, "arrays are missing: in_pool.3"),
    "strange array": (strange_array, "nothing computes surprise"),
    "other axes": (
        lambda f: rewrite(f, lambda c: c["input"].update(shape=[2, 101], sha256=DIGEST)), "3 axes are expected"
    ),
    "absent text": (lambda f: (f / "papagei_tiny.json").unlink(), "no case that can be read"),
    "broken text": (lambda f: (f / "papagei_tiny.json").write_text('{"model": "pap'), "no case that can be read"),
    "no case": (lambda f: (f / "papagei_tiny.json").write_text('{"x": 1}'), "no case that can be read"),
    "kind": (
        lambda f: rewrite(f, lambda c: c["keys"]["module.dense.bias"].__setitem__(1, "load"), "keys/papagei-tiny.json"),
        "no kind of number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_case_is_an_error_with_its_name(folder: Path, name: str) -> None:
    damage, says = DAMAGE[name]
    damage(folder)
    with pytest.raises(FedbridgeError) as caught:
        run(case_of(folder, "papagei_tiny"))
    assert says in str(caught.value)


def test_a_folder_without_a_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FixtureError, match="no such folder"):
        find_cases(tmp_path / "absent")
    (tmp_path / "names.json").write_text("[1, 2]")
    with pytest.raises(FixtureError, match="no case in it"):
        find_cases(tmp_path)


def test_the_command_goes_on_after_a_damaged_case(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for end in ("json", "npz"):
        shutil.copyfile(folder / f"papagei_tiny.{end}", folder / f"a_case.{end}")
    rewrite(folder, lambda c: c.update(model="bert"), "a_case.json")
    with pytest.raises(SystemExit) as ended:
        main(["weights", "parity", str(folder)])
    assert ended.value.code == 4
    out = capsys.readouterr().out
    assert "a_case        CAN'T BE RUN: a_case: unknown model 'bert'" in out
    assert "papagei_tiny  agrees: weights as stated" in out
    assert "1 of 2 cases agree" in out
    with pytest.raises(SystemExit) as ended:
        main(["weights", "parity", str(folder), "--case", "absent"])
    assert ended.value.code == 2
    assert "name one of a_case, papagei_tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_fails_is_told(folder: Path) -> None:
    result = run_case(FoundCase(folder, "papagei_tiny", "no-entry", "preprocessing"))
    assert result.error.startswith("its process failed: KeyError")
    assert not result.passed

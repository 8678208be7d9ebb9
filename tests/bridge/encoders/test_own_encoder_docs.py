"""The examples of docs/own-encoder.md, run as they stand there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bridge.alignment import aligner
from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.contract import check_encoder
from bridge.encoders.loading import load_encoder, read_encoder_card
from bridge.encoders.protocol import Encoder
from bridge.encoders.split import SplitEncoder
from bridge.errors import WeightsError
from bridge.job import AlignmentJob
from bridge.privacy import Batch, NoPrivacy, TrainPlan
from bridge.prototype import PrototypeBridge, initial_arrays
from bridge.shape import BridgeShape
from bridge.windows import WindowSpec
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "own-encoder.md").read_text(encoding="utf-8")
PACKAGE = "my_package"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


CLASS, FOLDER, KIT, SPLIT_CLASS, SPLIT_FOLDER = blocks("python")


def execute(*texts: str) -> None:
    names: dict[str, object] = {"__name__": "docs"}
    for text in texts:
        exec(compile(text, "own-encoder.md", "exec", dont_inherit=True), names)  # noqa: S102


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's package, installed by path with the page's entry points."""
    package, info = tmp_path / "site-packages" / PACKAGE, tmp_path / "site-packages" / f"{PACKAGE}-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "two_blocks.py").write_text(CLASS)
    (package / "patch_encoder.py").write_text(SPLIT_CLASS)
    points = [line.replace('"', "") for text in blocks("toml") for line in text.splitlines()[1:]]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[fedbridge.encoders]", *points]) + "\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def test_the_first_example_runs_and_keeps_the_contract(place: Path) -> None:
    execute(CLASS, FOLDER, KIT)
    card = read_encoder_card(place / "models" / "new_encoder")
    assert card.family == "two-blocks"
    assert card.layouts_in == ((25, 16), (25, 16))
    check_encoder(load_encoder(place / "models" / "new_encoder"))


def test_the_contract_kit_finds_a_wrong_layout_in_that_example(place: Path) -> None:
    wrong = CLASS.replace("return self._window.samples // 50, 16", "return self._window.samples // 50, 17")
    assert wrong != CLASS
    with pytest.raises(WeightsError, match="layout"):
        execute(wrong, FOLDER, KIT)


@pytest.fixture
def patches(place: Path) -> Encoder:
    """The second example, saved by the page's text and loaded through its entry point."""
    execute(SPLIT_FOLDER)
    return load_encoder(place / "models" / "patches")


def test_the_network_of_transformers_is_told_by_its_card(patches: Encoder, place: Path) -> None:
    card = read_encoder_card(place / "models" / "patches")
    assert type(patches).__module__ == f"{PACKAGE}.patch_encoder"
    assert card.family == "patch-tst"
    assert card.architecture == {"width": 32, "blocks": 3, "heads": 4, "patch": 50}
    # Two channels of 400 / 50 patches; embedding, places, and in each layer four projections, two norms, and the
    # feed-forward part.
    assert card.layouts_in == card.layouts_out == ((16, 32),) * 3
    layer = 4 * (32 * 32 + 32) + 2 * 2 * 32 + (32 * 64 + 64) + (64 * 32 + 32)
    assert card.parameters == (50 * 32 + 32) + 8 * 32 + 3 * layer


def test_it_computes_what_transformers_computes(patches: Encoder) -> None:
    assert isinstance(patches, SplitEncoder)
    x = torch.randn(2, 2, 400)
    with torch.no_grad():
        direct = patches.network(x.view(2, 2, 8, 50), output_hidden_states=True)  # type: ignore[operator]
        taps = patches.taps(x, lambda h: h)
    for ours, theirs in zip(taps.inputs, direct.hidden_states, strict=True):
        torch.testing.assert_close(ours.view(2, 2, 8, 32), theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(taps.tokens.view(2, 2, 8, 32), direct.last_hidden_state, rtol=0, atol=1e-6)


def test_the_contract_kit_finds_a_wrong_door_in_it(place: Path) -> None:
    wrong = SPLIT_CLASS.replace(
        "return tokens.unflatten(1, (len(self.window.channels), -1))", "return -tokens[:, None]"
    )
    assert wrong != SPLIT_CLASS
    (place / "site-packages" / PACKAGE / "patch_encoder.py").write_text(wrong)
    with pytest.raises(WeightsError, match="suffix"):
        execute(SPLIT_FOLDER)


def compact(channel: str) -> CompactEncoder:
    spec = WindowSpec(modality="EEG", channels=(channel,), rate_hz=50, samples=200)
    sizes = CompactArchitecture(width=16, blocks=2, heads=2, tokens=10)
    return CompactEncoder(spec, sizes).eval().requires_grad_(False)


def losses_around_a_round(new: Encoder, old: Encoder, l: int) -> tuple[float, float]:  # noqa: E741
    """The alignment loss before and after 20 steps of a bridge from block 1 of `new` to the input of block `l`."""
    with torch.no_grad():
        features = new.taps(noise(new)).outputs[1].view(4, 3, -1)
        targets = old.taps(noise(old)).tokens.view(4, 3, *old.layout(old.positions - 1, "out"))
    batch = Batch(features, targets, torch.ones(4, 3, dtype=torch.bool))
    tokens, width = old.layout(l, "in")
    shape = BridgeShape(features.shape[-1], 4, tokens, 8, width)
    bridge = PrototypeBridge(shape)
    bridge.load_arrays(initial_arrays(shape, seed=0))
    plan = TrainPlan(learning_rate=1e-2, align=aligner(AlignmentJob(), old, l))
    before = plan.align(bridge(features), batch).mean().item()
    result = NoPrivacy().site_update(bridge, [batch] * 20, plan)
    assert all(abs(update).max() > 0 for update in result.update.values())
    bridge.load_arrays({name: array + result.update[name] for name, array in bridge.arrays().items()})
    return before, plan.align(bridge(features), batch).mean().item()


def noise(encoder: Encoder) -> torch.Tensor:
    return torch.randn(12, len(encoder.window.channels), encoder.window.samples)


@pytest.mark.parametrize("l", [0, 2])
def test_a_round_of_a_bridge_trains_into_it(patches: Encoder, l: int) -> None:  # noqa: E741
    torch.manual_seed(1)
    before, after = losses_around_a_round(compact("C3"), patches, l)
    assert after < 0.9 * before


def test_a_round_of_a_bridge_trains_out_of_it(patches: Encoder) -> None:
    torch.manual_seed(2)
    before, after = losses_around_a_round(patches, compact("C3"), 1)
    assert after < 0.9 * before

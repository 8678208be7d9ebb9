"""The base of split encoders, on a small network whose tokens shrink and widen and lie channels first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bridge.config import Settings
from bridge.encoders.contract import check_encoder
from bridge.encoders.split import SplitEncoder
from bridge.errors import WeightsError
from bridge.windows import Preprocessing, WindowSpec
from tests.bridge.encoders.oracle import filled

WINDOW = WindowSpec(modality="PPG", channels=("a", "b"), rate_hz=50, samples=200)


class PyramidArchitecture(Settings):
    width: int = 4


class Pyramid(SplitEncoder):
    family = "pyramid"
    architecture_type = PyramidArchitecture
    architecture: PyramidArchitecture

    def __init__(self, window: WindowSpec, architecture: PyramidArchitecture, digest: str = "") -> None:
        super().__init__(window, architecture, digest)
        width = architecture.width
        self.stem = nn.utils.parametrizations.weight_norm(nn.Conv1d(len(window.channels), width, 5))
        self.blocks = nn.ModuleList(nn.Conv1d(width << i, width << i + 1, 3, stride=2) for i in range(3))
        self.norm = nn.BatchNorm1d(width)
        self.embedded = 0

    @property
    def positions(self) -> int:
        return len(self.blocks)

    def embed(self, x: Tensor) -> Tensor:
        self.embedded += 1
        h: Tensor = self.norm(self.stem(x))
        return h

    def run_block(self, i: int, native: Tensor) -> Tensor:
        h: Tensor = torch.tanh(self.blocks[i](native))
        return h

    def to_tokens(self, native: Tensor) -> Tensor:
        return native.transpose(1, 2)

    def from_tokens(self, tokens: Tensor, i: int) -> Tensor:
        return tokens.transpose(1, 2)


@pytest.fixture
def pyramid() -> Pyramid:
    shapes = Pyramid.skeleton(WINDOW, PyramidArchitecture()).shapes()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(shape, generator=generator) - 0.5 for name, shape in shapes.items()}
    tensors["norm.running_var"] = torch.ones(4)
    tensors["norm.num_batches_tracked"] = torch.tensor(0)
    encoder = Pyramid.build(WINDOW, PyramidArchitecture(), tensors, "0" * 64)
    assert isinstance(encoder, Pyramid)
    return encoder


def test_it_fulfils_the_contract(pyramid: Pyramid) -> None:
    check_encoder(pyramid)


def test_layouts_are_told_without_computing(pyramid: Pyramid) -> None:
    # 200 - 4 = 196; (196 - 3) // 2 + 1 = 97; 48; 23.
    skeleton = Pyramid.skeleton(WINDOW, PyramidArchitecture())
    for encoder in (pyramid, skeleton):
        assert [encoder.layout(i, "in") for i in range(3)] == [(196, 4), (97, 8), (48, 16)]
        assert [encoder.layout(i, "out") for i in range(3)] == [(97, 8), (48, 16), (23, 32)]
        assert encoder.embedded == 1  # once, however often it is asked
    assert all(p.device.type == "cpu" for p in pyramid.parameters())


def test_the_suffix_never_runs_the_front(pyramid: Pyramid) -> None:
    pyramid.suffix(torch.zeros(2, 97, 8), 1)
    assert pyramid.embedded == 0


def test_taps_reduce_every_state_once(pyramid: Pyramid) -> None:
    seen: list[tuple[int, ...]] = []

    def reduce(h: Tensor) -> Tensor:
        seen.append(tuple(h.shape))
        return h.mean(1)

    taps = pyramid.taps(torch.randn(5, 2, 200), reduce)
    assert seen == [(5, 196, 4), (5, 97, 8), (5, 48, 16), (5, 23, 32)]
    assert [tuple(h.shape) for h in taps.inputs] == [(5, 4), (5, 8), (5, 16)]
    assert tuple(taps.tokens.shape) == (5, 23, 32)


def test_its_card_says_what_it_is(pyramid: Pyramid) -> None:
    card = pyramid.card(Preprocessing(), {"data": "none"})
    assert card.family == "pyramid"
    assert card.architecture == {"width": 4}
    assert card.layouts_in == ((196, 4), (97, 8), (48, 16))
    assert card.layouts_out == ((97, 8), (48, 16), (23, 32))
    # Stem 4 + 4 * 2 * 5 and a gain a filter; blocks 3 * in * out + out; norm 2 * 4.
    assert card.parameters == (4 + 40 + 4) + (3 * 32 + 8) + (3 * 128 + 16) + (3 * 512 + 32) + 8


def test_weights_of_another_network_are_refused(pyramid: Pyramid) -> None:
    tensors = pyramid.state_dict()
    del tensors["blocks.1.bias"]
    with pytest.raises(WeightsError, match="not those of a pyramid encoder") as caught:
        Pyramid.build(WINDOW, PyramidArchitecture(), tensors)
    assert "blocks.1.bias" in caught.value.why
    with pytest.raises(WeightsError, match="not those of a pyramid encoder"):
        Pyramid.build(WINDOW, PyramidArchitecture(width=8), pyramid.state_dict())


def test_half_precision_weights_compute_in_single_precision(pyramid: Pyramid) -> None:
    halves = {name: t.half() if t.is_floating_point() else t for name, t in pyramid.state_dict().items()}
    encoder = Pyramid.build(WINDOW, PyramidArchitecture(), halves)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert encoder(torch.randn(1, 2, 200)).dtype == torch.float32


def test_random_weights_of_any_architecture_can_be_made() -> None:
    encoder = filled(Pyramid, WINDOW, PyramidArchitecture(width=2))
    assert encoder.layout(2, "out") == (23, 16)

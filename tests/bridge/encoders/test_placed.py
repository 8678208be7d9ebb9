"""Encoders on a machine: the same bits where memory suffices, the same results to 1e-5 where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bridge.compute import Compute, Precision
from bridge.encoders import placed
from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.contract import check_encoder
from bridge.encoders.cost import inference_bytes, training_bytes
from bridge.encoders.placed import PlacedEncoder
from bridge.encoders.protocol import Encoder, Taps
from bridge.errors import PositionError, WindowError
from bridge.windows import WindowSpec

WINDOW = WindowSpec(modality="ECG", channels=("I", "II"), rate_hz=50, samples=200)
PLENTY = Compute(10**12)
BLOCKS, TOKENS, WIDTH = 4, 20, 16


class Recorded:
    """An encoder that is no split one, and notes how many windows each call gets."""

    def __init__(self, encoder: CompactEncoder) -> None:
        self.encoder, self.calls = encoder, []  # type: ignore[var-annotated]
        self.window, self.positions, self.digest = encoder.window, encoder.positions, encoder.digest
        self.layout = encoder.layout

    def prefix(self, x: Tensor, m: int) -> Tensor:
        self.calls.append(len(x))
        return self.encoder.prefix(x, m)

    def suffix(self, h: Tensor, l: int) -> Tensor:  # noqa: E741
        self.calls.append(len(h))
        return self.encoder.suffix(h, l)

    def taps(self, x: Tensor, reduce: Any = placed.mean_over_tokens) -> Taps:
        self.calls.append(len(x))
        return self.encoder.taps(x, reduce)

    def to(self, device: torch.device) -> Recorded:
        self.encoder.to(device)
        return self


@pytest.fixture(scope="module")
def bare() -> CompactEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = CompactArchitecture(width=WIDTH, blocks=BLOCKS, heads=2, tokens=TOKENS)
        encoder = CompactEncoder(WINDOW, sizes, "e" * 64)
    return encoder.eval().requires_grad_(False)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    placed._measured.clear()
    yield
    placed._measured.clear()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(23, 2, 200, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def h() -> Tensor:
    return torch.randn(23, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))


def all_of(encoder: Encoder, x: Tensor, h: Tensor) -> list[Tensor]:
    """Everything that an encoder gives, gradients too."""
    with torch.no_grad():
        taps = encoder.taps(x)
        found = [*taps.inputs, *taps.outputs, taps.tokens]
        found += [encoder.prefix(x, 1), encoder.suffix(h, 2)]
    for l in range(BLOCKS):  # noqa: E741
        start = h.clone().requires_grad_()
        final = encoder.suffix(start, l)
        (gradient,) = torch.autograd.grad((final.sin() * torch.arange(WIDTH)).sum(), start)
        found += [final.detach(), gradient]
    return found


def one_window(encoder: Encoder, x: Tensor, h: Tensor) -> tuple[int, int]:
    """Bytes of a window in inference and in training."""
    return inference_bytes(lambda: encoder.taps(x[:1])), training_bytes(lambda each: encoder.suffix(each, 0), h[:1])


def budgets(bare: CompactEncoder, x: Tensor, h: Tensor) -> list[int]:
    inference, training = one_window(bare, x, h)
    assert training > inference
    return [1, inference, training // 2, 3 * training, 9 * training]


def test_where_all_fits_the_bits_are_the_networks_own(bare: CompactEncoder, x: Tensor, h: Tensor) -> None:
    for found, expected in zip(all_of(PlacedEncoder(bare, PLENTY), x, h), all_of(bare, x, h), strict=True):
        assert torch.equal(found, expected)


def test_results_do_not_depend_on_memory(bare: CompactEncoder, x: Tensor, h: Tensor) -> None:
    expected = all_of(bare, x, h)
    for encoder in (bare, Recorded(bare)):
        for budget in budgets(bare, x, h):
            for found, wanted in zip(all_of(PlacedEncoder(encoder, Compute(budget)), x, h), expected, strict=True):
                assert found.shape == wanted.shape
                assert float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max())), budget


def test_the_contract_holds_with_memory_for_one_window(bare: CompactEncoder) -> None:
    check_encoder(PlacedEncoder(bare, Compute(1)))
    check_encoder(PlacedEncoder(bare, PLENTY))


def test_no_call_gets_more_windows_than_fit(bare: CompactEncoder, x: Tensor, h: Tensor) -> None:
    inference, training = one_window(bare, x, h)
    recorded = Recorded(bare)
    encoder = PlacedEncoder(recorded, Compute(5 * inference))
    for _ in range(2):  # measured once
        encoder.taps(x)
    assert recorded.calls == [1, *[4, 4, 4, 4, 4, 3] * 2]
    recorded.calls.clear()
    PlacedEncoder(recorded, Compute(26 * inference)).taps(x)
    assert recorded.calls == [23]
    recorded.calls.clear()
    placed._measured.clear()
    encoder = PlacedEncoder(recorded, Compute(9 * training))
    encoder.suffix(h.clone().requires_grad_(), 0).sum().backward()
    assert recorded.calls == [1, 8, 8, 7, 7, 8, 8]  # measured, forwards, and again on the way back


def test_training_in_little_memory_takes_little_memory(bare: CompactEncoder, h: Tensor) -> None:
    many = h.repeat(8, 1, 1)
    start = many.clone().requires_grad_()
    whole = training_bytes(lambda each: bare.suffix(each, 0), start)
    one = training_bytes(lambda each: bare.suffix(each, 0), start[:1])
    budget = 4 * one
    encoder = PlacedEncoder(bare, Compute(budget))
    assert encoder.suffix(start, 0).shape == many.shape
    frugal = training_bytes(lambda each: encoder.suffix(each, 0), start)
    # What remains for all windows at once: the tokens, in parts and whole, and their gradients.
    assert frugal < budget + 8 * 1.5 * many.numel() * 4
    assert frugal < whole / 4


def test_one_window_that_does_not_fit_goes_block_by_block(bare: CompactEncoder, h: Tensor) -> None:
    plain = training_bytes(lambda each: bare.suffix(each, 0), h[:1])
    by_block = training_bytes(lambda each: bare.suffix_by_block(each, 0), h[:1])
    assert by_block < 0.6 * plain
    encoder = PlacedEncoder(bare, Compute(plain // 2))
    assert encoder.suffix(h[:1].requires_grad_(), 0).requires_grad
    assert training_bytes(lambda each: encoder.suffix(each, 0), h[:1]) < 0.6 * plain


def test_unpooled_inputs_are_those_of_one_pass(bare: CompactEncoder, x: Tensor) -> None:
    expected = bare.taps(x, lambda tokens: tokens).inputs
    for compute in (PLENTY, Compute(1)):
        encoder = PlacedEncoder(bare, compute)
        for l in range(BLOCKS):  # noqa: E741
            torch.testing.assert_close(encoder.input_tokens(x, l), expected[l], rtol=0, atol=1e-5)
        for l in (-1, BLOCKS):  # noqa: E741
            with pytest.raises(PositionError):
                encoder.input_tokens(x, l)


def test_no_window_and_wrong_windows(bare: CompactEncoder) -> None:
    encoder = PlacedEncoder(bare, Compute(1))
    assert encoder.prefix(torch.zeros(0, 2, 200), 0).shape == (0, TOKENS, WIDTH)
    assert encoder.suffix(torch.zeros(0, TOKENS, WIDTH), 1).shape == (0, TOKENS, WIDTH)
    with pytest.raises(WindowError):
        encoder.taps(torch.zeros(3, 2, 201))
    for call in (lambda: encoder.prefix(torch.zeros(3, 2, 200), BLOCKS), lambda: encoder.layout(-1, "in")):
        with pytest.raises(PositionError):
            call()


def test_windows_of_a_frozen_input_need_no_graph(bare: CompactEncoder, h: Tensor) -> None:
    assert not PlacedEncoder(bare, Compute(1)).suffix(h, 0).requires_grad


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_comes_back_as_float32_and_near(
    bare: CompactEncoder, x: Tensor, h: Tensor, precision: Precision
) -> None:
    """Torch's autocast exists on the processor, too: it stands here for the device that the site file asks for."""
    expected = all_of(bare, x, h)
    for budget in (10**12, 1):
        found = all_of(PlacedEncoder(bare, Compute(budget, "cpu", precision)), x, h)
        for each, wanted in zip(found, expected, strict=True):
            assert each.dtype == torch.float32
            error = float((each - wanted).norm() / wanted.norm())
            assert error < 0.05
        assert any(not torch.equal(each, wanted) for each, wanted in zip(found, expected, strict=True))


def test_small_gradients_survive_float16(bare: CompactEncoder, h: Tensor) -> None:
    def gradient(encoder: Encoder) -> Tensor:
        start = h.clone().requires_grad_()
        # A second way from the start to the loss, which no scale may touch.
        loss = 1e-11 * (encoder.suffix(start, 1).sin() * torch.arange(WIDTH)).sum() + 1e-11 * start.sum()
        return torch.autograd.grad(loss, start)[0]

    expected = gradient(bare)
    with torch.autocast("cpu", torch.float16):
        lost = gradient(bare)
    assert float((lost - expected).norm() / expected.norm()) > 0.3
    for budget in (10**12, 1):
        found = gradient(PlacedEncoder(bare, Compute(budget, "cpu", "float16")))
        assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_window_gradient_in_float16_depends_on_no_other_window(bare: CompactEncoder, h: Tensor) -> None:
    """Under privacy a patient moves a sum by its own part alone, however large or broken its gradient is."""

    def gradient(first: float) -> Tensor:
        start = h.clone().requires_grad_()
        weights = torch.full((len(h), 1, 1), 1e-9)
        weights[0] = first
        final = PlacedEncoder(bare, Compute(10**12, "cpu", "float16")).suffix(start, 1)
        return torch.autograd.grad((final.sin() * weights).sum(), start)[0]

    expected = gradient(1e-9)
    assert (expected[1:].flatten(1).abs().amax(dim=1) > 0).all()
    for first in (0.0, 1e-44, 1e30, float("inf"), float("nan")):
        assert torch.equal(gradient(first)[1:], expected[1:]), first

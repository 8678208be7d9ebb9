"""The contract kit accepts a good encoder of a foreign kind and finds each planted fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bridge.encoders.contract import check_encoder
from bridge.encoders.protocol import Reduce, Side, Taps, mean_over_tokens
from bridge.errors import PositionError, WeightsError
from bridge.windows import WindowSpec

WINDOW = WindowSpec(modality="EMG", channels=("a", "b"), rate_hz=10, samples=12)


class Tiny(nn.Module):
    """Another family than ours: tokens shrink from 6 to 3 and get wider on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(16, 20)
        self.eval().requires_grad_(False)

    window = WINDOW
    positions = 2
    digest = "0" * 64

    def layout(self, position: int, side: Side) -> tuple[int, int]:
        if not 0 <= position < 2:
            raise PositionError("no such position")
        return {(0, "in"): (6, 8), (0, "out"): (6, 8), (1, "in"): (6, 8), (1, "out"): (3, 20)}[position, side]

    def embed(self, x: Tensor) -> Tensor:
        self.window.check(tuple(x.shape))
        tokens: Tensor = self.stem(x.unfold(2, 2, 2).transpose(1, 2).flatten(2))
        return tokens

    def block(self, h: Tensor, i: int) -> Tensor:
        return torch.tanh(self.first(h)) if i == 0 else torch.tanh(self.second(h.reshape(len(h), 3, 16)))

    def prefix(self, x: Tensor, m: int) -> Tensor:
        h = self.embed(x)
        for i in range(m + 1):
            h = self.block(h, i)
        return h

    def suffix(self, h: Tensor, l: int) -> Tensor:  # noqa: E741
        for i in range(l, 2):
            h = self.block(h, i)
        return h

    def taps(self, x: Tensor, reduce: Reduce = mean_over_tokens) -> Taps:
        h0 = self.embed(x)
        h1 = self.block(h0, 0)
        h2 = self.block(h1, 1)
        return Taps((reduce(h0), reduce(h1)), (reduce(h1), reduce(h2)), h2)


def test_a_foreign_encoder_that_keeps_the_contract_passes() -> None:
    check_encoder(Tiny())


class Negative(Tiny):
    def layout(self, position: int, side: Side) -> tuple[int, int]:
        return super().layout(position % 2, side)


class WrongLayout(Tiny):
    def layout(self, position: int, side: Side) -> tuple[int, int]:
        return (6, 9) if (position, side) == (0, "out") else super().layout(position, side)


class AnyLength(Tiny):
    def embed(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.stem(x.unfold(2, 2, 2).transpose(1, 2).flatten(2))
        return tokens


class BrokenSplit(Tiny):
    def suffix(self, h: Tensor, l: int) -> Tensor:  # noqa: E741
        return super().suffix(h, l) + (0.01 if l == 1 else 0.0)


class PooledByMax(Tiny):
    def taps(self, x: Tensor, reduce: Reduce = mean_over_tokens) -> Taps:
        full = super().taps(x, lambda h: h)
        if reduce is not mean_over_tokens:
            return full
        return Taps(tuple(h.amax(1) for h in full.inputs), tuple(h.amax(1) for h in full.outputs), full.tokens)


class BatchNormed(Tiny):
    def block(self, h: Tensor, i: int) -> Tensor:
        out = super().block(h, i)
        return out - out.mean(dim=0, keepdim=True) if i == 0 and len(h) > 1 else out


class Detached(Tiny):
    def suffix(self, h: Tensor, l: int) -> Tensor:  # noqa: E741
        out = super().suffix(h, l)
        return out.detach() + 0 * h.sum()


class Training(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.train()


class Unfrozen(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.second.requires_grad_(True)


class NoHash(Tiny):
    digest = "v1"


@pytest.mark.parametrize(
    ("faulty", "clause"),
    [
        (Negative, "position -1 is refused"),
        (WrongLayout, r"layout\(0, 'out'\) is true"),
        (AnyLength, "windows of another length are refused"),
        (BrokenSplit, r"suffix\(prefix\(x, 0\), 1\) gives the final tokens"),
        (PooledByMax, "taps pools output 0 by the mean"),
        (BatchNormed, "do not depend on its batch"),
        (Detached, r"a gradient flows through suffix\(h, 0\)"),
        (Training, "eval mode"),
        (Unfrozen, "parameters are frozen"),
        (NoHash, "digest is a hex sha256"),
    ],
)
def test_each_planted_fault_is_found(faulty: Callable[[], Tiny], clause: str) -> None:
    with pytest.raises(WeightsError, match=clause):
        check_encoder(faulty())

"""The one interface through which every frozen network is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from bridge.errors import PositionError
from bridge.windows import WindowSpec

Side = Literal["in", "out"]
Reduce = Callable[[Tensor], Tensor]


def mean_over_tokens(h: Tensor) -> Tensor:
    """Pool `(batch, tokens, width)` to `(batch, width)`."""
    return h.mean(dim=1)


@dataclass(frozen=True)
class Taps:
    """Every position's reduced input and output, and the unpooled final tokens, of one forward pass.

    `inputs[i]` and `outputs[i]` are what `reduce` made of `(batch, tokens, width)` at position `i`;
    `tokens` is the unpooled output of the last position, `(batch, tokens, width)`.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tokens: Tensor


@runtime_checkable
class Encoder(Protocol):
    """A frozen network split by position, bound to one `WindowSpec` (DESIGN: encoders are split, not hooked).

    Position `i` is block `i` of the network. Tokens are always `(batch, tokens, width)`; a network that lays its data
    out otherwise transposes at this door. Inputs `x` are `(batch, channels, samples)`, already preprocessed.

    Calls keep autograd alive for `h` in `suffix`, since the bridge is trained through it; parameters are frozen
    (`requires_grad` off) and the network is in eval mode, so results do not depend on the rest of the batch.
    """

    @property
    def window(self) -> WindowSpec:
        """The windows that this encoder reads."""
        ...

    @property
    def positions(self) -> int:
        """How many positions there are: valid ones are `0 .. positions - 1`."""
        ...

    @property
    def digest(self) -> str:
        """Hex sha256 over weights and card: two encoders with the same digest compute the same."""
        ...

    def layout(self, position: int, side: Side) -> tuple[int, int]:
        """`(tokens, width)` of the input or output of a position. Raises `PositionError`."""
        ...

    def prefix(self, x: Tensor, m: int) -> Tensor:
        """Run from the input through block `m`: its unpooled OUTPUT `(batch, tokens, width)`."""
        ...

    def suffix(self, h: Tensor, l: int) -> Tensor:  # noqa: E741
        """Run blocks `l ..` on `h`, the unpooled INPUT of block `l`: the final tokens `(batch, tokens, width)`."""
        ...

    def taps(self, x: Tensor, reduce: Reduce = mean_over_tokens) -> Taps:
        """Every position's input and output in one pass, reduced as it goes (nothing unreduced is kept)."""
        ...

    def to(self, device: torch.device) -> Encoder:
        """The same encoder on a device (moved in place)."""
        ...


def check_position(encoder: Encoder, position: int) -> int:
    """Return `position` if the encoder has it, else raise `PositionError` (negative indices are none)."""
    if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < encoder.positions:
        raise PositionError(
            f"position {position!r} is not one of this {encoder.window.modality} encoder's",
            why=f"it has positions 0 to {encoder.positions - 1}",
            fix="choose a position in that range",
        )
    return position

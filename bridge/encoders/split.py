"""Base of the encoders that are a front end and a list of blocks: a family says how a block runs, the rest is here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridge.config import Settings
from bridge.encoders.cards import WEIGHTS, EncoderCard, Layout
from bridge.encoders.protocol import Reduce, Side, Taps, check_position, mean_over_tokens
from bridge.errors import WeightsError
from bridge.windows import Preprocessing, WindowSpec


class SplitEncoder(nn.Module, ABC):
    """Implements `bridge.encoders.protocol.Encoder` over five methods of a family.

    Between blocks a network keeps its own layout of the data, called native here: any tensor whose first axis counts
    windows, or windows times something. `to_tokens` and `from_tokens` are the door to `(batch, tokens, width)`.

    A subclass is built twice over on the meta device, where tensors have shapes and no values: to be filled from a file
    and to learn its layouts. So its constructor makes no constants but parameters and persistent buffers, and `embed`
    makes what else it needs on its input's device, without looking at values.
    """

    family: ClassVar[str]
    """Entry point name in the group `fedbridge.encoders`."""
    architecture_type: ClassVar[type[Settings]]
    """The settings that, with the window, are enough to build the network."""

    def __init__(self, window: WindowSpec, architecture: Settings, digest: str = "") -> None:
        super().__init__()
        self._window, self.architecture, self._digest = window, architecture, digest

    @property
    @abstractmethod
    def positions(self) -> int:
        """How many blocks there are."""

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """What block 0 takes, from windows `(batch, channels, samples)` that were checked: native."""

    @abstractmethod
    def run_block(self, i: int, native: Tensor) -> Tensor:
        """The output of block `i`, native, which is the input of block `i + 1`."""

    def to_tokens(self, native: Tensor) -> Tensor:
        """Native to `(batch, tokens, width)`; the same unless a family says otherwise."""
        return native

    def from_tokens(self, tokens: Tensor, i: int) -> Tensor:
        """`(batch, tokens, width)` at the input of block `i` to native; the same unless a family says otherwise."""
        return tokens

    @classmethod
    def build(cls, window: WindowSpec, architecture: Settings, tensors: Mapping[str, Tensor], digest: str = "") -> Self:
        """The frozen network with these tensors as its weights (not copied where they are float32).

        Raises `WeightsError` where they are not exactly the network's own, by name and shape.
        """
        encoder = cls.skeleton(window, architecture, digest)
        try:
            encoder.load_state_dict(dict(tensors), assign=True)
        except RuntimeError as error:
            raise WeightsError(
                f"the weights are not those of a {cls.family} encoder of this architecture",
                why=" ".join(str(error).split()),
                fix="use the weights that the card was written with",
            ) from error
        return encoder.float().eval().requires_grad_(False)

    @classmethod
    def skeleton(cls, window: WindowSpec, architecture: Settings, digest: str = "") -> Self:
        """The network without values (on the meta device): its names, shapes and layouts."""
        with torch.device("meta"):
            return cls(window, architecture, digest).eval().requires_grad_(False)

    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of everything that is stored."""
        return {name: tensor.shape for name, tensor in self.state_dict().items()}

    @classmethod
    def load(cls, folder: Path, card: EncoderCard) -> Self:
        """Build the card's network and fill in its weights (the contract of the group `fedbridge.encoders`).

        Raises `WeightsError` where the card's architecture is none of this family or the tensors do not fit it.
        """
        try:
            architecture = cls.architecture_type.model_validate(card.architecture)
            tensors = safetensors.torch.load_file(folder / WEIGHTS)
            return cls.build(card.window, architecture, tensors, card.digest)
        except (ValueError, SafetensorError, OSError, WeightsError) as error:
            raise WeightsError(
                f"{folder}: no {cls.family} encoder can be built from it",
                why=f"{error.what}: {error.why}" if isinstance(error, WeightsError) else str(error).splitlines()[0],
                fix="copy the whole folder again from its source",
            ) from error

    def card(self, preprocessing: Preprocessing, training: Mapping[str, Any]) -> EncoderCard:
        """This encoder's card, still without hashes (`save_encoder` fills them in)."""
        return EncoderCard(
            family=self.family,
            window=self._window,
            preprocessing=preprocessing,
            layouts_in=self._layouts[:-1],
            layouts_out=self._layouts[1:],
            parameters=sum(p.numel() for p in self.parameters()),
            architecture=self.architecture.model_dump(mode="json"),
            training=dict(training),
            weights_sha256="",
        )

    @final
    def suffix_by_block(self, h: Tensor, l: int) -> Tensor:  # noqa: E741
        """As `suffix`, for training in little memory: of each block only the input is kept, and the rest is computed
        again in the backward pass. Raises `PositionError`."""
        check_position(self, l)
        native = self.from_tokens(h, l)
        for i in range(l, self.positions):
            native = checkpoint(self.run_block, i, native, use_reentrant=False, preserve_rng_state=False)
        return self.to_tokens(native)

    @final
    @property
    def window(self) -> WindowSpec:
        """The windows that this encoder reads."""
        return self._window

    @final
    @property
    def digest(self) -> str:
        """Hex sha256 over weights and card; empty for an encoder that was never saved."""
        return self._digest

    @final
    def layout(self, position: int, side: Side) -> Layout:
        """`(tokens, width)` of a block's input or output. Raises `PositionError`."""
        check_position(self, position)
        return self._layouts[position + (side == "out")]

    @final
    def prefix(self, x: Tensor, m: int) -> Tensor:
        """Front end and blocks `0 .. m`: `(batch, tokens, width)`. Raises `WindowError` and `PositionError`."""
        check_position(self, m)
        return self.to_tokens(self._run(self._enter(x), 0, m + 1))

    @final
    def suffix(self, h: Tensor, l: int) -> Tensor:  # noqa: E741
        """Blocks `l ..` on `(batch, tokens, width)`: the final tokens. Raises `PositionError`."""
        check_position(self, l)
        return self.to_tokens(self._run(self.from_tokens(h, l), l, self.positions))

    @final
    def taps(self, x: Tensor, reduce: Reduce = mean_over_tokens) -> Taps:
        """Every position's reduced input and output in one pass. Raises `WindowError`."""
        native = self._enter(x)
        reduced = [reduce(self.to_tokens(native))]
        for i in range(self.positions):
            native = self.run_block(i, native)
            tokens = self.to_tokens(native)
            reduced.append(reduce(tokens))
        # A block's input is the output of the block before: computed once, listed twice.
        return Taps(inputs=tuple(reduced[:-1]), outputs=tuple(reduced[1:]), tokens=tokens)

    def forward(self, x: Tensor) -> Tensor:
        """The final tokens of windows `(batch, channels, samples)`."""
        return self.prefix(x, self.positions - 1)

    def _enter(self, x: Tensor) -> Tensor:
        self._window.check(tuple(x.shape))
        return self.embed(x)

    def _run(self, native: Tensor, start: int, stop: int) -> Tensor:
        for i in range(start, stop):
            native = self.run_block(i, native)
        return native

    @cached_property
    def _layouts(self) -> tuple[Layout, ...]:
        """Layouts at the input of each block and the output of the last, from one pass that computes no number."""
        walk = _Walk(self)
        shapes = {name: tensor.to("meta") for name, tensor in (*walk.named_parameters(), *walk.named_buffers())}
        x = torch.empty(1, len(self._window.channels), self._window.samples, device="meta")
        with torch.no_grad():
            found: tuple[Layout, ...] = torch.func.functional_call(walk, shapes, (x,))
        return found


class _Walk(nn.Module):
    """One pass through an encoder that keeps layouts alone."""

    def __init__(self, encoder: SplitEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> tuple[Layout, ...]:
        taps = self.encoder.taps(x, lambda h: h)
        return tuple((h.shape[1], h.shape[2]) for h in (*taps.inputs, taps.tokens))

"""PaPaGei-S: a residual convolutional network for PPG at 125 Hz, whose blocks narrow time and widen features.

Between its blocks data lie as `(batch, width, length)`: a token is a moment, and the door transposes. Its padding is
TensorFlow's "same", and its pooling pads one zero on the right whatever the length, as its authors trained it. What
follows the last block (a norm and three heads) is no part of the bridge's network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bridge.config import Settings
from bridge.encoders.checkpoints import (
    architecture_of,
    count_of,
    require_window,
    size_of,
    state_dict_of,
    taken,
    without_prefix,
)
from bridge.encoders.published import published_model
from bridge.encoders.split import SplitEncoder
from bridge.errors import WindowError
from bridge.windows import WindowSpec

FAMILY = "papagei"

_MODEL = published_model(FAMILY)
_KERNEL = 3
_BLOCKS_OF_A_WIDTH = 4


class PapageiArchitecture(Settings):
    """Sizes of a PaPaGei network. The defaults are those of PaPaGei-S."""

    width: int = Field(default=32, ge=1)
    """Features of the first blocks; every fourth block doubles them."""
    blocks: int = Field(default=18, ge=1)
    """Residual blocks, which are the positions of a bridge; every second one halves time."""

    def width_of(self, block: int) -> int:
        """Features that a block puts out."""
        return self.width << block // _BLOCKS_OF_A_WIDTH


class _Convolution(nn.Conv1d):
    """A convolution that pads as TensorFlow's "same" does: `ceil(length / stride)` come out, the odd zero is right."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, _KERNEL, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        length, stride = x.shape[-1], self.stride[0]
        padding = max(0, (-(-length // stride) - 1) * stride + _KERNEL - length)
        return super().forward(F.pad(x, (padding // 2, padding - padding // 2)))


class _Block(nn.Module):
    """A residual block of two convolutions; `first` has no norm before the first of them, `halves` halves time."""

    def __init__(self, inputs: int, outputs: int, *, first: bool, halves: bool) -> None:
        super().__init__()
        self.widening, self.halves = outputs - inputs, halves
        self.norm1 = None if first else nn.BatchNorm1d(inputs)
        self.conv1 = _Convolution(inputs, outputs, stride=2 if halves else 1)
        self.norm2 = nn.BatchNorm1d(outputs)
        self.conv2 = _Convolution(outputs, outputs, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.norm1 is None else F.relu(self.norm1(x))
        h = self.conv2(F.relu(self.norm2(self.conv1(h))))
        if self.halves:
            # In an odd length, the zero on the right takes part in the last maximum.
            x = F.max_pool1d(F.pad(x, (0, 1)), 2)
        if self.widening:
            before = self.widening // 2
            x = F.pad(x, (0, 0, before, self.widening - before))
        summed: Tensor = h + x
        return summed


class PapageiEncoder(SplitEncoder):
    """PaPaGei-S; position `i` is entry `i` of its `basicblock_list`."""

    family = FAMILY
    architecture_type = PapageiArchitecture
    architecture: PapageiArchitecture

    def __init__(self, window: WindowSpec, architecture: PapageiArchitecture, digest: str = "") -> None:
        require_window(window, _MODEL.modality, _MODEL.rate_hz, _MODEL.title)
        if len(window.channels) != 1:
            raise WindowError(
                f"{_MODEL.title} can't read windows of {len(window.channels)} channels",
                why="it reads one channel of PPG",
                fix=f"choose one of {', '.join(window.channels)}",
            )
        super().__init__(window, architecture, digest)
        self.stem = _Convolution(1, architecture.width, stride=1)
        self.stem_norm = nn.BatchNorm1d(architecture.width)
        widths = [architecture.width, *(architecture.width_of(i) for i in range(architecture.blocks))]
        self.blocks = nn.ModuleList(
            _Block(widths[i], widths[i + 1], first=i == 0, halves=i % 2 == 1) for i in range(architecture.blocks)
        )

    @property
    def positions(self) -> int:
        """The number of residual blocks."""
        return len(self.blocks)

    def embed(self, x: Tensor) -> Tensor:
        """`(batch, 1, samples)` to `(batch, width, samples)`."""
        return F.relu(self.stem_norm(self.stem(x)))

    def run_block(self, i: int, native: Tensor) -> Tensor:
        """`(batch, width, length)` of block `i`'s input to that of its output."""
        h: Tensor = self.blocks[i](native)
        return h

    def to_tokens(self, native: Tensor) -> Tensor:
        """`(batch, width, length)` to `(batch, length, width)`."""
        return native.transpose(1, 2)

    def from_tokens(self, tokens: Tensor, i: int) -> Tensor:
        """`(batch, length, width)` to `(batch, width, length)`."""
        return tokens.transpose(1, 2)


def unwrap(loaded: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict of PaPaGei's file, which is a bare one, without the prefix that training on several GPUs left."""
    return without_prefix(state_dict_of(loaded, "", _MODEL.title), "module.")


def published(state: Mapping[str, Tensor], window: WindowSpec) -> tuple[Mapping[str, Tensor], PapageiArchitecture]:
    """The encoder's tensors and architecture from PaPaGei's state dict.

    Raises `WindowError` unless the windows are one channel of PPG at 125 Hz, and `WeightsError` with the names of
    tensors that are missing, extra or misshapen.
    """
    sizes = {
        "width": size_of(state, "first_block_conv.conv.weight", 0, _MODEL.title),
        "blocks": count_of(state, "basicblock_list."),
    }
    architecture = architecture_of(PapageiArchitecture, sizes, _MODEL.title)
    wanted = PapageiEncoder.skeleton(window, architecture).shapes()
    return taken(state, wanted, _MODEL.unused, _MODEL.title, _published_name), architecture


def _published_name(name: str) -> str:
    """The name in PaPaGei's file of one of the encoder's tensors."""
    owner, _, leaf = name.rpartition(".")
    if owner == "stem":
        return f"first_block_conv.conv.{leaf}"
    if owner == "stem_norm":
        return f"first_block_bn.{leaf}"
    owner = owner.replace("blocks.", "basicblock_list.").replace("norm", "bn")
    return f"{owner}.conv.{leaf}" if "conv" in owner else f"{owner}.{leaf}"

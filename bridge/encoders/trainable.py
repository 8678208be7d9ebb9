"""A whole encoder in training: a copy of it, every parameter of which is trained.

Dropout and batch statistics stay as in inference, so that a window's result does not depend on the windows beside it.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor, nn

from bridge.compute import Compute, windows_at_once
from bridge.encoders.cost import training_bytes
from bridge.encoders.protocol import Encoder, mean_over_tokens
from bridge.errors import ConfigError


class TrainableEncoder:
    """The copy, in float32 on the device of `compute`; the encoder it was made from stays frozen and as it is.

    `windows (n, channels, samples)` are any that fit, of which one is run to see what training costs. `what` and `fix`
    are for the `ConfigError` that says why an encoder can't be trained.
    """

    def __init__(self, encoder: Encoder, windows: Tensor, compute: Compute, *, what: str, fix: str) -> None:
        if not isinstance(encoder, nn.Module):
            raise ConfigError(f"{what} can't be trained as a whole", why="it is no torch.nn.Module", fix=fix)
        self.compute, self.last = replace(compute, precision="float32"), encoder.positions - 1
        self.network = copy.deepcopy(encoder).eval().requires_grad_(True).to(self.compute.device)
        one = windows[:1].to(self.compute.device)
        if not self.pooled(one).requires_grad:
            why = "its results do not depend on its parameters, says torch"
            raise ConfigError(f"{what} can't be trained as a whole", why=why, fix=fix)
        self._bytes_of_one = training_bytes(self.pooled, one)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean of the final tokens `(n, width)`, on the device, for gradients to go back through."""
        return mean_over_tokens(self.network.prefix(x.to(self.compute.device), self.last))

    def at_once(self, asked: int) -> int:
        """How many of `asked` windows memory holds in a step, at least one."""
        return windows_at_once(self.compute, self._bytes_of_one, asked)

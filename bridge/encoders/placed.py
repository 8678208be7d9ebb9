"""A frozen network as a machine can run it: on its device, in its precision, and no more windows at a time than fit.

One window is sent through each call that is made, and the memory it took tells how many go together. Where all of them
fit, the call is that of the network itself, to the last bit. Where they don't, windows go through in parts; in training
only a part's input and output are kept, and its activations are computed again in the backward pass. Results come back
to the CPU, in float32: bridge, losses and noise know nothing of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bridge.compute import Compute, windows_at_once
from bridge.encoders.cost import inference_bytes, training_bytes
from bridge.encoders.protocol import Encoder, Reduce, Side, Taps, mean_over_tokens
from bridge.encoders.split import SplitEncoder
from bridge.windows import WindowSpec

_Step = Callable[[Tensor], tuple[Tensor, ...]]

_MOST = 100
"""Powers of two beyond it would leave float32."""

_measured: dict[tuple[object, ...], int] = {}
"""Bytes of one window, by encoder, compute and call: the same for all messages of a process."""


class PlacedEncoder:
    """An encoder of the protocol around another one, on a machine."""

    def __init__(self, encoder: Encoder, compute: Compute) -> None:
        if compute.device == "cuda":
            # TF32 rounds to ten bits: what is called float32 here must agree to 1e-5 wherever it is computed.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        self._encoder, self.compute = encoder.to(torch.device(compute.device)), compute

    @property
    def window(self) -> WindowSpec:
        """The windows that the encoder reads."""
        return self._encoder.window

    @property
    def positions(self) -> int:
        """How many positions there are."""
        return self._encoder.positions

    @property
    def digest(self) -> str:
        """Hex sha256 over weights and card."""
        return self._encoder.digest

    def layout(self, position: int, side: Side) -> tuple[int, int]:
        """`(tokens, width)` of the input or output of a position. Raises `PositionError`."""
        return self._encoder.layout(position, side)

    def to(self, device: torch.device) -> PlacedEncoder:
        """The same encoder on another device."""
        return PlacedEncoder(self._encoder, replace(self.compute, device="cuda" if device.type == "cuda" else "cpu"))

    def prefix(self, x: Tensor, m: int) -> Tensor:
        """Run from the input through block `m`: `(batch, tokens, width)`."""
        return self._in_parts(("prefix", m), lambda part: (self._encoder.prefix(part, m),), x)[0]

    def taps(self, x: Tensor, reduce: Reduce = mean_over_tokens) -> Taps:
        """Every position's reduced input and output in one pass."""

        def step(part: Tensor) -> tuple[Tensor, ...]:
            # A mean in half precision would lose what many tokens have in common.
            found = self._encoder.taps(part, lambda h: reduce(h.float()))
            return (*found.inputs, *found.outputs, found.tokens)

        found, n = self._in_parts(("taps", reduce), step, x), self.positions
        return Taps(inputs=found[:n], outputs=found[n:-1], tokens=found[-1])

    def input_tokens(self, x: Tensor, l: int) -> Tensor:  # noqa: E741
        """The unpooled input of block `l`, `(batch, tokens, width)`. Raises `PositionError`."""
        self.layout(l, "in")
        if l > 0:
            return self.prefix(x, l - 1)
        return self._in_parts("input", lambda part: (self._encoder.taps(part, lambda h: h).inputs[0],), x)[0]

    def suffix(self, h: Tensor, l: int) -> Tensor:  # noqa: E741
        """Run blocks `l ..` on `h`, the input of block `l`: the final tokens `(batch, tokens, width)`."""

        def step(part: Tensor) -> tuple[Tensor, ...]:
            return (self._encoder.suffix(part, l),)

        if not (torch.is_grad_enabled() and h.requires_grad):
            return self._in_parts(("suffix", l), step, h)[0]
        cost = self._bytes(("training", l), lambda: training_bytes(lambda part: self._call(step, part)[0], _one_of(h)))
        if cost * len(h) <= self.compute.memory_bytes:
            return self._call(step, h)[0]
        at_once = windows_at_once(self.compute, cost, len(h))
        again = self._by_block(l) if cost > self.compute.memory_bytes else step
        parts = torch.split(h, at_once)
        kept = [checkpoint(self._call, again, each, use_reentrant=False, preserve_rng_state=False) for each in parts]
        return torch.cat([found for (found,) in kept])

    def _by_block(self, l: int) -> _Step:  # noqa: E741
        """The suffix of one window where even that does not fit: block by block, if the network can be cut so."""
        encoder = self._encoder
        if isinstance(encoder, SplitEncoder):
            return lambda part: (encoder.suffix_by_block(part, l),)
        return lambda part: (encoder.suffix(part, l),)

    def _in_parts(self, call: object, step: _Step, x: Tensor) -> tuple[Tensor, ...]:
        cost = self._bytes(call, lambda: inference_bytes(lambda: self._call(step, _one_of(x))))
        at_once = max(1, windows_at_once(self.compute, cost, len(x)))
        parts = [self._call(step, part) for part in torch.split(x, at_once)]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def _call(self, step: _Step, x: Tensor) -> tuple[Tensor, ...]:
        """One call of the network, from and to float32 on the CPU."""
        there = x.to(self.compute.device)
        scaled = self.compute.precision == "float16" and there.requires_grad
        scale = _GradientScale()
        if scaled:
            there = scale.leaving(there)
        with self._precision():
            found = step(there)
        home = tuple(each.to("cpu", torch.float32) for each in found)
        return tuple(scale.entering(each) for each in home) if scaled else home

    def _precision(self) -> AbstractContextManager[object]:
        if self.compute.precision == "float32":
            return nullcontext()
        return torch.autocast(self.compute.device, dtype=getattr(torch, self.compute.precision))

    def _bytes(self, call: object, measure: Callable[[], int]) -> int:
        key = (self.digest, self.compute.device, self.compute.precision, call)
        if not self.digest:
            return measure()
        if key not in _measured:
            _measured[key] = measure()
        return _measured[key]


class _GradientScale:
    """Keeps gradients within float16 on their way back through a network: each window's enter with a largest entry of
    about one, by a power of two that is taken out again where they leave.

    By window, so that under a privacy mechanism no patient's gradient depends on another's.
    """

    def __init__(self) -> None:
        self._factors = torch.ones(())

    def entering(self, output: Tensor) -> Tensor:
        """The network's output, from where gradients enter."""

        def enlarge(gradient: Tensor) -> Tensor:
            self._factors = _inverse_sizes(gradient)
            return gradient * self._factors

        output.register_hook(enlarge)  # type: ignore[no-untyped-call]
        return output

    def leaving(self, start: Tensor) -> Tensor:
        """The network's input, to where gradients leave."""
        own = start.view_as(start)  # other ways back to `start` are not scaled
        own.register_hook(lambda gradient: gradient / self._factors.to(gradient.device))  # type: ignore[no-untyped-call]
        return own


def _inverse_sizes(gradient: Tensor) -> Tensor:
    """For each window the power of two that brings its largest entry near one, `(windows, 1, 1)`; 1 where that entry is
    zero or not finite."""
    largest = gradient.abs().amax(dim=(1, 2), keepdim=True)
    size = largest.clamp(2.0**-_MOST, 2.0**_MOST)
    usable = (largest > 0) & torch.isfinite(largest)
    return torch.where(usable, torch.frexp(size).mantissa / size, torch.ones_like(size))


def _one_of(x: Tensor) -> Tensor:
    """One window of zeros like those of `x`: what a pass needs does not depend on values."""
    return torch.zeros(1, *x.shape[1:], dtype=x.dtype)

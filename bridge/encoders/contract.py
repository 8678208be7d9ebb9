"""Contract test kit: run `check_encoder` on an encoder of your own before a site uses it (docs/own-encoder.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bridge.encoders.protocol import Encoder, mean_over_tokens
from bridge.errors import PositionError, WeightsError, WindowError

_TOLERANCE = 1e-5
_BATCH = 4


def check_encoder(encoder: Encoder, *, seed: int = 0) -> None:
    """Raise `WeightsError` naming the first clause of the contract that `encoder` breaks; return nothing if it holds.

    In this order: it is an `Encoder`; parameters are frozen and the network is in eval mode; positions out of range
    and windows of another shape are refused; every layout is true; `suffix` continues `prefix` to the same final
    tokens; `taps` gives what `prefix` gives; a window's result does not depend on its batch (to 1e-5); a gradient flows
    through `suffix` to its input; the digest is a sha256 and stays the same.
    """
    _require(isinstance(encoder, Encoder), "it has every member of the protocol", "some are missing")
    _require(encoder.positions >= 1, "it has at least one position", f"positions is {encoder.positions}")
    digest = encoder.digest
    is_hash = len(digest) == 64 and all(c in "0123456789abcdef" for c in digest)
    _require(is_hash, "the digest is a hex sha256", f"it is {digest!r}")
    _check_frozen(encoder)
    _check_refusals(encoder)
    window = encoder.window
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(_BATCH, len(window.channels), window.samples, generator=generator)
    with torch.no_grad():
        _check_layouts_and_splits(encoder, x)
        _check_taps(encoder, x)
        _check_batch_independence(encoder, x)
    _check_gradients(encoder, x)
    _require(encoder.digest == digest, "the digest stays the same", "it changed while the encoder was used")


def _require(holds: bool, clause: str, found: str) -> None:
    if not holds:
        raise WeightsError(f"the encoder breaks its contract: {clause}", why=found, fix="see docs/own-encoder.md")


def _require_close(a: Tensor, b: Tensor, clause: str) -> None:
    _require(a.shape == b.shape, clause, f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    gap = float((a - b).abs().max())
    scale = max(1.0, float(b.abs().max()))
    _require(gap <= _TOLERANCE * scale, clause, f"they differ by {gap:.2g}")


@contextmanager
def _must_refuse(kind: type[Exception], clause: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    _require(False, clause, f"no {kind.__name__} was raised")


def _check_frozen(encoder: Encoder) -> None:
    if not isinstance(encoder, nn.Module):
        return
    _require(not encoder.training, "it is in eval mode", "it is in training mode")
    free = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    _require(not free, "its parameters are frozen", f"{len(free)} want gradients, such as {free[:1]}")


def _check_refusals(encoder: Encoder) -> None:
    window = encoder.window
    for bad in (-1, encoder.positions):
        with _must_refuse(PositionError, f"position {bad} is refused"):
            encoder.layout(bad, "in")
    short = torch.zeros(1, len(window.channels), window.samples - 1)
    with torch.no_grad(), _must_refuse(WindowError, "windows of another length are refused"):
        encoder.prefix(short, 0)


def _check_layouts_and_splits(encoder: Encoder, x: Tensor) -> None:
    last = encoder.positions - 1
    final = encoder.prefix(x, last)
    for i in range(encoder.positions):
        h = encoder.prefix(x, i)
        wanted = (len(x), *encoder.layout(i, "out"))
        _require(tuple(h.shape) == wanted, f"layout({i}, 'out') is true", f"{tuple(h.shape)}, not {wanted}")
        _require(bool(torch.isfinite(h).all()), f"the output of position {i} is finite", "it holds NaN or infinity")
        if i < last:
            following = (len(x), *encoder.layout(i + 1, "in"))
            _require(
                tuple(h.shape) == following, f"layout({i + 1}, 'in') is true", f"{tuple(h.shape)}, not {following}"
            )
            _require_close(encoder.suffix(h, i + 1), final, f"suffix(prefix(x, {i}), {i + 1}) gives the final tokens")


def _check_taps(encoder: Encoder, x: Tensor) -> None:
    taps = encoder.taps(x, lambda h: h)
    counts = (len(taps.inputs), len(taps.outputs))
    _require(counts == (encoder.positions,) * 2, "taps has one input and output a position", f"it has {counts}")
    for i in range(encoder.positions):
        shape = tuple(taps.inputs[i].shape)
        wanted = (len(x), *encoder.layout(i, "in"))
        _require(shape == wanted, f"layout({i}, 'in') is true", f"taps gives {shape}, not {wanted}")
        _require_close(taps.outputs[i], encoder.prefix(x, i), f"taps' output {i} equals prefix(x, {i})")
        _require_close(encoder.suffix(taps.inputs[i], i), taps.tokens, f"suffix(input {i}, {i}) gives the final tokens")
    pooled = encoder.taps(x)
    for i in range(encoder.positions):
        _require_close(pooled.outputs[i], mean_over_tokens(taps.outputs[i]), f"taps pools output {i} by the mean")
        _require_close(pooled.inputs[i], mean_over_tokens(taps.inputs[i]), f"taps pools input {i} by the mean")


def _check_batch_independence(encoder: Encoder, x: Tensor) -> None:
    together = encoder.prefix(x, encoder.positions - 1)
    for row in range(len(x)):
        alone = encoder.prefix(x[row : row + 1], encoder.positions - 1)
        _require_close(alone, together[row : row + 1], "a window's tokens do not depend on its batch")


def _check_gradients(encoder: Encoder, x: Tensor) -> None:
    for i in range(encoder.positions):
        with torch.no_grad():
            h = encoder.taps(x, lambda t: t).inputs[i]
        h = h.detach().requires_grad_(True)
        # A plain sum can be constant behind a layer norm: weigh the entries.
        weights = torch.linspace(-1, 1, encoder.suffix(h, i).numel())
        (encoder.suffix(h, i).flatten() * weights).sum().backward()  # type: ignore[no-untyped-call]
        flows = h.grad is not None and bool(torch.isfinite(h.grad).all()) and float(h.grad.abs().max()) > 0
        _require(flows, f"a gradient flows through suffix(h, {i}) to h", "it is absent, zero or not finite")

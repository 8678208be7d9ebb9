"""The sum of patients' clipped gradients of the bridge, through the frozen suffix behind it.

Unit: the patient; sensitivity of the sum to adding or removing one: the clipping bound. Three methods give the same:

- `ghost` (Li et al. 2022; book-keeping: Bu et al. 2023), the fastest (benchmarks/private_step.py): one backward pass
  to the outputs of the bridge's layers; a layer's norms from a patient's activations and output gradients, its clipped
  sum as one matrix product;
- `materialised`: every patient's gradient of every weight, by Opacus;
- `loop`: one patient at a time, by autograd alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bridge.alignment import Align
from bridge.privacy.mechanism import Batch
from bridge.prototype import PrototypeBridge
from bridge.shape import BridgeShape

Method = Literal["ghost", "materialised", "loop"]

Sums = dict[str, NDArray[np.float64]]
"""By parameter name, in the method's shapes (`BridgeShape.arrays`)."""

NUMBERS_AT_ONCE = 2**19
"""A draw is worked off in chunks of whole patients, whose old tokens are about so many numbers: the suffix keeps about
0.1 kB for each of them and block. The chunks' sums are added up, so they do not change the step."""

_MARGIN = 1e-6
"""A clipped gradient is shorter than the bound by this share, so that rounding does not carry it over."""


def clipped_sum(bridge: PrototypeBridge, batch: Batch, align: Align, clip: float, method: Method = "ghost") -> Sums:
    """Sum over the batch's patients of each one's loss gradient, scaled down to an L2 norm of `clip` over all trained
    parameters; float64 by name, in the shapes of the bridge's arrays.

    A patient without a window adds nothing, and neither does one whose gradient is not finite or whose data raises an
    error; a batch of nobody gives zeros. `align` must give each patient a loss of that patient's data alone.
    """
    _check(batch, clip)
    # What lies behind the mask must not reach a product: 0 * NaN is NaN.
    features = torch.where(batch.mask[..., None], batch.features, torch.zeros_like(batch.features))
    batch = Batch(features, batch.targets, batch.mask)
    patients = 1 if method == "loop" else patients_at_once(bridge.shape, batch.mask.shape[1])
    total = {name: np.zeros(bridge.shape.arrays()[name]) for name in bridge.shape.trained}
    for part in _chunks(batch, patients):
        for name, sums in _careful(_METHODS[method], bridge, part, align, clip).items():
            total[name] += sums.numpy()
    return total


def patients_at_once(shape: BridgeShape, windows: int) -> int:
    """Patients of a chunk, at least one: that is the loop, where the old encoder is large."""
    return max(1, NUMBERS_AT_ONCE // max(1, windows * shape.tokens_old * shape.width_old))


Way = Callable[[PrototypeBridge, Batch, Align, float], dict[str, Tensor]]


def _careful(way: Way, bridge: PrototypeBridge, batch: Batch, align: Align, clip: float) -> dict[str, Tensor]:
    """An error of one patient's data must not show: patients are then taken one by one, and those that raise left
    out."""
    try:
        return way(bridge, batch, align, clip)
    except Exception:
        if len(batch.mask) == 1:
            return {}
    total: dict[str, Tensor] = {}
    for one in _chunks(batch, 1):
        for name, sums in _careful(way, bridge, one, align, clip).items():
            total[name] = total[name] + sums if name in total else sums
    return total


def _ghost(bridge: PrototypeBridge, batch: Batch, align: Align, clip: float) -> dict[str, Tensor]:
    names = bridge.shape.trained
    with _recorded(bridge, names) as seen:
        loss = align(bridge(batch.features), batch).sum()
    gradients = torch.autograd.grad(loss, [seen[name][1] for name in names])
    # Norms and sums in double: a norm that came out too small would let more through than the bound.
    layers = {
        name: (_by_patient(seen[name][0].detach()), _by_patient(gradient))
        for name, gradient in zip(names, gradients, strict=True)
    }
    squares = torch.stack([_square_norms(inputs, outputs) for inputs, outputs in layers.values()]).sum(dim=0)
    factors, good = _factors(squares, clip)
    return {
        name: inputs[good].flatten(0, 1).T @ (outputs[good] * factors[good, None, None]).flatten(0, 1)
        for name, (inputs, outputs) in layers.items()
    }


def _materialised(bridge: PrototypeBridge, batch: Batch, align: Align, clip: float) -> dict[str, Tensor]:
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(bridge, loss_reduction="sum", strict=True)
    try:
        # Opacus' hooks want an input that is differentiated by.
        loss = align(wrapped(batch.features.detach().requires_grad_()), batch).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: getattr(bridge, name).weight.grad_sample.double() for name in bridge.shape.trained}
    finally:
        wrapped.to_standard_module()
        for parameter in bridge.parameters():
            parameter.grad = None
    return _summed(gradients, clip)


def _loop(bridge: PrototypeBridge, batch: Batch, align: Align, clip: float) -> dict[str, Tensor]:
    weights = {name: getattr(bridge, name).weight for name in bridge.shape.trained}
    loss = align(bridge(batch.features), batch).sum()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return _summed({name: g.double()[None] for name, g in zip(weights, gradients, strict=True)}, clip)


_METHODS: dict[str, Way] = {"ghost": _ghost, "materialised": _materialised, "loop": _loop}


def _summed(gradients: dict[str, Tensor], clip: float) -> dict[str, Tensor]:
    """From `(patients, out, in)` gradients of `nn.Linear` weights to clipped sums `(in, out)`."""
    squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0)
    factors, good = _factors(squares, clip)
    return {name: torch.einsum("p,poi->io", factors[good], g[good]) for name, g in gradients.items()}


def _factors(squares: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Of each patient's gradient: what it is multiplied by, and whether it counts, being finite."""
    norms = squares.sqrt()
    return (clip / (norms * (1 + _MARGIN)).clamp(min=clip)), torch.isfinite(norms)


def _square_norms(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Squared norms of a linear layer's gradients `sum_t inputs_t outputs_t'`, from `(patients, t, in)` and `(patients,
    t, out)`: by the products themselves or, where there are few t, by those of all pairs of t."""
    steps, width_in, width_out = inputs.shape[1], inputs.shape[2], outputs.shape[2]
    if steps * (width_in + width_out) < width_in * width_out:
        pairs = (inputs @ inputs.transpose(1, 2)) * (outputs @ outputs.transpose(1, 2))
        return pairs.sum(dim=(1, 2)).clamp(min=0)
    return (inputs.transpose(1, 2) @ outputs).square().sum(dim=(1, 2))


@contextmanager
def _recorded(bridge: PrototypeBridge, names: tuple[str, ...]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What each named layer reads and gives, while it is open."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0], output)

        return hook

    handles = [getattr(bridge, name).register_forward_hook(record(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _by_patient(values: Tensor) -> Tensor:
    """`(patients, ..., width)` as `(patients, t, width)`, float64."""
    return values.flatten(1, -2).double()


def _chunks(batch: Batch, patients: int) -> Iterator[Batch]:
    for start in range(0, len(batch.mask), patients):
        rows = slice(start, start + patients)
        yield Batch(batch.features[rows], batch.targets[rows], batch.mask[rows])


def _check(batch: Batch, clip: float) -> None:
    """What is wrong with everybody's data is a mistake of the caller, and must not pass for one patient's."""
    if batch.features.ndim != 3 or batch.features.shape[:2] != batch.mask.shape:
        raise ValueError(
            f"features {tuple(batch.features.shape)} are not (patients, windows, width) for a mask "
            f"{tuple(batch.mask.shape)}"
        )
    if len(batch.targets) != len(batch.mask):
        raise ValueError(f"{len(batch.targets)} patients' targets for {len(batch.mask)} patients")
    if not clip > 0:
        raise ValueError(f"the clipping bound {clip:g} is not positive")

"""Made bridges and batches, and the gradient of one patient written out on the method's matrices."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridge.alignment import Align
from bridge.privacy import Batch
from bridge.prototype import PrototypeBridge
from bridge.shape import BridgeShape

Sums = dict[str, NDArray[np.float64]]


def made_bridge(shape: BridgeShape, seed: int = 0, scale: float = 1.0) -> PrototypeBridge:
    """Every array random, B too, so that every gradient is there."""
    rng = np.random.default_rng(seed)
    bridge = PrototypeBridge(shape)
    arrays = {name: rng.normal(size=size) * scale / np.sqrt(size[0]) for name, size in shape.arrays().items()}
    bridge.load_arrays({name: array.astype(np.float32) for name, array in arrays.items()})
    return bridge


def made_batch(shape: BridgeShape, patients: int, windows: int, seed: int = 0, present: float = 0.7) -> Batch:
    """Random features and targets; some windows masked, and for some seeds whole patients."""
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(patients, windows, shape.width_new)).astype(np.float32))
    targets = torch.from_numpy(
        rng.normal(size=(patients, windows, shape.tokens_old, shape.width_old)).astype(np.float32)
    )
    return Batch(features, targets, torch.from_numpy(rng.random((patients, windows)) < present))


def only(batch: Batch, patient: int) -> Batch:
    rows = slice(patient, patient + 1)
    return Batch(batch.features[rows], batch.targets[rows], batch.mask[rows])


def one_gradient(bridge: PrototypeBridge, batch: Batch, align: Align) -> Sums:
    """Of a batch of one patient: the forward pass by its formula, the gradient by autograd."""
    shape = bridge.shape
    arrays = {name: torch.from_numpy(array) for name, array in bridge.arrays().items()}
    trained = {name: arrays[name].requires_grad_() for name in shape.trained}
    gradients = torch.autograd.grad(align(forward(shape, arrays, batch.features), batch).sum(), list(trained.values()))
    return {name: g.double().numpy() for name, g in zip(trained, gradients, strict=True)}


def forward(shape: BridgeShape, arrays: dict[str, Tensor], x: Tensor) -> Tensor:
    if shape.components:
        white = (x - arrays["mean"]) @ arrays["whitening"]
        x = torch.cat([white, torch.ones((*x.shape[:-1], 1))], dim=-1)
    mixing = (x @ arrays["A"] @ arrays["B"]).reshape(*x.shape[:-1], -1, shape.prototypes)
    if shape.cosines:
        t = np.arange(shape.tokens_old) + 0.5
        rows = [np.cos(np.pi * k * t / shape.tokens_old) for k in range(shape.cosines)]
        phi = torch.from_numpy(np.stack([row / np.linalg.norm(row) for row in rows])).float()
        mixing = torch.einsum("kt,...kp->...tp", phi, mixing)
    tokens = mixing @ arrays["P"]
    return tokens + arrays["constant"] if shape.constant else tokens


def length(sums: Sums) -> float:
    return float(np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in sums.values())))


def microbatches(bridge: PrototypeBridge, batch: Batch, align: Align, clip: float) -> tuple[Sums, list[float]]:
    """Patient by patient: gradient, norm, clip, add. The sum, and each patient's norm."""
    total = {name: np.zeros(bridge.shape.arrays()[name]) for name in bridge.shape.trained}
    norms = []
    for patient in range(len(batch.mask)):
        own = one_gradient(bridge, only(batch, patient), align)
        norms.append(length(own))
        if not np.isfinite(norms[-1]):
            continue
        for name, gradient in own.items():
            total[name] += gradient * min(1.0, clip / norms[-1] if norms[-1] else 1.0)
    return total, norms

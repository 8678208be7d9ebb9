"""Weights and inputs as the fixtures' recipes fix them, so that nobody needs the originals' files.

Every number is a function of a text and a shape: the text's SHA-256 is the key of a Philox stream, of which 24 bits a
number are used, and what follows is plain double-precision arithmetic. So any machine makes the same bits. The order of
operations below is part of the recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Profile = Literal["normal", "small"]
"""`small` keeps a network's activations near 0.02, where a wrong epsilon of a norm shows."""

Shape = tuple[int, ...]
Floats = NDArray[np.float64]

_SPREAD = 3.4641016151377544
"""Square root of 12: width of a uniform distribution of standard deviation 1."""
_SMALL = 0.02
_EMBEDDINGS = ("pos_embed", "time_embed", "cls_token", "mask_emb", "mask_token", "masked_spec_embed", "tokens")
_GAINS = ("weight_g", "original0")
_HEAD_NORMS = ("q_norm", "k_norm")


def noise(tag: str, shape: Shape) -> Floats:
    """Uniform numbers of mean 0 and standard deviation 1, fixed by `tag` and `shape`."""
    digest = hashlib.sha256(f"{tag}|{'x'.join(map(str, shape))}".encode()).digest()
    stream = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
    raw = stream.random_raw(int(np.prod(shape, dtype=np.int64)))
    return (((raw >> np.uint64(40)).astype(np.float64) * 2.0**-24 - 0.5) * _SPREAD).reshape(shape)


def weight(name: str, shape: Shape, dtype: torch.dtype, seed: int, profile: Profile) -> Tensor:
    """One entry of a published file; what it is made of depends on what its name says that it is."""
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    values = _values(name, shape, noise(f"{seed}|{name}", shape), _SMALL if profile == "small" else 1.0)
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def _values(name: str, shape: Shape, z: Floats, small: float) -> Floats:
    leaf = name.rpartition(".")[2]
    if leaf == "running_var":
        return (1.0 + z / _SPREAD) * small * small
    if leaf == "running_mean":
        return 0.2 * z * small
    if leaf in _GAINS:
        return 2.0 * (1.0 + 0.1 * z)
    if leaf.startswith("gamma"):
        return 0.5 + 0.1 * z
    if any(word in name for word in _EMBEDDINGS):
        return 0.5 * z * small
    if len(shape) > 1:
        return z / float(np.sqrt(float(np.prod(shape[1:], dtype=np.int64))))
    if leaf == "weight":
        return (1.0 + 0.2 * z) * (1.0 if any(word in name for word in _HEAD_NORMS) else small)
    return 0.1 * z * small


def signal(tag: str, shape: Shape, amplitude: float) -> Tensor:
    """A signal `(..., time)`, float32: three triangle waves and noise, rows differing in period, phase and height."""
    rows, length = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
    knobs = noise(f"{tag}|knobs", (rows, 3, 3)) / _SPREAD + 0.5
    time = np.arange(length, dtype=np.float64)
    values = np.zeros((rows, length))
    for wave in range(3):
        period, phase, height = (knobs[:, wave, knob, None] for knob in range(3))
        cycle = time / (8.0 * 4.0**wave * (1.0 + period)) + phase
        values += (4.0 * np.abs(cycle - np.floor(cycle) - 0.5) - 1.0) * (0.4 + height)
    values += 0.3 * noise(f"{tag}|noise", (rows, length))
    return torch.from_numpy((amplitude * values).reshape(shape)).float()


def tokens(tag: str, shape: Shape, scale: float) -> Tensor:
    """What is written into the middle of a network, float32."""
    return torch.from_numpy(scale * noise(f"{tag}|tokens", shape)).float()


def checkpoint_sha256(state: Mapping[str, Tensor]) -> str:
    """Digest over names in order, shapes, kinds of number and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name].numpy())
        digest.update(f"{name}|{tuple(state[name].shape)}|{array.dtype}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Digest of a tensor's bytes."""
    return hashlib.sha256(np.ascontiguousarray(tensor.numpy()).data).hexdigest()

"""The prototype bridge: a low-rank map from one pooled new-modality vector to a full set of old-modality tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bridge.cosines import cosine_basis
from bridge.errors import WeightsError
from bridge.shape import CONSTANTS, PARAMETERS, BridgeShape

Arrays = dict[str, NDArray[np.float32]]
"""A bridge's arrays by name, in the shapes of `BridgeShape.arrays`: A, B, P as in the method, then public constants."""


class PrototypeBridge(nn.Module):
    """From pooled features `(..., d_new)` to old tokens `(..., tokens_old, d_old)`, in one of these forms:

    - the paper's: `reshape(h A B) P` (BioX-Bridge, section 3);
    - `cosines` K > 0: `M = reshape(x A B)` has a row for each of K cosines instead of each token, and token t of the
      output is `sum_k phi_k(t) (M P)_k`;
    - `components` > 0: A reads `x = [(h - mean) whitening, 1]` instead of `h`;
    - `constant`: old tokens are added to the output.

    A, B and P are bias-free `nn.Linear`, so that per-sample gradients have fast rules; a frozen P needs no gradient.
    The public constants are plain tensors, since Opacus refuses a module with buffers. `arrays` and `load_arrays` speak
    the method's shapes, which are the transposes of `nn.Linear.weight`.
    """

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.shape = shape
        self.A = nn.Linear(shape.rows, shape.rank, bias=False)
        self.B = nn.Linear(shape.rank, shape.columns, bias=False)
        self.P = nn.Linear(shape.prototypes, shape.width_old, bias=False)
        for name in PARAMETERS:
            self._linear(name).weight.requires_grad_(name in shape.trained)
        self._constants = {name: torch.zeros(size) for name, size in shape.arrays().items() if name in CONSTANTS}
        self._cosines = (
            torch.from_numpy(cosine_basis(shape.cosines, shape.tokens_old)).float() if shape.cosines else None
        )

    def forward(self, h: Tensor) -> Tensor:
        """Pooled features `(..., d_new)` to old tokens `(..., tokens_old, d_old)`."""
        coefficients = self.B(self.A(self.inputs(h)))
        out: Tensor = self.P(coefficients.unflatten(-1, (-1, self.shape.prototypes)))
        if self._cosines is not None:
            out = self._cosines.T @ out
        if self.shape.constant:
            out = out + self._constants["constant"]
        return out

    def inputs(self, h: Tensor) -> Tensor:
        """What A reads of pooled features: `(..., d_new)` to `(..., rows)`."""
        if not self.shape.components:
            return h
        white = (h - self._constants["mean"]) @ self._constants["whitening"]
        return torch.cat([white, white.new_ones((*white.shape[:-1], 1))], dim=-1)

    def arrays(self) -> Arrays:
        """A copy of all arrays, float32, by name."""
        found = {name: self._linear(name).weight.detach().T.cpu().numpy().astype(np.float32) for name in PARAMETERS}
        return found | {name: value.numpy().copy() for name, value in self._constants.items()}

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take all arrays by name; raises `WeightsError` on a missing, extra or misshapen one, changing nothing."""
        check_arrays(self.shape, arrays)
        taken = {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in arrays.items()}
        with torch.no_grad():
            for name in PARAMETERS:
                self._linear(name).weight.copy_(taken[name].T)
        self._constants = {name: taken[name] for name in self._constants}

    def _linear(self, name: str) -> nn.Linear:
        linear = getattr(self, name)
        assert isinstance(linear, nn.Linear)
        return linear


def check_arrays(shape: BridgeShape, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise `WeightsError` unless these are all the arrays of a bridge, in its shapes."""
    wanted = shape.arrays()
    if set(arrays) != set(wanted):
        raise WeightsError(
            f"a bridge has the parameters {list(wanted)}, not {sorted(arrays)}", fix="load a whole bridge"
        )
    for name, size in wanted.items():
        if tuple(arrays[name].shape) != size:
            raise WeightsError(
                f"bridge parameter {name} has shape {tuple(arrays[name].shape)}",
                why=f"this bridge needs {size}",
                fix="load a bridge of the same form, rank, prototypes and positions",
            )


def initial_arrays(
    shape: BridgeShape,
    seed: int,
    prototypes: NDArray[Any] | None = None,
    constants: Mapping[str, NDArray[Any]] | None = None,
) -> Arrays:
    """The start of training: A Kaiming-uniform, B zeros, prototypes standard normal or the given PUBLIC vectors.

    `prototypes (n_prototypes, d_old)` replaces the random ones; it must come from public recordings, since what a
    server broadcasts must never have been a patient's. `constants` are the public ones that the shape has; raises
    `WeightsError` where they are others. Source: the paper's released scripts (`rand_N`).
    """
    generator = torch.Generator().manual_seed(seed)
    a = torch.empty(shape.rank, shape.rows)
    nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
    p = torch.randn(shape.prototypes, shape.width_old, generator=generator).numpy()
    if prototypes is not None:
        if prototypes.shape != p.shape:
            raise WeightsError(f"public prototypes of shape {prototypes.shape} do not fit", why=f"{p.shape} are needed")
        p = prototypes.astype(np.float32)
    arrays = {"A": a.T.contiguous().numpy(), "B": np.zeros(shape.arrays()["B"], np.float32), "P": p}
    arrays |= {name: np.asarray(value, np.float32) for name, value in (constants or {}).items()}
    check_arrays(shape, arrays)
    return arrays

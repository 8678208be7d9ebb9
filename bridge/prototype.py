"""The prototype bridge: a low-rank map from one pooled new-modality vector to a full set of old-modality tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bridge.errors import WeightsError

Arrays = dict[str, NDArray[np.float32]]
"""Parameters by name: A `(d_new, rank)`, B `(rank, tokens*prototypes)`, P `(prototypes, d_old)`, as in the method."""

PARAMETERS = ("A", "B", "P")


@dataclass(frozen=True)
class BridgeShape:
    """All sizes of a bridge: the only thing needed to build one."""

    width_new: int
    rank: int
    tokens_old: int
    prototypes: int
    width_old: int

    @property
    def parameters(self) -> int:
        """d_new*r + r*tokens*prototypes + prototypes*width (BioX-Bridge, section 3)."""
        return sum(rows * columns for rows, columns in self.arrays().values())

    def arrays(self) -> dict[str, tuple[int, int]]:
        """Shape of each parameter by name."""
        return {
            "A": (self.width_new, self.rank),
            "B": (self.rank, self.tokens_old * self.prototypes),
            "P": (self.prototypes, self.width_old),
        }


class PrototypeBridge(nn.Module):
    """`output = reshape(h A B) P`: from `(..., d_new)` to `(..., tokens_old, d_old)` (BioX-Bridge, section 3).

    Three bias-free `nn.Linear`, so that per-sample gradients have fast rules. `arrays` and `load_arrays` speak the
    method's shapes, which are the transposes of `nn.Linear.weight`.
    """

    def __init__(self, shape: BridgeShape) -> None:
        super().__init__()
        self.shape = shape
        self.A = nn.Linear(shape.width_new, shape.rank, bias=False)
        self.B = nn.Linear(shape.rank, shape.tokens_old * shape.prototypes, bias=False)
        self.P = nn.Linear(shape.prototypes, shape.width_old, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Pooled features `(..., d_new)` to old tokens `(..., tokens_old, d_old)`."""
        mixing = self.B(self.A(h)).unflatten(-1, (self.shape.tokens_old, self.shape.prototypes))
        out: Tensor = self.P(mixing)
        return out

    def arrays(self) -> Arrays:
        """A copy of the parameters, float32, by name."""
        return {name: self._linear(name).weight.detach().T.cpu().numpy().astype(np.float32) for name in PARAMETERS}

    def load_arrays(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take parameters by name; raises `WeightsError` on a missing, extra or misshapen one, changing nothing."""
        wanted = self.shape.arrays()
        if set(arrays) != set(wanted):
            raise WeightsError(
                f"a bridge has the parameters {list(wanted)}, not {sorted(arrays)}", fix="load a whole bridge"
            )
        for name, shape in wanted.items():
            if tuple(arrays[name].shape) != shape:
                raise WeightsError(
                    f"bridge parameter {name} has shape {tuple(arrays[name].shape)}",
                    why=f"this bridge needs {shape}",
                    fix="load a bridge of the same rank, prototypes and positions",
                )
        with torch.no_grad():
            for name in wanted:
                weight = self._linear(name).weight
                weight.copy_(torch.from_numpy(np.array(arrays[name], dtype=np.float32)).T)

    def _linear(self, name: str) -> nn.Linear:
        linear = getattr(self, name)
        assert isinstance(linear, nn.Linear)
        return linear


def initial_arrays(shape: BridgeShape, seed: int, prototypes: NDArray[Any] | None = None) -> Arrays:
    """The start of training: A Kaiming-uniform, B zeros, prototypes standard normal or the given PUBLIC vectors.

    `prototypes (n_prototypes, d_old)` replaces the random ones; it must come from public recordings, since what a
    server broadcasts must never have been a patient's. Source: the paper's released scripts (`rand_N`).
    """
    generator = torch.Generator().manual_seed(seed)
    a = torch.empty(shape.rank, shape.width_new)
    nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
    p = torch.randn(shape.prototypes, shape.width_old, generator=generator).numpy()
    if prototypes is not None:
        if prototypes.shape != p.shape:
            raise WeightsError(f"public prototypes of shape {prototypes.shape} do not fit", why=f"{p.shape} are needed")
        p = prototypes.astype(np.float32)
    return {"A": a.T.contiguous().numpy(), "B": np.zeros(shape.arrays()["B"], np.float32), "P": p}

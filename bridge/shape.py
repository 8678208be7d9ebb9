"""All sizes of a bridge, from the job and the encoders' cards. Imports no torch: a site checks a message by it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from bridge.encoders.cards import EncoderCard
from bridge.job import BridgeJob

PARAMETERS = ("A", "B", "P")
CONSTANTS = ("mean", "whitening", "constant")
"""Frozen public arrays that may travel beside the parameters: the features' mean and whitening, and old tokens that are
added to the bridge's."""


@dataclass(frozen=True)
class BridgeShape:
    """The only thing needed to build a bridge.

    `cosines` 0 is the paper's bridge, whose B has a column for each token and prototype; K > 0 the factored one, whose
    token axis is spanned by K cosines. `components` 0 reads the features as they are; k > 0 reads k whitened components
    and a one. `constant`: public old tokens are added. `frozen_prototypes`: P is public and not trained.
    """

    width_new: int
    rank: int
    tokens_old: int
    prototypes: int
    width_old: int
    cosines: int = 0
    components: int = 0
    constant: bool = False
    frozen_prototypes: bool = False

    @classmethod
    def of(cls, job: BridgeJob, old: EncoderCard, new: EncoderCard, positions: tuple[int, int]) -> BridgeShape:
        """Of the job's bridge from the output of new position `m` to the input of old position `l`.

        Raises `PositionError`.
        """
        m, l = positions  # noqa: E741
        tokens, width = old.layout(l, "in")
        width_new = new.layout(m, "out")[1]
        components = 0
        if job.whitening == "public":
            components = min(job.components or width_new, width_new)
        return cls(
            width_new=width_new,
            rank=job.rank,
            tokens_old=tokens,
            prototypes=job.prototypes,
            width_old=width,
            cosines=min(job.cosines, tokens) if job.kind == "factored" else 0,
            components=components,
            constant=job.constant == "public",
            frozen_prototypes=job.frozen_prototypes,
        )

    @property
    def rows(self) -> int:
        """Rows of A: numbers that it reads."""
        return self.components + 1 if self.components else self.width_new

    @property
    def columns(self) -> int:
        """Columns of B: coefficients of a window."""
        return (self.cosines or self.tokens_old) * self.prototypes

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the parameters that training changes."""
        return PARAMETERS[:2] if self.frozen_prototypes else PARAMETERS

    @property
    def parameters(self) -> int:
        """Numbers that are trained: for the paper's bridge d_new*r + r*tokens*prototypes + prototypes*width
        (BioX-Bridge, section 3)."""
        shapes = self.arrays()
        return sum(prod(shapes[name]) for name in self.trained)

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Shape of each array of the bridge by name: the parameters, then the public constants that it has."""
        shapes: dict[str, tuple[int, ...]] = {
            "A": (self.rows, self.rank),
            "B": (self.rank, self.columns),
            "P": (self.prototypes, self.width_old),
        }
        if self.components:
            shapes |= {"mean": (self.width_new,), "whitening": (self.width_new, self.components)}
        if self.constant:
            shapes["constant"] = (self.tokens_old, self.width_old)
        return shapes

"""What public patients lend to a bridge: `public_vectors.safetensors` of a models folder, all float32.

For each old position `l`: `in.<l> (k, width)`, centroids of the tokens at its input, and `tokens.<l> (n, tokens,
width)`, such tokens of whole windows. For each new position `m`: `mean.<m> (width,)` and `covariance.<m> (width,
width)` of its pooled outputs. Compact encoders come with all of it. Tokens of published ones are large (those of one
window of NormWear: 5 megabytes a position), so for these only what the job asks for is made (`needed_by`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.encoders.loading import load_encoder
from bridge.encoders.protocol import Encoder
from bridge.job import BridgeJob, SelectionJob
from simulations.models.places import PUBLIC_VECTORS
from simulations.models.windows import PublicWindows, spread_rows

Vectors = dict[str, NDArray[Any]]
"""Public arrays by their key in the file."""

_BATCH = 64
_BATCH_BYTES = 2**28
"""Of the tokens at all inputs of a batch; sizes follow from layouts alone, so that results repeat to the bit."""
_TOKEN_WINDOWS = 64
"""Public windows whose tokens are kept: of as many patients, where there are so many."""
_CENTROID_WINDOWS = 256
"""Public windows whose tokens are clustered."""


@dataclass(frozen=True)
class Needed:
    """Which vectors a bridge asks for."""

    centroids: bool = True
    tokens: bool = True
    moments: bool = True
    position: int | None = None
    """The old position that they are for; None: all of them, since one is still to be selected."""

    @property
    def of_old(self) -> bool:
        """Whether the old modality's windows are read."""
        return self.centroids or self.tokens


def needed_by(bridge: BridgeJob, selection: SelectionJob) -> Needed:
    """What `server.initialisation` will read for this job."""
    return Needed(
        centroids=bridge.initialisation == "public",
        tokens=bridge.initialisation == "directions" or bridge.frozen_prototypes or bridge.constant == "public",
        moments=bridge.whitening == "public",
        position=selection.output_position,
    )


def save_public(folder: Path, vectors: Mapping[str, NDArray[Any]]) -> None:
    """Write the vectors into a models folder; no file where there are none."""
    from safetensors.numpy import save_file

    if vectors:
        plain = {name: np.ascontiguousarray(values, np.float32) for name, values in vectors.items()}
        save_file(plain, folder / PUBLIC_VECTORS)


def pooled_vectors(encoder: Path, new: PublicWindows) -> Vectors:
    """Mean and covariance of the pooled outputs of each new position, each patient weighing the same.

    `encoder` is the model folder.
    """
    import torch

    from bridge.public_constants import pooled_moments

    network = load_encoder(encoder)
    at_once = min(_BATCH, _at_once(network))
    with torch.no_grad():
        parts = (torch.from_numpy(new.x[first : first + at_once]) for first in range(0, len(new.x), at_once))
        taps = [network.taps(part).outputs for part in parts]
    found: Vectors = {}
    for position, outputs in enumerate(zip(*taps, strict=True)):
        mean, covariance = pooled_moments(torch.cat(outputs).numpy(), new.patients)
        found |= {f"mean.{position}": mean, f"covariance.{position}": covariance}
    return found


def token_vectors(encoder: Path, old: PublicWindows, position: int | None = None) -> Vectors:
    """Tokens of some windows at the input of each old position, or of one."""
    network = load_encoder(encoder)
    x = old.x[spread_rows(old.patients, _TOKEN_WINDOWS)]
    return {f"tokens.{each}": tokens for each, tokens in _inputs(network, x, _positions(network, position)).items()}


def centroid_vectors(
    encoder: Path, x: NDArray[np.float32], *, count: int, seed: int, position: int | None = None
) -> Vectors:
    """`count` k-means centroids of public tokens at the input of each old position, or of one; the largest cluster
    first."""
    from sklearn.cluster import MiniBatchKMeans

    network = load_encoder(encoder)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(x), min(len(x), _CENTROID_WINDOWS), replace=False))
    vectors: Vectors = {}
    for each in _positions(network, position):
        tokens = _inputs(network, x[chosen], [each])[each]
        flat = tokens.reshape(-1, tokens.shape[-1])
        kmeans = MiniBatchKMeans(min(count, len(flat)), random_state=seed, n_init=1, max_iter=30)
        sizes = np.bincount(kmeans.fit_predict(flat), minlength=kmeans.n_clusters)
        vectors[f"in.{each}"] = kmeans.cluster_centers_[np.argsort(-sizes, kind="stable")]
    return vectors


def _positions(encoder: Encoder, position: int | None) -> Sequence[int]:
    return range(encoder.positions) if position is None else [position]


def _inputs(encoder: Encoder, x: NDArray[np.float32], positions: Sequence[int]) -> dict[int, NDArray[Any]]:
    """The unpooled inputs `(n, tokens, width)` of these positions."""
    import torch

    at_once = _at_once(encoder)
    found: dict[int, list[torch.Tensor]] = {position: [] for position in positions}
    with torch.no_grad():
        for first in range(0, len(x), at_once):
            inputs = encoder.taps(torch.from_numpy(x[first : first + at_once]), lambda h: h).inputs
            for position in positions:
                found[position].append(inputs[position])
    return {position: torch.cat(parts).numpy() for position, parts in found.items()}


def _at_once(encoder: Encoder) -> int:
    numbers = sum(tokens * width for tokens, width in (encoder.layout(i, "in") for i in range(encoder.positions)))
    return max(1, _BATCH_BYTES // (4 * numbers))

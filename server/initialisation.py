"""The first broadcast: random, or with prototypes from PUBLIC vectors that come with the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from bridge.errors import WeightsError
from bridge.job import Job
from bridge.prototype import Arrays, initial_arrays
from bridge.shape import BridgeShape

PUBLIC_VECTORS = "public_vectors.safetensors"


def first_broadcast(job: Job, shape: BridgeShape, positions: tuple[int, int], models: Path) -> Arrays:
    """The bridge before round 1; the same job gives the same one. Raises `WeightsError` where public vectors are
    asked for and missing, too few, or of another width."""
    prototypes = None
    if job.bridge.initialisation == "public":
        vectors = public_vectors(models / PUBLIC_VECTORS, positions[1], shape)
        prototypes = centroids(vectors, shape.prototypes, job.seed)
    return initial_arrays(shape, job.seed, prototypes)


def public_vectors(path: Path, position: int, shape: BridgeShape) -> NDArray[np.float32]:
    """Token vectors `(k, d_old)` of public patients at the input of an old position."""
    key = f"in.{position}"
    try:
        vectors = load_file(path).get(key)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{path}: can't be read",
            why="bridge.initialisation is 'public', so vectors of public patients are needed",
            fix="copy the file that came with the models, or use initialisation 'random'",
        ) from error
    if vectors is None or vectors.ndim != 2 or vectors.shape[1] != shape.width_old or len(vectors) < shape.prototypes:
        found = "nothing" if vectors is None else f"shape {vectors.shape}"
        raise WeightsError(
            f"{path}: '{key}' holds {found}",
            why=f"at least {shape.prototypes} vectors of width {shape.width_old} are needed",
            fix="use fewer prototypes, other models, or initialisation 'random'",
        )
    return vectors.astype(np.float32)


def centroids(vectors: NDArray[Any], count: int, seed: int) -> NDArray[np.float32]:
    """`(count, width)` k-means centroids of `vectors (k, width)`, seeded."""
    from sklearn.cluster import KMeans

    fitted = KMeans(n_clusters=count, n_init=4, random_state=seed).fit(vectors)
    return np.asarray(fitted.cluster_centers_, np.float32)

"""The first broadcast: random, or with prototypes and constants from what PUBLIC patients left with the models."""

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
from bridge.public_constants import directions, scaled_prototypes, whitening
from bridge.shape import BridgeShape

PUBLIC_VECTORS = "public_vectors.safetensors"


def first_broadcast(job: Job, shape: BridgeShape, positions: tuple[int, int], models: Path) -> Arrays:
    """The bridge between `(m, l)` before round 1; the same job gives the same one. Raises `WeightsError` where public
    vectors are asked for and missing, too few, or of another width."""
    path = models / PUBLIC_VECTORS
    constants = _constants(path, shape, positions)
    return initial_arrays(shape, job.seed, _prototypes(job, path, shape, positions[1], constants), constants)


def _constants(path: Path, shape: BridgeShape, positions: tuple[int, int]) -> Arrays:
    """Those public arrays that the shape has."""
    m, l = positions  # noqa: E741
    found: dict[str, NDArray[Any]] = {}
    if shape.components:
        found["mean"] = _read(path, f"mean.{m}", (shape.width_new,))
        covariance = _read(path, f"covariance.{m}", (shape.width_new, shape.width_new))
        found["whitening"] = whitening(covariance, shape.components)
    if shape.constant:
        found["constant"] = public_tokens(path, l, shape).mean(axis=0, dtype=np.float64)
    return {name: value.astype(np.float32) for name, value in found.items()}


def _prototypes(
    job: Job, path: Path, shape: BridgeShape, position: int, constants: Arrays
) -> NDArray[np.float32] | None:
    """P by `bridge.initialisation`; None: random. Frozen public ones come scaled (`scaled_prototypes`)."""
    how = job.bridge.initialisation
    if how == "random":
        return None
    if how == "public":
        vectors = public_vectors(path, position, shape)
        chosen: NDArray[Any] = centroids(vectors, shape.prototypes, job.seed)
        if not shape.frozen_prototypes:
            return np.asarray(chosen, np.float32)
    tokens = public_tokens(path, position, shape).astype(np.float64)
    if shape.constant:
        tokens = tokens - constants["constant"]
    if how == "directions":
        chosen = directions(tokens, shape.prototypes, shape.cosines)
    if shape.frozen_prototypes:
        chosen = scaled_prototypes(chosen, tokens, shape.cosines)
    return np.asarray(chosen, np.float32)


def public_vectors(path: Path, position: int, shape: BridgeShape) -> NDArray[np.float32]:
    """Token vectors `(k, d_old)` of public patients at the input of an old position, k at least the prototypes."""
    return _read(path, f"in.{position}", (None, shape.width_old), at_least=shape.prototypes)


def public_tokens(path: Path, position: int, shape: BridgeShape) -> NDArray[np.float32]:
    """Whole windows of public old tokens at the input of an old position, `(windows, tokens, d_old)`."""
    return _read(path, f"tokens.{position}", (None, shape.tokens_old, shape.width_old), at_least=2)


def _read(path: Path, key: str, wanted: tuple[int | None, ...], at_least: int = 1) -> NDArray[np.float32]:
    """A finite array of the file, of the wanted sizes (None: `at_least`)."""
    try:
        found = load_file(path).get(key)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{path}: can't be read",
            why="the bridge asks for public vectors (its initialisation, whitening or constant), and they lie there",
            fix="copy the file that came with the models (of published ones it is made where the configuration asks "
            "for it: prepare again), or use initialisation 'random', no whitening and no constant",
        ) from error
    if found is None or not _fits(found, wanted, at_least) or not np.isfinite(found).all():
        sizes = " x ".join(f"at least {at_least}" if want is None else str(want) for want in wanted)
        raise WeightsError(
            f"{path}: '{key}' holds {'nothing' if found is None else f'shape {found.shape}'}",
            why=f"finite numbers of the shape {sizes} are needed",
            fix="use fewer prototypes, models that were prepared with this configuration, or initialisation 'random', "
            "no whitening and no constant",
        )
    return found.astype(np.float32)


def _fits(found: NDArray[Any], wanted: tuple[int | None, ...], at_least: int) -> bool:
    if found.ndim != len(wanted):
        return False
    return all(
        size >= at_least if want is None else size == want for size, want in zip(found.shape, wanted, strict=True)
    )


def centroids(vectors: NDArray[Any], count: int, seed: int) -> NDArray[np.float32]:
    """`(count, width)` k-means centroids of `vectors (k, width)`, seeded."""
    from sklearn.cluster import KMeans

    fitted = KMeans(n_clusters=count, n_init=4, random_state=seed).fit(vectors)
    return np.asarray(fitted.cluster_centers_, np.float32)

"""The method's statistics once more, in plain numpy on raw features: imports nothing of what it checks."""

from __future__ import annotations

import hashlib
import itertools
import json

import numpy as np


def hashed(key: str, *parts: str | int) -> int:
    """First 8 bytes, big endian, of the sha256 of the compact JSON list."""
    text = json.dumps([key, *parts], separators=(",", ":"), ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def ridge_score(
    x: np.ndarray, labels: np.ndarray, patients: np.ndarray, classes: int, folds: int, key: str, ridge: float
) -> float:
    """1 - SSE/SST over held-out folds of explicit ridge fits (stacked least squares) on all data at once."""
    x, y = x.astype(np.float64), np.array([[float(label == c) for c in range(classes)] for label in labels])
    fold = np.array([hashed(key, "fold", str(p)) % folds for p in patients])
    sse = sst = 0.0
    for f in range(folds):
        train, test = fold != f, fold == f
        if not test.any():
            continue
        mean_x, mean_y = x[train].mean(axis=0), y[train].mean(axis=0)
        centred = x[train] - mean_x
        strength = ridge * (centred**2).sum() / x.shape[1]
        stacked = np.vstack([centred, np.sqrt(strength) * np.eye(x.shape[1])])
        wanted = np.vstack([y[train] - mean_y, np.zeros((x.shape[1], classes))])
        weights = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
        sse += (((x[test] - mean_x) @ weights + mean_y - y[test]) ** 2).sum()
        sst += ((mean_y - y[test]) ** 2).sum()
    return float(1 - sse / sst)


def u_centred(x: np.ndarray) -> np.ndarray:
    """The U-centred linear Gram matrix (Szekely and Rizzo 2014, definition 2), element by element."""
    n, k = len(x), x.astype(np.float64) @ x.astype(np.float64).T
    np.fill_diagonal(k, 0.0)
    rows, total, out = k.sum(axis=1), k.sum(), np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                out[i, j] = k[i, j] - rows[i] / (n - 2) - rows[j] / (n - 2) + total / ((n - 1) * (n - 2))
    return out


def block_cka(sites: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Debiased CKA of all windows of all sites, each site's Gram matrices centred within the site."""
    pairs = [(u_centred(x), u_centred(y)) for x, y in sites]
    cross = sum((k * g).sum() for k, g in pairs)
    return float(cross / np.sqrt(sum((k * k).sum() for k, _ in pairs) * sum((g * g).sum() for _, g in pairs)))


def u_statistic(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased HSIC by its definition: the mean over all ordered quadruples of distinct windows (Song et al. 2012)."""
    k, g = x @ x.T, y @ y.T
    terms = [k[i, j] * (g[i, j] + g[q, r] - 2 * g[i, q]) for i, j, q, r in itertools.permutations(range(len(x)), 4)]
    return float(np.mean(terms))


def biased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """The estimator that the debiased one replaces."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return float(((x.T @ y) ** 2).sum() / np.sqrt(((x.T @ x) ** 2).sum() * ((y.T @ y) ** 2).sum()))

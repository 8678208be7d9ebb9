"""Content hashes: one way to turn JSON, files and arrays into a sha256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def canonical_json(value: Any) -> bytes:
    """The same value always as the same bytes: sorted keys, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_array(array: NDArray[Any]) -> str:
    """Hex sha256 over dtype, shape and the C-ordered little-endian bytes of one array."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    head = canonical_json([little.dtype.str, list(array.shape)])
    return hashlib.sha256(head + little.tobytes()).hexdigest()


def keyed_hash(key: str, *parts: str | int) -> int:
    """A 64-bit number from a public key and parts: folds, groups and streams that don't depend on any list's order."""
    text = canonical_json([key, *parts])
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")

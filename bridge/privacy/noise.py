"""Gaussian and uniform numbers from ChaCha20: a key of the operating system's for each release, or a seed in
simulation.

Floating point is "not hardened": a sample has 52 bits, and which doubles can occur as sums is not hidden (Mironov
2012). The privacy statement says so.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from scipy.special import ndtri

from bridge.hashing import sha256_json

_KEY_BYTES = 32
_CHUNK = 1 << 20
"""Numbers made at a time: bounds the memory beside the result."""


class NoiseSource:
    """One stream of random numbers. Two calls of `from_system` never share one."""

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a key has {_KEY_BYTES} bytes, not {len(key)}")
        # A key serves one stream, so the nonce may be constant.
        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    @classmethod
    def from_system(cls) -> NoiseSource:
        """A stream keyed by the operating system's generator: for every release of a real site or server."""
        return cls(os.urandom(_KEY_BYTES))

    @classmethod
    def seeded(cls, seed: int, *labels: str | int) -> NoiseSource:
        """The stream of a seed and labels, the same each time: for simulation alone."""
        return cls(bytes.fromhex(sha256_json(["fedbridge.noise/1", seed, *labels])))

    def uniform(self, shape: int | tuple[int, ...]) -> NDArray[np.float64]:
        """Numbers in the open interval (0, 1), float64, 52 bits each."""
        count = int(np.prod(shape))
        return open_unit(np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")).reshape(shape)

    def normal(self, shape: int | tuple[int, ...], deviation: float) -> NDArray[np.float64]:
        """Gaussian numbers of mean 0 and standard deviation `deviation`, float64, by the inverse distribution
        function."""
        count = int(np.prod(shape))
        out = np.empty(count)
        for start in range(0, count, _CHUNK):
            part = out[start : start + _CHUNK]
            part[:] = ndtri(self.uniform(len(part)))
        return (out * deviation).reshape(shape)


def open_unit(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words of 64 random bits as numbers in the open interval (0, 1): the middles of 2^52 equal parts. With one bit
    more the last middle would be rounded to 1, whose normal number is infinite."""
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

"""Poisson draws of patients, by the object that also tells what they cost.

Every decision about a patient is a keyed hash of the key, the step and the patient's id, so it does not depend on who
else is there: with one key, two sites that differ in one patient draw the others alike. The key is a secret of the
site (the amplification by sampling holds only while nobody knows who was drawn) and is used for one message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bridge.errors import ConfigError
from bridge.hashing import canonical_json
from bridge.privacy.accounting import Release

EMPTY = -1
"""Row number of a place in a draw that no window fills."""

_KEY_BYTES = 32


class PatientSampler:
    """Draws patients exactly as its `release` says: `count` independent Poisson draws at `sampling_rate`.

    The unit is the patient with all windows: a drawn patient contributes at most so many of them, chosen uniformly
    without replacement.
    """

    def __init__(self, release: Release, key: bytes) -> None:
        """`release` is what the ledger has been charged; `key` are 32 bytes of the operating system's generator, or of
        a seed in simulation."""
        if len(key) != _KEY_BYTES:
            raise ConfigError(
                f"the key of a patient sampler has {len(key)} bytes",
                why=f"{_KEY_BYTES} are needed",
                fix="draw a new key",
            )
        self.release = release
        self._key = key

    def draws(
        self, patients: NDArray[np.str_], order: NDArray[np.int64], windows_per_patient: int
    ) -> Iterator[NDArray[np.int64]]:
        """`release.count` draws, each as row numbers `(drawn patients, windows_per_patient)`, EMPTY where a patient has
        fewer windows; `(0, windows_per_patient)` where nobody is drawn.

        `patients (rows,)` names each row's patient, `order` lists the rows in an order that depends on a patient's own
        data alone. Patients come sorted by id.
        """
        # One stable sort puts each patient's rows together and keeps their order.
        by_patient = order[np.argsort(patients[order], kind="stable")]
        names, starts = np.unique(patients[by_patient], return_index=True)
        rows_of = dict(zip(names.tolist(), np.split(by_patient, starts[1:]), strict=True)) if len(names) else {}
        for step in range(self.release.count):
            drawn = [name for name in rows_of if self._uniform(step, name) < self.release.sampling_rate]
            batch = np.full((len(drawn), windows_per_patient), EMPTY, dtype=np.int64)
            for slot, name in enumerate(drawn):
                own = self._shuffled(step, name, rows_of[name])[:windows_per_patient]
                batch[slot, : len(own)] = own
            yield batch

    def _uniform(self, step: int, patient: str) -> float:
        """In [0, 1), 53 bits: a patient is drawn where it is below the sampling rate."""
        return (int.from_bytes(self._hash("patient", step, patient)[:8], "big") >> 11) * 2.0**-53

    def _shuffled(self, step: int, patient: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which windows are taken does not enter the accounting, so a fast generator will do."""
        seed = int.from_bytes(self._hash("windows", step, patient), "big")
        return np.random.default_rng(seed).permutation(rows)

    def _hash(self, purpose: str, step: int, patient: str) -> bytes:
        text = canonical_json([purpose, step, patient])
        return hashlib.blake2b(text, digest_size=16, key=self._key).digest()

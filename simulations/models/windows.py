"""Windows of public patients, as an encoder's training takes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.hashing import sha256_array, sha256_json
from bridge.windows import Preprocessing, WindowSpec


@dataclass(frozen=True)
class PublicWindows:
    """Windows of public patients, preprocessed as the encoder reads them.

    `x` float32 `(n, channels, samples)`, `patients (n,)`; `labels (n,)` int64, -1 where there is none (the new
    modality's are never read).
    """

    x: NDArray[np.float32]
    patients: NDArray[np.str_]
    labels: NDArray[np.int64]
    spec: WindowSpec
    preprocessing: Preprocessing

    def key(self) -> list[Any]:
        """What the content is, for the cache."""
        names = np.asarray(self.patients, dtype=np.str_)
        arrays = [sha256_array(self.x), sha256_json(names.tolist()), sha256_array(self.labels)]
        return [*arrays, self.spec.model_dump(mode="json"), self.preprocessing.model_dump(mode="json")]

    def labelled(self) -> PublicWindows:
        """Those that have a label."""
        rows = np.flatnonzero(self.labels >= 0)
        if len(rows) == len(self.labels):
            return self
        return replace(self, x=self.x[rows], patients=self.patients[rows], labels=self.labels[rows])


def spread_rows(patients: NDArray[Any], count: int) -> NDArray[np.int64]:
    """At most `count` rows, ascending, of as many patients as can be: one of each, then a second of each, and so on.

    A patient's rows are taken from all over the recording.
    """
    turns: list[tuple[int, str, int]] = []
    for patient in np.unique(patients):
        own = np.flatnonzero(patients == patient)
        order = np.random.default_rng(len(own)).permutation(own)
        turns += [(turn, str(patient), int(row)) for turn, row in enumerate(order)]
    return np.sort(np.asarray([row for _, _, row in sorted(turns)[:count]], np.int64))

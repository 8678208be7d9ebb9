"""The rivals of the bridge as controls: distillation into the whole new encoder, on what the sites hold.

`kd:centralised`, `kd_contrast:centralised`: on the pairs of all sites on one machine. `kd:site_alone:<name>`,
`kd_contrast:site_alone:<name>`: on one hospital's. They see the pair patients' windows and what the teacher makes of
them, no label; as the bridge does. Unlike it they train every parameter of the new encoder.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
from numpy.typing import NDArray

from bridge.distil import Lessons, Rival, RivalSettings, Student, distil
from client.features import FeatureSet, features
from client.site import Site
from client.site_file import Split
from client.windowing import WindowTable, windows_of

RIVALS: tuple[Rival, ...] = get_args(Rival)
_ROWS = 256


def rival_of(name: str) -> Rival | None:
    """The rival of a control's name; None where it is the bridge's or the linear student's."""
    return next((rival for rival in RIVALS if name.startswith(f"{rival}:")), None)


def lessons_of(site: Site, rival: Rival) -> Lessons:
    """What a student learns from at a site: its pair windows and the teacher's answers to them."""
    pairs = features(site, "pair")
    pooled = pooled_old(pairs) if rival == "kd_contrast" else None
    return Lessons(new_windows(site, "pair", pairs), pairs.teacher_logits, pooled)


def train_rival(rival: Rival, site: Site, settings: RivalSettings, seed: int) -> Student:
    """A student trained on one site's pairs. Raises as `bridge.distil.distil` and reading the site do."""
    from bridge.encoders.loading import load_encoder

    encoder = load_encoder(site.model_folder("new_encoder"))
    return distil(rival, encoder, lessons_of(site, rival), settings, seed=seed, compute=site.compute)


def pooled_old(pairs: FeatureSet) -> NDArray[np.float32]:
    """The mean of the old encoder's final tokens, `(n, width)`."""
    rows = np.arange(len(pairs))
    parts = [pairs.old_tokens(rows[first : first + _ROWS]).mean(axis=1) for first in range(0, len(rows), _ROWS)]
    return np.concatenate(parts)


def new_windows(site: Site, split: Split, found: FeatureSet) -> NDArray[np.float32]:
    """The windows of the new modality behind a feature set's rows, `(n, channels, samples)`."""
    windows = windows_of(site, split)  # of both modalities, since either may reject a window
    assert windows.new is not None
    rows = {key: row for row, key in enumerate(_keys(windows.table))}
    return windows.new[[rows[key] for key in _keys(found.table)]]


def _keys(table: WindowTable) -> list[tuple[str, str, float]]:
    return list(zip(table.patients.tolist(), table.recordings.tolist(), table.starts.tolist(), strict=True))

"""Small files in the formats of ISRUC-Sleep, WESAD and the freezing-of-gait set, written without the product's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from numpy.typing import NDArray

from .python2 import write_python2

ISRUC_CHANNELS = ("F3_A2", "C3_A2", "O1_A2", "F4_A1", "C4_A1", "O2_A1", "LOC_A2", "ROC_A1", "X1", "X2", "X3")


def wave(seconds: float, rate: float, seed: int) -> NDArray[np.float64]:
    """Noise of about 50 units, `(n,)`."""
    return 50 * np.random.default_rng([seed, round(rate)]).standard_normal(round(seconds * rate))


def write_isruc(
    folder: Path,
    number: int,
    stages: Sequence[int] | str | None,
    epochs: int = 4,
    samples: int = 6000,
    without: Sequence[str] = (),
    **channels: NDArray[Any],
) -> Path:
    """`subjectN.mat` and `N_1.txt`; `stages` are the lines of the latter (30 more follow), or its whole text."""
    content: dict[str, Any] = {
        name: wave(30 * epochs, samples / 30, 100 * number + i).reshape(epochs, samples)
        for i, name in enumerate(ISRUC_CHANNELS)
        if name not in without
    }
    path = folder / "ExtractedChannels" / f"subject{number}.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {**content, **channels}, do_compression=True)
    if stages is not None:
        text = stages if isinstance(stages, str) else "".join(f"{each}\n" for each in (*stages, *[0] * 30)) + "\n"
        place = folder / "RawData" / str(number) / f"{number}_1.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return path


def wesad_content(subject: str, labels: NDArray[Any], seconds: float, seed: int = 0) -> dict[str, Any]:
    """What the pickle of a subject holds, with one more signal of each device than is read."""
    ecg, bvp = wave(seconds, 700, seed), wave(seconds, 64, seed)
    return {
        "subject": subject,
        "signal": {
            "chest": {"ACC": np.zeros((len(ecg), 3)), "ECG": ecg[:, None] / 100},
            "wrist": {"ACC": np.zeros((8, 3)), "BVP": bvp[:, None]},
        },
        "label": labels,
    }


def by_seconds(*stretches: tuple[int, float]) -> NDArray[np.int32]:
    """WESAD's label track of `(label, seconds)`."""
    return np.concatenate([np.full(round(700 * seconds), label, dtype=np.int32) for label, seconds in stretches])


def write_wesad(folder: Path, content: Mapping[str, Any], subject: str = "") -> Path:
    name = subject or str(content["subject"])
    return write_python2(folder / name / f"{name}.pkl", dict(content))


def fog_rows(labels: Sequence[float], seed: int = 0) -> list[list[str]]:
    """Cells of a task: 0 the number, 1 the time, noise in some EEG columns and in 27 to 31, 60 the label."""
    noise = 30 * np.random.default_rng(seed).standard_normal((len(labels), 61))
    rows = [["0.0"] * 61 for _ in labels]
    for i, row in enumerate(rows):
        row[0], row[1], row[60] = str(i), f"2019-05-10 11:04:{i / 500:06.3f}", f"{labels[i]:g}"
        for place in (*range(4, 8), 10, 11, 17, *range(27, 32)):
            row[place] = f"{noise[i, place]:.4f}"
    return rows


def write_fog(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(row) + "\n" for row in rows))
    return path


def column(rows: Sequence[Sequence[str]], number: int) -> NDArray[np.float32]:
    return np.array([float(row[number]) for row in rows], dtype=np.float32)

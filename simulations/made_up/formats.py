"""Files in the formats of ISRUC-Sleep, WESAD and the freezing-of-gait set, written without the readers' code.

What the files hold is the caller's; where nothing is given it is noise. A reader that is tested against them shares no
line with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.made_up.python2 import write_python2

ISRUC_CHANNELS = ("F3_A2", "C3_A2", "O1_A2", "F4_A1", "C4_A1", "O2_A1", "LOC_A2", "ROC_A1", "X1", "X2", "X3")
"""Some of a file's variables: six EEG, two EOG, a chin EMG, the ECG `X2` and a leg EMG."""

FOG_COLUMNS = 61
"""Of a line: 0 the number, 1 the time, 2 to 26 EEG, 27 to 31 EMG, then accelerations, and the label last."""


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
    """`subjectN.mat` and `N_1.txt`, returns the former; a channel that is not given is noise.

    `stages` are the lines of the text (30 more follow), or its whole text; None: it is not there.
    """
    import scipy.io

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


def wesad_content(
    subject: str,
    labels: NDArray[Any],
    seconds: float,
    seed: int = 0,
    ecg: NDArray[Any] | None = None,
    bvp: NDArray[Any] | None = None,
) -> dict[str, Any]:
    """What the pickle of a subject holds, with one more signal of each device than is read.

    `ecg` at 700 Hz and `bvp` at 64 Hz are noise where they are not given.
    """
    chest = wave(seconds, 700, seed) / 100 if ecg is None else ecg
    wrist = wave(seconds, 64, seed) if bvp is None else bvp
    return {
        "subject": subject,
        "signal": {
            "chest": {"ACC": np.zeros((len(chest), 3)), "ECG": chest[:, None]},
            "wrist": {"ACC": np.zeros((8, 3)), "BVP": wrist[:, None]},
        },
        "label": labels,
    }


def by_seconds(*stretches: tuple[int, float]) -> NDArray[np.int32]:
    """WESAD's label track of `(label, seconds)`."""
    return np.concatenate([np.full(round(700 * seconds), label, dtype=np.int32) for label, seconds in stretches])


def write_wesad(folder: Path, content: Mapping[str, Any], subject: str = "") -> Path:
    """`SN/SN.pkl`, as Python 2 pickled it."""
    name = subject or str(content["subject"])
    return write_python2(folder / name / f"{name}.pkl", dict(content))


def fog_rows(
    labels: Sequence[float], seed: int = 0, signals: Mapping[int, NDArray[Any]] | None = None
) -> list[list[str]]:
    """Cells of a task: noise in some EEG columns and in 27 to 31, or what `signals` gives for a column."""
    noise = 30 * np.random.default_rng(seed).standard_normal((len(labels), FOG_COLUMNS))
    given = signals or {}
    rows = [["0.0"] * FOG_COLUMNS for _ in labels]
    for i, row in enumerate(rows):
        row[0], row[1], row[60] = str(i), f"2019-05-10 11:04:{i / 500:06.3f}", f"{labels[i]:g}"
        for place in (*range(4, 8), 10, 11, 17, *range(27, 32)):
            row[place] = f"{given[place][i] if place in given else noise[i, place]:.4f}"
    return rows


def write_fog(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    """A task's text file; the folder tells the patient."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(row) + "\n" for row in rows))
    return path


def column(rows: Sequence[Sequence[str]], number: int) -> NDArray[np.float32]:
    """A column of a task's cells, as numbers."""
    return np.array([float(row[number]) for row in rows], dtype=np.float32)

"""Recordings and files for the tests of a site's data, written here without the product's readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.windows import Preprocessing, WindowSpec
from client.readers.base import LabelTrack, Recording, Signal
from client.site import InputFormat
from client.site_file import Role, SiteFile

PLAIN = Preprocessing(normalise="none")


def site_file(**changes: Any) -> SiteFile:
    """A site with ECG at 100 Hz and PPG at 40 Hz, windows of 2 s every second."""
    content: dict[str, Any] = {
        "site": "north",
        "folder": "recordings",
        "reader": {
            "options": {
                "subject": "subject",
                "signals": {
                    "ECG": {"array": "ECG", "rate": 100, "channels": ["I"]},
                    "PPG": {"array": "PPG", "rate": 40, "channels": ["P"]},
                },
            }
        },
        "old": {"modality": "ECG", "channels": ["I"], "rate_hz": 100},
        "new": {"modality": "PPG", "channels": ["P"], "rate_hz": 40},
        "window": {"seconds": 2, "step_seconds": 1},
    }
    return SiteFile.model_validate({**content, **changes})


def formats(steps: Preprocessing = PLAIN, rates: tuple[float, float] = (100, 40)) -> dict[Role, InputFormat]:
    """What encoders of 2 s windows would read."""
    old = WindowSpec(modality="ECG", channels=("I",), rate_hz=rates[0], samples=round(2 * rates[0]))
    new = WindowSpec(modality="PPG", channels=("P",), rate_hz=rates[1], samples=round(2 * rates[1]))
    return {"old": InputFormat(window=old, preprocessing=steps), "new": InputFormat(window=new, preprocessing=steps)}


def noise(seconds: float, rate: float, seed: int, channels: int = 1) -> NDArray[np.float32]:
    rng = np.random.default_rng([seed, round(rate)])
    return rng.normal(0, 1, (channels, round(seconds * rate))).astype(np.float32)


def recording(
    seconds: float = 10.0,
    *,
    ecg: NDArray[np.float32] | None = None,
    ppg: NDArray[np.float32] | None = None,
    segments: tuple[tuple[float, float], ...] | None = None,
    labels: LabelTrack | None = None,
    masked: dict[str, NDArray[np.bool_]] | None = None,
) -> Recording:
    """Noise, or the given signals, of patient `p` on both modalities."""
    masks = masked or {}
    ecg = noise(seconds, 100, 1) if ecg is None else ecg
    ppg = noise(seconds, 40, 2) if ppg is None else ppg
    return Recording(
        patient="p",
        name="r",
        signals={
            "ECG": Signal(ecg, 100.0, ("I",), masked=masks.get("ECG")),
            "PPG": Signal(ppg, 40.0, ("P",), masked=masks.get("PPG")),
        },
        segments=segments or ((0.0, seconds),),
        labels=labels,
    )


def write_npz(folder: Path, name: str, seconds: float = 10.0, seed: int = 0, **arrays: Any) -> Path:
    """A file that fits `site_file()`; `arrays` replace or add to what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"subject": name, "ECG": noise(seconds, 100, seed), "PPG": noise(seconds, 40, seed)}
    np.savez_compressed(folder / f"{name}.npz", **{**content, **arrays})
    return folder / f"{name}.npz"


def write_edf(
    path: Path,
    signals: dict[str, tuple[int, NDArray[np.float64]]],
    *,
    unit: str = "uV",
    reserved: str = "",
    annotations: list[tuple[float, float, str]] | None = None,
) -> Path:
    """EDF or, with annotations, EDF+C by the format's text (Kemp et al. 1992): records of 1 s, +-3276.7 `unit`.

    `signals`: label to (samples a second, values in `unit`).
    """
    records = len(next(iter(signals.values()))[1]) // next(iter(signals.values()))[0]
    blocks = {label: _digital(values, rate, records) for label, (rate, values) in signals.items()}
    if annotations is not None:
        reserved = reserved or "EDF+C"
        blocks["EDF Annotations"] = _annotation_blocks(annotations, records)
    n = len(blocks)
    head = [("0", 8), ("X X X X", 80), ("Startdate X X X X", 80), ("01.01.20", 8), ("00.00.00", 8)]
    head += [(str(256 * (n + 1)), 8), (reserved, 44), (str(records), 8), ("1", 8), (str(n), 4)]
    fields = [
        (list(blocks), 16), ([""] * n, 80), ([unit if label in signals else "" for label in blocks], 8),
        (["-3276.7" if label in signals else "-1" for label in blocks], 8),
        (["3276.7" if label in signals else "1" for label in blocks], 8),
        (["-32767"] * n, 8), (["32767"] * n, 8), ([""] * n, 80),
        ([str(block.shape[1]) for block in blocks.values()], 8), ([""] * n, 32),
    ]  # fmt: skip
    text = "".join(value.ljust(width) for value, width in head)
    text += "".join(value.ljust(width) for values, width in fields for value in values)
    body = b"".join(block[record].tobytes() for record in range(records) for block in blocks.values())
    path.write_bytes(text.encode("ascii") + body)
    return path


def _digital(values: NDArray[np.float64], rate: int, records: int) -> NDArray[np.int16]:
    return np.round(np.asarray(values) * 10).astype("<i2")[: rate * records].reshape(records, rate)


def _annotation_blocks(annotations: list[tuple[float, float, str]], records: int) -> NDArray[np.int16]:
    texts = [f"+{record}\x14\x14\x00" for record in range(records)]
    for onset, duration, text in annotations:
        texts[0] += f"+{onset:g}\x15{duration:g}\x14{text}\x14\x00"
    width = 2 * ((max(len(text) for text in texts) + 1) // 2)
    blocks = [np.frombuffer(text.encode().ljust(width, b"\x00"), dtype="<i2") for text in texts]
    return np.stack(blocks)

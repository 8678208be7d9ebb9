"""What the method's benchmarks share: encoders with random weights, made windows, and one child process a variant."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.encoders.split import SplitEncoder
from bridge.head import TaskHead, load_head, save_head
from bridge.windows import Modality, Preprocessing, WindowSpec

ROOT = Path(__file__).resolve().parent.parent
SECONDS, CLASSES = 10, 3
ARCHITECTURE = CompactArchitecture(width=64, blocks=5, heads=4, tokens=50)
RATE_HZ = 125


@dataclass
class Setting:
    """Both encoders, the head, and the windows of one site."""

    old_encoder: SplitEncoder
    new_encoder: SplitEncoder
    head: TaskHead
    old: torch.Tensor
    new: torch.Tensor
    patients: np.ndarray


def prepare(folder: Path, patients: int, windows: int) -> None:
    """Write compact encoders, a head, and noise windows; ECG is the old modality, PPG the new one."""
    torch.manual_seed(0)
    encoders = []
    modalities: tuple[Modality, ...] = ("ECG", "PPG")
    for modality in modalities:
        spec = WindowSpec(modality=modality, channels=("one",), rate_hz=RATE_HZ, samples=SECONDS * RATE_HZ)
        encoders.append(CompactEncoder(spec, ARCHITECTURE))
    old, new = encoders
    write(folder, old, new, patients, windows, lambda _: TaskHead(ARCHITECTURE.width, CLASSES))


def write(
    folder: Path,
    old: SplitEncoder,
    new: SplitEncoder,
    patients: int,
    windows: int,
    head_on: Callable[[torch.Tensor], TaskHead],
) -> None:
    """Write encoders with random weights (speed does not depend on what they learned), normed noise windows, and the
    head that `head_on` makes for the old encoder's windows."""
    made, digests = {}, {}
    for name, encoder in (("old_encoder", old), ("new_encoder", new)):
        card = encoder.card(Preprocessing(), {})
        digests[name] = save_encoder(folder / name, encoder.state_dict(), card).digest
        spec = encoder.window
        signal = torch.randn(patients * windows, len(spec.channels), spec.samples).cumsum(dim=-1)
        made[name] = (signal - signal.mean(dim=-1, keepdim=True)) / signal.std(dim=-1, keepdim=True)
        np.save(folder / f"{name}.windows.npy", made[name].numpy())
    head = head_on(made["old_encoder"])
    names = tuple(f"class {i}" for i in range(CLASSES))
    save_head(folder / "task_head", head, classes=names, old_encoder=digests["old_encoder"], training={})
    np.save(folder / "patients.npy", np.repeat([f"p{i:03d}" for i in range(patients)], windows))


def load(folder: Path) -> Setting:
    old, new = load_encoder(folder / "old_encoder"), load_encoder(folder / "new_encoder")
    assert isinstance(old, SplitEncoder)
    assert isinstance(new, SplitEncoder)
    return Setting(
        old_encoder=old,
        new_encoder=new,
        head=load_head(folder / "task_head"),
        old=torch.from_numpy(np.load(folder / "old_encoder.windows.npy")),
        new=torch.from_numpy(np.load(folder / "new_encoder.windows.npy")),
        patients=np.load(folder / "patients.npy"),
    )


def blocks_of(encoder: SplitEncoder) -> nn.ModuleList:
    """The modules that a naive variant hooks: one a position."""
    found = [each for each in encoder.modules() if isinstance(each, nn.ModuleList) and len(each) == encoder.positions]
    return found[0]


def measure(work: Callable[[], Any], repeats: int, before: float | None = None) -> tuple[dict[str, float], Any]:
    """Best seconds of some repeats after one that does not count, the peak memory in MB, and what the work returned.

    Added memory is that beyond `before`, or beyond what the process had when it was called.

    Seconds are those of the process on its core (one thread), so that other work on the machine does not count.
    """
    before = peak_mb() if before is None else before
    result = work()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return {"seconds": min(seconds), "peak_mb": peak_mb(), "added_mb": peak_mb() - before}, result


def peak_mb() -> float:
    """The largest resident memory that this process ever had."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def in_child(module: str, *arguments: str) -> dict[str, Any]:
    """Run one variant in a process of its own, so that its peak memory is its own; the last line it prints is JSON."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def row(name: str, variant: dict[str, float], ours: dict[str, float]) -> str:
    """One line of a result table: a variant, and how many times longer than ours it takes."""
    ratio = variant["seconds"] / ours["seconds"]
    times = "" if variant is ours else f"{ratio:>6.1f} x"
    memory = f"{variant['peak_mb']:.0f} (+{variant['added_mb']:.0f})"
    return f"{name:<28} {variant['seconds']:>8.2f} s {times:>8} {memory:>14}"


HEADER = f"{'':<28} {'CPU time':>10} {'ratio':>8} {'peak MB':>14}"

"""What a training costs: measured in a process of its own, so that nothing of another one is counted."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from client.effort import peak_bytes
from server.record import Cost


class Meter:
    """Measures from its making to `read`, in a process that has done nothing else before.

    Seconds are those that passed and those of the process' own computing. Memory is the most that the process ever
    held, and by how much that is more than it held with its libraries loaded.
    """

    def __init__(self) -> None:
        _load_lazily_loaded()
        self._held = _held_bytes()
        self._seconds, self._cpu = time.perf_counter(), time.process_time()

    def read(self, parameters: int) -> Cost:
        """The cost so far; `parameters` is how many numbers were trained."""
        peak = peak_bytes()
        return Cost(
            parameters=parameters,
            seconds=round(time.perf_counter() - self._seconds, 3),
            cpu_seconds=round(time.process_time() - self._cpu, 3),
            peak_bytes=peak,
            added_bytes=max(0, peak - self._held),
        )


def _load_lazily_loaded() -> None:
    """Take one step of training: torch loads a good part of itself at the first one."""
    layer = nn.Linear(1, 1)
    optimiser = torch.optim.Adam(layer.parameters())
    layer(torch.zeros(1, 1)).sum().backward()
    optimiser.step()


def _held_bytes() -> int:
    """The memory that this process holds now (VmRSS); where the system does not tell, the most that it has held."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return peak_bytes()

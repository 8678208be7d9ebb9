"""Where the frozen networks run on a machine, with which numbers, and how much memory a batch may take there.

What a site computes must not depend on it: in float32, results of any device and any batch agree to 1e-5. Imports torch
only where a CUDA device is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bridge.errors import ConfigError

Device = Literal["cpu", "cuda"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float16"]

SHARE = 0.25
"""Of the memory that is free, what a batch may take where nothing else is said: results and recordings need some, too,
and two sites of one machine may compute at a time."""

_GIGABYTE = 10**9
_CGROUPS = Path("/proc/self/cgroup")
_HIERARCHIES = {
    "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
}
"""By controller, as a process' list of groups names it (none in version 2): where its groups are, limit and use."""


@dataclass(frozen=True)
class Compute:
    """A device, the numbers that networks compute with there, and the bytes that the activations of a batch may take.

    With another precision than float32 torch's autocast chooses it operation by operation; weights, what goes in and
    what comes out stay float32.
    """

    memory_bytes: int
    device: Device = "cpu"
    precision: Precision = "float32"


def compute_on(
    device: DeviceChoice = "cpu", precision: Precision = "float32", memory_gigabytes: float | None = None
) -> Compute:
    """What a machine's settings come to: `auto` is CUDA where there is a device; without `memory_gigabytes`, a quarter
    of the memory that is free.

    Raises `ConfigError` where CUDA is asked for and there is none, or another precision than float32 without it.
    """
    found: Device = "cuda" if device != "cpu" and _has_cuda() else "cpu"
    if device == "cuda" and found == "cpu":
        raise ConfigError(
            "compute.device 'cuda' can't be used",
            why="torch finds no CUDA device: there is none, its driver is missing, or torch was built without CUDA",
            fix="use cpu or auto, or install the driver and a CUDA build of torch",
        )
    if precision != "float32" and found == "cpu":
        raise ConfigError(
            f"compute.precision '{precision}' can't be used",
            why=f"it needs a CUDA device; with compute.device '{device}' the networks run on the CPU",
            fix="use float32, or a machine with a CUDA device and compute.device auto or cuda",
        )
    if memory_gigabytes is not None:
        return Compute(int(memory_gigabytes * _GIGABYTE), found, precision)
    return Compute(int(SHARE * _free_memory(found)), found, precision)


def windows_at_once(compute: Compute, bytes_of_one: int, asked: int) -> int:
    """How many of `asked` windows go through a network together: all where they fit, else a power of two, at least one.

    Powers of two, so that a little more or less free memory seldom changes the batches, and with them the last bits.
    """
    fitting = compute.memory_bytes // max(1, bytes_of_one)
    return asked if fitting >= asked else 1 << max(0, fitting.bit_length() - 1)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _free_memory(device: Device) -> int:
    """Free bytes of the device's memory; for the CPU what the system can give, within its container's limit."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    return min([_system_memory(), *_left_in_groups()])


def _system_memory() -> int:
    """What Linux says is available; elsewhere, all that there is."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_groups() -> Iterator[int]:
    """What each control group around this process leaves of its limit, where it has one: a container's, a service's."""
    try:
        lines = _CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in _HIERARCHIES:
            continue
        root, limit, used = _HIERARCHIES[controllers]
        own = root / path.lstrip("/")
        for group in (own, *(each for each in own.parents if each.is_relative_to(root))):
            try:
                most, now = ((group / name).read_text(encoding="ascii").strip() for name in (limit, used))
            except OSError:
                continue  # not mounted here, or the outermost group, which has no limit
            if most != "max":
                yield max(1, int(most) - int(now))

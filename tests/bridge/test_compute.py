"""A machine's settings: what they come to, what is refused, and how many windows fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge import compute
from bridge.compute import Compute, compute_on, windows_at_once
from bridge.errors import ConfigError, ExitCode


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_has_cuda", lambda: False)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test has the device itself: this is what is decided before anything is put on it."""
    monkeypatch.setattr(compute, "_has_cuda", lambda: True)


@pytest.mark.parametrize(
    ("budget", "one", "asked", "expected"),
    [
        (6400, 100, 64, 64),  # all fit, just so
        (6399, 100, 64, 32),
        (6400, 100, 65, 64),
        (700, 100, 7, 7),
        (700, 100, 8, 4),
        (100, 100, 9, 1),
        (99, 100, 9, 1),  # one window is the least
        (0, 100, 1, 1),
        (100, 0, 9, 9),
        (1000, 10, 0, 0),
    ],
)
def test_all_windows_or_a_power_of_two(budget: int, one: int, asked: int, expected: int) -> None:
    assert windows_at_once(Compute(budget), one, asked) == expected


@pytest.mark.usefixtures("no_cuda")
def test_without_cuda_the_processor_computes_in_float32() -> None:
    for device in ("cpu", "auto"):
        assert compute_on(device, "float32", 1.5) == Compute(1_500_000_000, "cpu", "float32")


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(
    ("device", "precision", "what"),
    [
        ("cuda", "float32", "compute.device 'cuda'"),
        ("cuda", "bfloat16", "compute.device 'cuda'"),
        ("auto", "bfloat16", "compute.precision 'bfloat16'"),
        ("cpu", "float16", "compute.precision 'float16'"),
    ],
)
def test_what_needs_cuda_is_refused_without(
    device: compute.DeviceChoice, precision: compute.Precision, what: str
) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        compute_on(device, precision, 1.0)
    assert caught.value.why
    assert "cpu or auto" in caught.value.fix or "float32" in caught.value.fix
    assert caught.value.exit_code == ExitCode.CONFIG


@pytest.mark.usefixtures("cuda")
def test_with_cuda_auto_takes_it_and_every_precision_goes() -> None:
    assert compute_on("auto", "float16", 2.0) == Compute(2_000_000_000, "cuda", "float16")
    assert compute_on("cuda", "bfloat16", 2.0).device == "cuda"
    assert compute_on("cpu", "float32", 2.0).device == "cpu"
    with pytest.raises(ConfigError, match="bfloat16"):
        compute_on("cpu", "bfloat16", 2.0)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("0::/a/b", 2000),
        ("0::/a", 2500),
        ("0::/", 5000),
        ("0::/gone", 5000),
        ("12:cpu:/a/b\n5:memory:/c\n0::/", 1000),
        (None, 5000),
    ],
)
def test_the_default_is_a_quarter_of_what_is_free_and_permitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, groups: str | None, expected: int
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    for group, limit, used in ((two / "a" / "b", "9000", 1000), (two / "a", "11000", 1000), (one / "c", "4500", 500)):
        group.mkdir(parents=True, exist_ok=True)
        names = ("memory.max", "memory.current") if group.is_relative_to(two) else ("limit", "usage")
        (group / names[0]).write_text(f"{limit}\n")
        (group / names[1]).write_text(f"{used}\n")
    (two / "memory.max").write_text("max\n")
    (two / "memory.current").write_text("7\n")
    listed = tmp_path / "cgroup"
    if groups is not None:
        listed.write_text(groups + "\n")
    monkeypatch.setattr(compute, "_CGROUPS", listed)
    hierarchies = {"": (two, "memory.max", "memory.current"), "memory": (one, "limit", "usage")}
    monkeypatch.setattr(compute, "_HIERARCHIES", hierarchies)
    monkeypatch.setattr(compute, "_system_memory", lambda: 20_000)
    assert compute_on().memory_bytes == expected


def test_this_machine_has_memory() -> None:
    assert 1e7 < compute_on().memory_bytes < 1e14

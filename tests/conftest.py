"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.scheduling import SlowScheduling, longest_first

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return SlowScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real recordings beside the repository; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real recordings are not on this machine (../shared/data is absent)")
    return folder


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The folder of the published models' numeric fixtures; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "oracle"
    if not folder.is_dir():
        pytest.skip("the published models' numeric fixtures are not on this machine (../shared/oracle is absent)")
    return folder

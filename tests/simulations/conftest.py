"""Simulated studies keep their caches in a folder of the test session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.prepare import prepare
from simulations.run import run
from tests.simulations.studies import tiny


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDBRIDGE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def prepared(session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared tiny study; read only."""
    return prepare(tiny(), tmp_path_factory.mktemp("prepared") / "study")


@pytest.fixture(scope="session")
def finished(session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run with all controls; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(tiny(), folder)
    return folder

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The folder of the published models' numeric fixtures; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "oracle"
    if not folder.is_dir():
        pytest.skip("the published models' numeric fixtures are not on this machine (../shared/oracle is absent)")
    return folder

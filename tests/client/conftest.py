"""One small permissive site and its models, built once a test session and never written to but by its own app."""

from __future__ import annotations

import pytest

from tests.client.sites import PERMISSIVE, Small, build_models, build_site


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    return Small(build_models(folder / "models"), build_site(folder / "alpha", "alpha", policy=PERMISSIVE))

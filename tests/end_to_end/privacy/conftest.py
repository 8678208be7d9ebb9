"""One pool of patients for all tests here; worlds are built from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.end_to_end.privacy.neighbours import Pool, build_pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp("pool")
    return build_pool(folder)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.study.archive import Study, open_study
from server.coordinator.folder import CoordinatorFolder, ServerFile
from server.coordinator.initialise import initialise
from server.study_file import build_study
from tests.server.conftest import Models, models
from tests.waiting import free_port

__all__ = ["models"]


@dataclass(frozen=True)
class Built:
    """A coordinator's folder, the models, and a study of its own."""

    folder: CoordinatorFolder
    models: Models
    path: Path

    def build(self, path: Path, **changes: Any) -> Path:
        config = path.with_suffix(".yaml")
        content = {"name": "small", "models": {"folder": str(self.models.folder)}, **changes}
        config.write_text(yaml.safe_dump(content))
        build_study(config, self.folder.coordinator(), self.folder.signing_secret(), path)
        return path


@pytest.fixture(scope="session")
def built(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Built:
    place = tmp_path_factory.mktemp("coordinator")
    settings = ServerFile(name="consortium", host="127.0.0.1", port=free_port(), superlink_port=free_port())
    folder = initialise(place / "coordinator", settings).folder
    made = Built(folder, models, place / "study.zip")
    made.build(made.path)
    return made


@pytest.fixture
def study(built: Built) -> Iterator[Study]:
    with open_study(built.path) as opened:
        yield opened


@pytest.fixture
def folder(built: Built, tmp_path: Path) -> CoordinatorFolder:
    """The coordinator's folder as it was made, with nothing run in it."""
    return initialise_copy(built.folder, tmp_path / "coordinator")


def initialise_copy(folder: CoordinatorFolder, path: Path) -> CoordinatorFolder:
    import shutil

    shutil.copytree(folder.path, path)
    return CoordinatorFolder.open(path)

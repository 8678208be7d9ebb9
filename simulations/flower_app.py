"""The app that Flower ships: the installed packages' Python files and a small pyproject, the same from a wheel."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from simulations.errors import EngineError
from simulations.run_config import APP_COMPONENTS, RUN_CONFIG_DEFAULTS, toml_text

PACKAGES = ("bridge", "client", "server")


def build_app(folder: Path) -> Path:
    """Write the app into `folder` and return it; its name must be one that Flower takes (letters, digits, hyphens)."""
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise EngineError(f"the package '{name}' is not installed", fix="install fedbridge again")
        source = Path(spec.origin).parent
        for file in sorted(source.rglob("*.py")):
            target = folder / name / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    (folder / "pyproject.toml").write_text(_pyproject(), encoding="utf-8")
    return folder


def _pyproject() -> str:
    """As much of a pyproject as Flower needs, with the same run-config keys as the repository's own."""
    components = "\n".join(f'{name} = "{where}"' for name, where in APP_COMPONENTS.items())
    return f"""[project]
name = "fedbridge"
version = "0.1.0"
description = "Train a bridge between two frozen biosignal foundation models across hospitals"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedbridge"

[tool.flwr.app.components]
{components}

[tool.flwr.app.config]
{toml_text(RUN_CONFIG_DEFAULTS)}"""

"""The app that Flower ships: the installed packages' Python files and a small pyproject, the same from a wheel.

Flower makes one file of it, the bundle (FAB), byte for byte the same from the same files: its sha256 names the code of
a study, and a site that builds it from its own installation finds out whether the study's code is its own. Which call
of Flower's builds it is handed in, since this package does not import Flower.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from bridge.errors import CodeError
from bridge.hashing import sha256_file
from bridge.run_config import APP_COMPONENTS, RUN_CONFIG_DEFAULTS, toml_text

PACKAGES = ("bridge", "client", "server")


@dataclass(frozen=True)
class BundleHash:
    """What names a bundle: its sha256, and that of each file in it by path, so that a difference can be told."""

    sha256: str
    files: dict[str, str]


def installed_bundle(build: Callable[[Path], bytes]) -> BundleHash:
    """The hash of the bundle that this installation makes; `build` is `flwr.cli.build.build_fab_from_disk`."""
    with tempfile.TemporaryDirectory(prefix="fedbridge-") as place:
        app = build_app(Path(place) / "app")
        files = {str(path.relative_to(app)): sha256_file(path) for path in sorted(app.rglob("*")) if path.is_file()}
        return BundleHash(hashlib.sha256(build(app)).hexdigest(), files)


def build_app(folder: Path) -> Path:
    """Write the app into `folder` and return it; its name must be one that Flower takes (letters, digits, hyphens)."""
    for name in PACKAGES:
        source = package_folder(name)
        for file in sorted(source.rglob("*.py")):
            target = folder / name / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    (folder / "pyproject.toml").write_text(_pyproject(), encoding="utf-8")
    return folder


def package_folder(name: str) -> Path:
    """Where the package of that name would be imported from. Raises `CodeError`."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise CodeError(f"the package '{name}' is not installed", fix="install fedbridge again")
    return Path(spec.origin).parent


def _pyproject() -> str:
    """As much of a pyproject as Flower needs, with the same run-config keys as the repository's own."""
    components = "\n".join(f'{name} = "{where}"' for name, where in APP_COMPONENTS.items())
    return f"""[project]
name = "fedbridge"
version = "{version("fedbridge")}"
description = "Train a bridge between two frozen biosignal foundation models across hospitals"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedbridge"

[tool.flwr.app.components]
{components}

[tool.flwr.app.config]
{toml_text(RUN_CONFIG_DEFAULTS)}"""

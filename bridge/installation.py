"""Whether the code that runs is the installed distribution's own: the right place, unchanged, with the tested Flower.

`bridge`, `client` and `server` are plain words: another distribution may bring a package of that name, and a folder of
that name may come first on Python's path. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution, version
from pathlib import Path
from urllib.parse import unquote, urlparse

from bridge.bundle import PACKAGES, package_folder
from bridge.errors import CodeError

DISTRIBUTION = "fedbridge"
TESTED_FLOWER = "1.41"


def check_installation() -> None:
    """Raise `CodeError` unless the packages are this distribution's own and unchanged, and Flower is the tested one."""
    check_places()
    _check_files(_own())
    check_flower()


def check_places() -> None:
    """Raise `CodeError` unless each package comes from where the distribution `fedbridge` put it."""
    own = _own()
    editable = _editable_folder(own)
    for name in PACKAGES:
        expected = Path(str(own.locate_file(name))) if editable is None else editable / name
        found = package_folder(name)
        if found.resolve() != expected.resolve():
            raise CodeError(
                f"the package '{name}' is not fedbridge's own",
                why=f"Python finds it in {found}, fedbridge is installed in {expected.parent}",
                fix="use an environment for fedbridge alone, and leave PYTHONPATH empty",
            )


def check_flower() -> None:
    """Raise `CodeError` unless Flower is the tested version: fedbridge leans on private names of it."""
    try:
        found = version("flwr")
    except PackageNotFoundError:
        found = ""
    if found.split(".")[:2] != TESTED_FLOWER.split("."):
        raise CodeError(
            f"Flower {found or 'is missing'}: not the tested version {TESTED_FLOWER}",
            why="what pins the code that runs on a site's data is checked for that version alone",
            fix=f"pip install 'flwr=={TESTED_FLOWER}.*'",
        )


def _own() -> Distribution:
    try:
        return distribution(DISTRIBUTION)
    except PackageNotFoundError as error:
        raise CodeError(f"the distribution '{DISTRIBUTION}' is not installed", fix="install it with pip") from error


def _editable_folder(own: Distribution) -> Path | None:
    """The source folder of an editable installation; None for a wheel."""
    record = json.loads(own.read_text("direct_url.json") or "{}")
    if not record.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(record["url"]).path))


def _check_files(own: Distribution) -> None:
    """Against the hashes that the installer wrote down. An editable installation has none: its code may change."""
    if _editable_folder(own) is not None:
        return
    recorded = {str(path): path for path in own.files or () if path.parts[0] in PACKAGES and path.suffix == ".py"}
    root = Path(str(own.locate_file("")))
    there = {str(path.relative_to(root)) for name in PACKAGES for path in (root / name).rglob("*.py")}
    wrong = sorted(there ^ set(recorded)) or [name for name, path in recorded.items() if _differs(path)]
    if wrong:
        raise CodeError(
            f"{len(wrong)} file(s) of fedbridge are not as they were installed, the first is {wrong[0]}",
            why="it was changed, removed or added after the installation, or another package brought one of its name",
            fix="use an environment for fedbridge alone, and install it again (pip install --force-reinstall)",
        )


def _differs(path: PackagePath) -> bool:
    if path.hash is None:
        return False
    found = hashlib.new(path.hash.mode, path.read_binary()).digest()
    return base64.urlsafe_b64encode(found).rstrip(b"=").decode() != path.hash.value

"""What the real sets share: finding their recordings, and keeping what was computed from them once."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bridge.files import write_whole
from client.readers.base import Reader
from simulations.errors import CohortError
from simulations.source import cache_root


def recordings(folder: Path, arrays: tuple[str, ...]) -> list[Path]:
    """The `.npz` files of a folder, sorted; raises `CohortError` where there is none or one lacks an array."""
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise CohortError(
            f"{folder}: no recordings",
            why="the folder is missing or holds no .npz file",
            fix="set source.folder to where the recordings are",
        )
    for path in files:
        try:
            with np.load(path, allow_pickle=False) as archive:
                missing = [name for name in arrays if name not in archive.files]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CohortError(
                f"{path}: can't be read as .npz", why=f"{type(error).__name__}: {error}", fix="copy the file again"
            ) from error
        if missing:
            raise CohortError(
                f"{path}: is not a recording of this set",
                why=f"it has no array {', '.join(missing)}",
                fix="set source.folder to the folder of this set",
            )
    return files


def found_files(folder: Path, reader: Reader, expected: str) -> list[Path]:
    """What a set's own reader finds in its folder, sorted; raises `CohortError` where that is nothing, or twice the
    same."""
    files = reader.files(folder)
    if not files:
        raise CohortError(
            f"{folder}: no recordings",
            why=f"the folder is missing or holds no {expected}",
            fix="set source.folder to where the set was unpacked (docs/datasets.md)",
        )
    names = Counter(reader.name(path) for path in files)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise CohortError(
            f"{folder}: {count} recordings are called '{name}'",
            why="the set seems to lie there twice",
            fix="set source.folder to one copy of it",
        )
    return files


def cached_json(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives (plain JSON values), kept as `cache_root()/labels/<name>.json`; written in one rename."""
    path = cache_root() / "labels" / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Absent or damaged: made anew.
        value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value))
    return value

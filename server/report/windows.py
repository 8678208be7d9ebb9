"""A few example windows beside `run.json`: the only signals a report ever shows.

`example_windows.json` holds a list of `ExampleWindow`. Only a simulation writes it, from the built-in cohort or from
public recordings; a deployed coordinator never sees a signal, so its report has no such picture. Windows with the same
title are one moment seen in several modalities and are drawn one above the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError

from bridge.config import Settings
from bridge.files import write_whole
from server.errors import RunFolderError

EXAMPLE_WINDOWS = "example_windows.json"


class ExampleWindow(Settings):
    """One channel of one window as the encoder reads it (after preprocessing, so without a unit)."""

    title: str = Field(min_length=1, max_length=80)
    """What is shown, with no name of a patient or a recording: `Example 1, class high`."""
    role: Literal["old", "new"]
    modality: str
    channel: str
    rate_hz: float = Field(gt=0)
    values: list[float] = Field(min_length=2, max_length=100_000)


_LIST = TypeAdapter(list[ExampleWindow])


def write_example_windows(folder: Path, windows: Sequence[ExampleWindow]) -> None:
    """Write `example_windows.json`; raises `RunFolderError` where the folder can't be written."""
    try:
        write_whole(folder / EXAMPLE_WINDOWS, _LIST.dump_json(list(windows)))
    except OSError as error:
        raise RunFolderError(
            f"{folder}: example windows can't be written",
            why=error.strerror or "",
            fix="free space or choose a writable --out",
        ) from error


def read_example_windows(folder: Path) -> list[ExampleWindow]:
    """The windows, none where there is no file; raises `RunFolderError` where the file can't be used."""
    path = folder / EXAMPLE_WINDOWS
    try:
        return _LIST.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunFolderError(f"{path}: can't be read", why=error.strerror or "", fix="check its permissions") from error
    except ValidationError as error:
        raise RunFolderError(
            f"{path}: is not a list of example windows",
            why=str(error).splitlines()[0],
            fix="delete the file, or run again",
        ) from error

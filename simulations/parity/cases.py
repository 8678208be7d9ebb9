"""The cases in a folder of numeric fixtures: found by what their files hold, whatever they are called.

`<case>.json` with `<case>.npz` beside it describes an encoder (it names a `model`) or several cases of preprocessing
(each entry has an `input`). The folder is data: nothing in it is executed.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from simulations.errors import FixtureError
from simulations.parity.fill import Profile

Arrays = dict[str, NDArray[np.float32]]
Size = Annotated[int, Field(ge=1, le=2**31)]
Sizes = Annotated[tuple[Size, ...], Field(min_length=1)]
Kind = Literal["encoder", "preprocessing", "unreadable"]


class _Facts(BaseModel):
    # What the format says beside is for people.
    model_config = ConfigDict(frozen=True, extra="ignore")


class SignalRecipe(_Facts):
    """An input signal."""

    tag: str
    shape: Sizes
    amplitude: float = 1.0
    then: str = ""
    """What is done to it before the model reads it, in words."""
    rate_hz: float | None = Field(default=None, gt=0)
    sha256: str = ""
    sha256_before_swap: str = ""

    @property
    def digest(self) -> str:
        """Of the signal as it is made."""
        return self.sha256 or self.sha256_before_swap


class TokensRecipe(_Facts):
    """What is written into the input of a block."""

    tag: str
    shape: Sizes
    scale: float = 1.0
    sha256: str


class EncoderFacts(_Facts):
    """A case of an encoder."""

    model: str
    checkpoint_keys: str
    seed: int
    profile: Profile
    checkpoint_sha256: str | None = None
    input: SignalRecipe
    positions: int = Field(ge=1)
    shapes: dict[int, dict[Literal["in", "out"], Sizes]]
    row_index: dict[int, dict[Literal["in", "out"], list[int]]] = Field(default_factory=dict)
    final_row_index: list[int] = Field(default_factory=list)
    mid: dict[int, TokensRecipe] = Field(default_factory=dict)
    extras: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    arch: dict[str, Any] = Field(default_factory=dict)
    channels: tuple[str, ...] = ()
    use_abs_pos_emb: bool = True
    time_embed_length: int | None = None
    nvar: int | None = None


class PreprocessingFacts(_Facts):
    """A case of preprocessing."""

    input: SignalRecipe
    output_shape: Sizes
    rate_out_hz: float = Field(gt=0)
    stored: str = "all"


class _Keys(_Facts):
    keys: dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class FoundCase:
    """A case that a folder has, read no further than its kind."""

    folder: Path
    file: str
    """Its files' name without the ending."""
    entry: str
    """Of preprocessing, the entry in the file; otherwise empty."""
    kind: Kind

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.file}/{self.entry}" if self.entry else self.file


def find_cases(folder: Path) -> list[FoundCase]:
    """Every case in the folder, by name; what looks like one and can't be read is among them.

    Raises `FixtureError` where there is no folder or no case.
    """
    if not folder.is_dir():
        raise FixtureError(f"{folder}: no such folder", fix="name a folder of numeric fixtures")
    with_arrays = {path.stem for path in folder.glob("*.npz")}
    described = {path.stem for path in folder.glob("*.json")}
    found = [case for name in sorted(with_arrays | described) for case in _cases_of(folder, name, name in with_arrays)]
    if not found:
        raise FixtureError(
            f"{folder}: no case in it",
            why="a case is <case>.json, which names a model, with <case>.npz beside it",
            fix="name a folder of numeric fixtures",
        )
    return found


def choose(cases: Sequence[FoundCase], names: Sequence[str]) -> list[FoundCase]:
    """Those of the names, or all where none is named; where no case has the name, a file's or an entry's will do.

    Raises `FixtureError` for a name that nothing has.
    """
    if not names:
        return list(cases)
    known = {case.name for case in cases}
    meant = {name: {name} if name in known else _called(cases, name) for name in names}
    unknown = [name for name, found in meant.items() if not found]
    if unknown:
        raise FixtureError(f"no case is called {', '.join(unknown)}", fix=f"name one of {', '.join(sorted(known))}")
    wanted = set().union(*meant.values())
    return [case for case in cases if case.name in wanted]


def _called(cases: Sequence[FoundCase], name: str) -> set[str]:
    return {case.name for case in cases if name in (case.file, case.entry)}


def _cases_of(folder: Path, name: str, has_arrays: bool) -> list[FoundCase]:
    try:
        facts = _json(folder / f"{name}.json")
    except FixtureError:
        return [FoundCase(folder, name, "", "unreadable")]
    if isinstance(facts, dict) and ("model" in facts or "checkpoint_keys" in facts):
        return [FoundCase(folder, name, "", "encoder")]
    entries = (
        [key for key, entry in facts.items() if isinstance(entry, dict) and "input" in entry]
        if (isinstance(facts, dict))
        else []
    )
    if entries:
        return [FoundCase(folder, name, entry, "preprocessing") for entry in sorted(entries)]
    # A list of names, say; but arrays that nothing describes are a case that was damaged.
    return [FoundCase(folder, name, "", "unreadable")] if has_arrays else []


def encoder_facts(case: FoundCase) -> EncoderFacts:
    """What a case of an encoder says. Raises `FixtureError`."""
    return _valid(_json(case.folder / f"{case.file}.json"), EncoderFacts, case.name)


def preprocessing_facts(case: FoundCase) -> PreprocessingFacts:
    """What a case of preprocessing says. Raises `FixtureError`."""
    return _valid(_json(case.folder / f"{case.file}.json")[case.entry], PreprocessingFacts, case.name)


def checkpoint_keys(case: FoundCase, facts: EncoderFacts) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and kinds of number in the published file. Raises `FixtureError`."""
    path = case.folder / facts.checkpoint_keys
    if not path.resolve().is_relative_to(case.folder.resolve()):
        raise FixtureError(f"{case.name}: damaged", why=f"checkpoint_keys leaves the folder: {facts.checkpoint_keys}")
    return _valid(_json(path), _Keys, f"{case.name}: {facts.checkpoint_keys}").keys


def arrays_of(case: FoundCase) -> Arrays:
    """What the originals computed. Raises `FixtureError`."""
    path = case.folder / f"{case.file}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if not case.entry or name == case.entry}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FixtureError(
            f"{case.name}: its arrays can't be read", why=f"{path.name}: {error}", fix="copy the folder again"
        ) from error


Facts = TypeVar("Facts", bound=BaseModel)


def _valid(value: Any, kind: type[Facts], name: str) -> Facts:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        why = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3])
        raise FixtureError(
            f"{name}: not a case of the fixtures' format", why=why, fix="copy the folder again"
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise FixtureError(f"{path.name}: can't be read", why=why or "", fix="copy the folder again") from error

"""YAML files into frozen pydantic models, with errors that name the file, the key and the closest valid key."""

from __future__ import annotations

import difflib
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from bridge.errors import ConfigError


class Settings(BaseModel):
    """Base of every configuration model: frozen, unknown keys refused, defaults checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


Model = TypeVar("Model", bound=BaseModel)


def load_yaml(path: Path) -> Any:
    """The content of a YAML file; raises `ConfigError` where it can't be read or is no YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read", why=error.strerror or "", fix="check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file", why="it is not UTF-8", fix="name a YAML file") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """YAML text into plain values; `name` is how errors call it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"{name}:{where} is not valid YAML", why=str(getattr(error, "problem", "") or ""), fix="correct the syntax"
        ) from error


def load_model(path: Path, model: type[Model]) -> Model:
    """Read a YAML file into `model`; every problem is one `ConfigError`."""
    return parse_model(load_yaml(path), model, str(path))


def parse_model(value: Any, model: type[Model], name: str) -> Model:
    """Validate plain values as `model`; `name` is the file's, for errors."""
    if not isinstance(value, dict):
        raise ConfigError(
            f"{name}: holds no keys",
            why="a mapping of keys to values is expected",
            fix=f"see the keys of {model.__name__}",
        )
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = [_explain(details, model) for details in error.errors()]
        raise ConfigError(
            f"{name}: " + "; ".join(lines), why=f"{len(lines)} problem(s) in the file", fix=_FIX
        ) from error


_FIX = "correct the named keys; each key is explained in the file that ships and in docs/reference/configs.md"


def _explain(details: ErrorDetails, model: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        close = _closest(details["loc"], model)
        return f"unknown key '{path}'" + (f", did you mean '{close}'?" if close else "")
    if details["type"] == "missing":
        return f"key '{path}' is missing"
    shown = details.get("input")
    value = f" (found {shown!r})" if isinstance(shown, str | int | float | bool) or shown is None else ""
    return f"key '{path}': {details['msg']}{value}"


def _closest(loc: tuple[int | str, ...], model: type[BaseModel]) -> str | None:
    """The valid key nearest to the unknown one, among its siblings and, failing that, in the whole model."""
    siblings = _fields_at(model, loc[:-1])
    found = difflib.get_close_matches(str(loc[-1]), siblings, n=1, cutoff=0.5)
    found = found or difflib.get_close_matches(str(loc[-1]), sorted(_all_fields(model)), n=1, cutoff=0.75)
    return found[0] if found else None


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    models: list[type[BaseModel]] = [model]
    for part in loc:
        inner: list[type[BaseModel]] = []
        for each in models:
            field = each.model_fields.get(str(part)) or _by_alias(each, str(part))
            inner += _models_in(field.annotation) if field else []
        # Discriminated unions and containers put tags and indices into the path: stay where we are for those.
        models = inner or models
    return [_key(each, name) for each in models for name in each.model_fields]


def _by_alias(model: type[BaseModel], alias: str) -> Any:
    return next((field for field in model.model_fields.values() if field.alias == alias), None)


def _key(model: type[BaseModel], name: str) -> str:
    return model.model_fields[name].alias or name


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, dict, list, tuple) or get_args(annotation):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    return []


def _all_fields(model: type[BaseModel]) -> set[str]:
    names: set[str] = set()
    stack, seen = [model], set()
    while stack:
        each = stack.pop()
        if each in seen:
            continue
        seen.add(each)
        names |= {_key(each, name) for name in each.model_fields}
        stack += [inner for field in each.model_fields.values() for inner in _models_in(field.annotation)]
    return names

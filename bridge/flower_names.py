"""Private names of Flower's that the pinning of code is built on: used while they are what they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from bridge.errors import CodeError
from bridge.installation import TESTED_FLOWER


def flower_module(name: str, attributes: tuple[str, ...]) -> ModuleType:
    """A module of Flower's that has these (private) names. Raises `CodeError` where it has not."""
    try:
        module = import_module(name)
    except ImportError as error:
        raise _other_flower(name) from error
    for attribute in attributes:
        if not hasattr(module, attribute):
            raise _other_flower(f"{name}.{attribute}")
    return module


def replace_names(module: ModuleType, function: str, replacements: Mapping[str, Callable[..., Any]]) -> None:
    """Replace global names that a function of that module calls. Raises `CodeError` where it would not meet them.

    Without this check a Flower that calls another function of its own would go around the replacement in silence.
    """
    code = getattr(getattr(module, function, None), "__code__", None)
    for name in replacements:
        if code is None or name not in code.co_names or not hasattr(module, name):
            raise _other_flower(f"{module.__name__}.{name}")
    for name, replacement in replacements.items():
        setattr(module, name, replacement)


def _other_flower(name: str) -> CodeError:
    return CodeError(
        f"this Flower has no '{name}'",
        why=f"what pins the code that runs on this site's data is built on Flower {TESTED_FLOWER}'s",
        fix=f"pip install 'flwr=={TESTED_FLOWER}.*'",
    )

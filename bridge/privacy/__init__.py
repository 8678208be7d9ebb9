"""Privacy mechanisms, by the name that a job asks for.

The mechanisms themselves need torch and are loaded when they are first used: the accounting beside them stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bridge.errors import ConfigError
from bridge.privacy.mechanism import Batch, Mechanism, Plan, SiteUpdate, TrainPlan

if TYPE_CHECKING:
    from bridge.privacy.central import CentralPrivacy
    from bridge.privacy.local import LocalPrivacy
    from bridge.privacy.none import NoPrivacy

__all__ = [
    "Batch",
    "CentralPrivacy",
    "LocalPrivacy",
    "Mechanism",
    "NoPrivacy",
    "Plan",
    "SiteUpdate",
    "TrainPlan",
    "mechanism",
]

_CLASSES = {"none": "NoPrivacy", "local": "LocalPrivacy", "central": "CentralPrivacy"}


def mechanism(name: str) -> Mechanism:
    """The mechanism of that name; raises `ConfigError` where there is none."""
    if name not in _CLASSES:
        raise ConfigError(
            f"privacy mechanism '{name}' is unknown", why=f"known: {', '.join(_CLASSES)}", fix="correct the job"
        )
    found: Mechanism = getattr(import_module(f"{__name__}.{name}"), _CLASSES[name])()
    return found


def __getattr__(name: str) -> Any:
    for module, kind in _CLASSES.items():
        if kind == name:
            return getattr(import_module(f"{__name__}.{module}"), kind)
    raise AttributeError(f"module {__name__} has no attribute {name}")

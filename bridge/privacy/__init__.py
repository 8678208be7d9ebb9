"""Privacy mechanisms, by the name that a job asks for."""

from __future__ import annotations

from bridge.errors import ConfigError
from bridge.privacy.mechanism import Batch, Mechanism, Plan, SiteUpdate, TrainPlan
from bridge.privacy.none import NoPrivacy

__all__ = ["Batch", "Mechanism", "NoPrivacy", "Plan", "SiteUpdate", "TrainPlan", "mechanism"]

_MECHANISMS: dict[str, type[Mechanism]] = {"none": NoPrivacy}


def mechanism(name: str) -> Mechanism:
    """The mechanism of that name; raises `ConfigError` where there is none."""
    if name not in _MECHANISMS:
        raise ConfigError(
            f"privacy mechanism '{name}' is unknown", why=f"known: {', '.join(_MECHANISMS)}", fix="correct the job"
        )
    return _MECHANISMS[name]()

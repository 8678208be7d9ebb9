"""What Flower says of a run, and how to stop it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from bridge.errors import ServiceError
from server.coordinator.folder import CONNECTION
from server.flower_command import FlowerCommand, words

_NO_DETAILS, _UNKNOWN = "N/A", "Run ID not found"
Ending = Literal["", "completed", "failed", "stopped", "lost"]


@dataclass(frozen=True)
class FlowerStatus:
    """A run at Flower: `ending` is empty as long as it goes on, `lost` where the SuperLink knows no such run."""

    ending: Ending
    details: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return bool(self.ending)


def flower_status(flower: FlowerCommand, run: str) -> FlowerStatus:
    """Ask the SuperLink. Raises `ServiceError` where it does not answer."""
    answer = flower.ask("list", CONNECTION, "--run-id", run)
    runs = answer.get("runs") or []
    if runs:
        status = str(runs[0].get("status", ""))
        if not status.startswith("finished:"):
            return FlowerStatus("")
        ending = status.partition(":")[2]
        known = ending if ending in ("completed", "failed", "stopped") else "failed"
        details = str(runs[0].get("status-details") or "")
        return FlowerStatus(cast(Ending, known), "" if details == _NO_DETAILS else details)
    if answer.get("success") or _UNKNOWN in words(answer):
        return FlowerStatus("lost", "the SuperLink does not know the run: its database is another one")
    raise ServiceError(
        "the SuperLink does not answer", why=words(answer), fix="see `fedbridge-server status`, then start it"
    )


def stop_in_flower(flower: FlowerCommand, run: str) -> None:
    """Tell the SuperLink to stop a run. Raises `ServiceError` where it does not."""
    answer = flower.ask("stop", run, CONNECTION)
    if not answer.get("success") and not flower_status(flower, run).is_over:
        raise ServiceError("Flower did not stop the run", why=words(answer), fix="try again")

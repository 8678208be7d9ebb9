"""`rehearsal.json`: what would leave the site in a run of a study, and what the run would cost its machine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bridge.config import Settings


class Outgoing(Settings):
    """One item of one reply, as the audit log has it."""

    number: int
    """The message that it answers."""
    message: str
    round: int | None
    split: str | None
    item: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str
    file: str
    """Where its content was written, below the folder of the rehearsal."""


class MessageRecord(Settings):
    """One message to the site and what became of it."""

    number: int
    message: str
    round: int | None
    split: str | None
    outcome: str
    """`OK`, or the reason code by name."""
    why: str = ""
    """What the site's log says of a refusal; it stays at the site."""
    ready_seconds: float
    """From the start of the message's process until it could begin to compute."""
    seconds: float
    """From the start of the process until the reply was there."""
    peak_bytes: int
    """The most memory that the process held."""
    cached_bytes: int
    """By how much the feature cache grew."""


class Rehearsal(Settings):
    """The keys of `rehearsal.json`. Sums are of a whole run in which nothing is asked twice."""

    schema_: Literal["fedbridge.rehearsal/1"] = Field(default="fedbridge.rehearsal/1", alias="schema")
    study: str
    """The study's id."""
    study_sha256: str
    site: str
    pretend: tuple[str, ...]
    """Names of the pretend sites; the first is the site as it is."""
    when: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    mechanism: str
    timeout_seconds: float
    """How long the coordinator waits for a reply."""

    bytes: int
    """Of all items, as the audit log counts them."""
    planned_bytes: tuple[int, int]
    """The same from the study alone, at least and at most: they differ where the run chooses the bridge's positions."""
    seconds: float
    """How long the run keeps one processor core of the machine busy."""
    starting_seconds: float
    """Of these, starting Python and reading the programs' code, once a message."""
    features_seconds: float
    """Of these, in messages that read recordings and computed features."""
    longest_seconds: float
    """The longest message."""
    peak_bytes: int
    """The most memory that a message's process held."""
    services_bytes: int
    """What SuperNode and executor hold beside it, all the time."""
    disk_bytes: int
    """What a run adds to the site's disk: features, ledger, audit log."""

    messages: tuple[MessageRecord, ...]
    outgoing: tuple[Outgoing, ...]

    @property
    def refused(self) -> tuple[MessageRecord, ...]:
        """Messages that were answered by a reason code alone."""
        return tuple(message for message in self.messages if message.outcome != "OK")

"""What a file's name tells, for formats that carry neither patient nor label inside."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from bridge.config import Settings
from bridge.windows import Modality
from client.errors import RecordingError


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_regex)]


class NamedSignal(Settings):
    """One modality: our channel names, and what the file calls them."""

    channels: dict[str, str | tuple[str, ...]] = Field(min_length=1)
    """For each channel its name in the file, or several of which the first that the file has is taken."""
    scale: float = 1.0
    """Factor from the library's unit to ours."""


class NamedFiles(Settings):
    """Options of readers whose files name neither patient nor label."""

    signals: dict[Modality, NamedSignal] = Field(min_length=1)
    patient_pattern: Pattern = r"^.*$"
    """Regular expression whose first group (or whole match) in the file's stem is the patient."""
    label_pattern: Pattern | None = None
    """Regular expression whose first group (or whole match) in the file's stem is the label of the whole file."""


def match_name(pattern: str, stem: str, what: str) -> str:
    """What a pattern finds in a file's stem; raises `RecordingError` where it does not match."""
    found = re.search(pattern, stem)
    if found is None:
        raise RecordingError(
            f"{stem}: the file's name gives no {what}",
            why=f"{what}_pattern {pattern!r} does not match it",
            fix=f"correct {what}_pattern in the reader's options, or exclude the file",
        )
    return str(found.group(1) if found.re.groups else found.group(0))


def chosen_labels(signal: NamedSignal, in_file: list[str]) -> tuple[list[str], str]:
    """The file's own names of the channels, in order; and, where one is not there, a text that says which."""
    labels = []
    for channel, wanted in signal.channels.items():
        options = (wanted,) if isinstance(wanted, str) else wanted
        label = next((option for option in options if option in in_file), None)
        if label is None:
            return [], f"no channel {' or '.join(options)} (for {channel}); the file has {', '.join(in_file)}"
        labels.append(label)
    return labels, ""

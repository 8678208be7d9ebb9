"""The JSON card that travels with weights: what they are, what they read, and the layout at each position.

A model folder holds `card.json` and `weights.safetensors`. The digest is the sha256 over the weights file's sha256 and
the card without its digest, so neither can be changed alone. The card alone answers every question about shapes, so
nothing that only routes or checks messages needs to import torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from bridge.config import Settings
from bridge.errors import PositionError, WeightsError
from bridge.hashing import sha256_file, sha256_json
from bridge.windows import Preprocessing, WindowSpec

CARD = "card.json"
WEIGHTS = "weights.safetensors"

Layout = tuple[int, int]


class EncoderCard(Settings):
    """Everything about an encoder but its weights."""

    schema_: Literal["fedbridge.encoder/1"] = Field(default="fedbridge.encoder/1", alias="schema")
    family: str
    """Entry point name in the group `fedbridge.encoders`: the class that can load the weights."""
    window: WindowSpec
    preprocessing: Preprocessing
    layouts_in: tuple[Layout, ...] = Field(min_length=1)
    layouts_out: tuple[Layout, ...] = Field(min_length=1)
    parameters: int = Field(ge=0)
    architecture: dict[str, int | float | str | bool | list[int]] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    """Provenance: data, patients' count, objective, seed, licence. Free keys, plain JSON values."""
    weights_sha256: str
    digest: str = ""

    @model_validator(mode="after")
    def _same_length(self) -> EncoderCard:
        if len(self.layouts_in) != len(self.layouts_out):
            raise ValueError("layouts_in and layouts_out must have one entry a position")
        return self

    @property
    def positions(self) -> int:
        """How many positions the encoder has."""
        return len(self.layouts_in)

    def layout(self, position: int, side: str) -> Layout:
        """`(tokens, width)` of a position's input or output; raises `PositionError`."""
        if not 0 <= position < self.positions:
            raise PositionError(
                f"position {position} is not one of this {self.window.modality} encoder's",
                why=f"it has positions 0 to {self.positions - 1}",
                fix="choose a position in that range",
            )
        return (self.layouts_in if side == "in" else self.layouts_out)[position]


class HeadCard(Settings):
    """Everything about a task head but its weights: one linear layer on the old encoder's pooled final tokens."""

    schema_: Literal["fedbridge.head/1"] = Field(default="fedbridge.head/1", alias="schema")
    classes: tuple[str, ...] = Field(min_length=2)
    width: int = Field(gt=0)
    old_encoder: str
    """Digest of the encoder that the head was fitted on."""
    training: dict[str, Any] = Field(default_factory=dict)
    weights_sha256: str
    digest: str = ""


Card = TypeVar("Card", EncoderCard, HeadCard)


def seal(card: Card) -> Card:
    """The same card with its digest filled in."""
    return card.model_copy(update={"digest": _digest(card)})


def write_card(folder: Path, card: EncoderCard | HeadCard) -> None:
    """Write a sealed card beside its weights."""
    text = json.dumps(card.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False)
    (folder / CARD).write_text(text + "\n", encoding="utf-8")


def read_card(folder: Path, kind: type[Card]) -> Card:
    """Read a card and check it against its own digest and the weights file's hash.

    Raises `WeightsError` where a file is missing, the card is not of this kind, or a hash does not fit.
    """
    try:
        card = kind.model_validate(json.loads((folder / CARD).read_text(encoding="utf-8")))
        weights = sha256_file(folder / WEIGHTS)
    except OSError as error:
        raise WeightsError(
            f"{folder}: no complete model folder",
            why=f"{CARD} and {WEIGHTS} are needed: {error.strerror}",
            fix="copy the whole folder",
        ) from error
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(
            f"{folder / CARD}: not a valid {kind.__name__}",
            why=str(error).splitlines()[0],
            fix="use the card written with the weights",
        ) from error
    if weights != card.weights_sha256:
        raise WeightsError(
            f"{folder / WEIGHTS}: not the weights that the card describes",
            why=f"sha256 is {weights[:16]}..., the card says {card.weights_sha256[:16]}...",
            fix="copy the whole folder again from its source",
        )
    if _digest(card) != card.digest:
        raise WeightsError(
            f"{folder / CARD}: the card was changed after it was written",
            why=f"its content hashes to {_digest(card)[:16]}..., it claims {card.digest[:16]}...",
            fix="copy the whole folder again from its source",
        )
    return card


def _digest(card: EncoderCard | HeadCard) -> str:
    return sha256_json(card.model_dump(mode="json", by_alias=True, exclude={"digest"}))

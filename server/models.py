"""What the server knows of the frozen models: their cards. It never loads a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.errors import WeightsError
from bridge.job import Job
from bridge.messages import Dimensions
from bridge.shape import BridgeShape


@dataclass(frozen=True)
class FrozenModels:
    """The three cards of a models folder."""

    folder: Path
    old_encoder: EncoderCard
    new_encoder: EncoderCard
    task_head: HeadCard

    def dimensions(self, job: Job, positions: tuple[int, int] | None = None) -> Dimensions:
        """Sizes of all items; those of the bridge's need `(m, l)`. Raises `PositionError`."""
        return Dimensions.of(job, self.old_encoder, self.new_encoder, self.task_head, positions)

    def bridge_shape(self, job: Job, positions: tuple[int, int]) -> BridgeShape:
        """Sizes of the bridge between `(m, l)`. Raises `PositionError`."""
        return BridgeShape.of(job.bridge, self.old_encoder, self.new_encoder, positions)

    def cards(self) -> dict[str, dict[str, Any]]:
        """The cards as plain values by name, for the run record."""
        named = {"old_encoder": self.old_encoder, "new_encoder": self.new_encoder, "task_head": self.task_head}
        return {name: card.model_dump(mode="json", by_alias=True) for name, card in named.items()}


def read_models(folder: Path, job: Job) -> FrozenModels:
    """The cards in `folder`, checked against their weights, against the job's digests and against each other.

    Raises `WeightsError` where a file is missing or changed, or a digest is not the job's.
    """
    old, new = (read_card(folder / name, EncoderCard) for name in ("old_encoder", "new_encoder"))
    head = read_card(folder / "task_head", HeadCard)
    for name, card in (("old_encoder", old), ("new_encoder", new), ("task_head", head)):
        wanted = getattr(job.models, name)
        if card.digest != wanted:
            raise WeightsError(
                f"{folder / name}: not the model of the job",
                why=f"its digest is {card.digest[:16]}..., the job says {wanted[:16]}...",
                fix="use the models folder with which the job was prepared",
            )
    width = old.layout(old.positions - 1, "out")[1]
    if head.old_encoder != old.digest or head.width != width:
        raise WeightsError(
            f"{folder / 'task_head'}: the head does not belong to the old encoder",
            why=f"it reads width {head.width} of encoder {head.old_encoder[:16]}..., the encoder has width {width}",
            fix="use the head that was fitted on this encoder",
        )
    return FrozenModels(folder, old, new, head)

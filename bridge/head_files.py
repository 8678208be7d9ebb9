"""Writing what a fit made: the head's folder and, where the whole encoder was trained, that of the new encoder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from bridge.encoders.cards import WEIGHTS, EncoderCard, HeadCard
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.errors import WeightsError, WeightsStorageError
from bridge.files import cause, require_free
from bridge.head import save_head

if TYPE_CHECKING:
    from bridge.head_fit import FittedHead

ENCODER, HEAD = "old_encoder", "task_head"
_LICENCE = ("model", "licence_code", "licence_weights", "commercial_use")
_ORIGIN = (*_LICENCE, "official_file", "source_sha256", "options")
_PRIVATE, _PUBLIC = ("private_patients", "fitted_on", "privacy"), ("public", "public_patients")


def save_fitted(
    fitted: FittedHead,
    card: EncoderCard,
    folder: Path,
    *,
    classes: tuple[str, ...],
    training: Mapping[str, Any],
    left_out: Collection[str] = (),
) -> tuple[EncoderCard, HeadCard]:
    """Write `folder/task_head` and, where the whole was trained, `folder/old_encoder`, whole or not at all; returns the
    card of the encoder that the head belongs to and the head's.

    `card` is of the encoder that was given to the fit. `training` says on what it was fitted (`data`, `public`,
    `public_patients`, ...); licences and the origin of the weights are carried on from `card`, and so is that a
    hospital's patients lent data to them. `left_out` names what the cards shall not tell of the fit.

    Raises `ConfigError` where one of the folders is there, `WeightsStorageError` where they can't be written, and
    `WeightsError` where the new encoder's family does not read back what its own state is.
    """
    names = [ENCODER, HEAD] if fitted.settings.train == "whole" else [HEAD]
    for name in names:
        require_free(folder / name)
    facts = {key: value for key, value in _facts(fitted).items() if key not in left_out} | dict(training)
    partial, made = None, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".fitted.", dir=folder))
        encoder = _write_encoder(fitted, card, partial / ENCODER, facts) if ENCODER in names else card
        licence = {key: card.training[key] for key in _LICENCE if key in card.training}
        head = save_head(
            partial / HEAD,
            fitted.head,
            classes=classes,
            old_encoder=encoder.digest,
            training={**licence, **facts},
        )
        _into_place(partial, folder, names)
    except (OSError, SafetensorError) as error:
        raise WeightsStorageError(
            f"{folder}: the fitted models can't be written",
            why=cause(error) if isinstance(error, OSError) else str(error),
            fix="free space, or name a folder that can be written; nothing was left behind",
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return encoder, head


def _facts(fitted: FittedHead) -> dict[str, Any]:
    """What a card tells of the fit."""
    return {
        "objective": "cross-entropy of labels; "
        + ("encoder and head trained together" if fitted.settings.train == "whole" else "encoder frozen, head trained"),
        "settings": fitted.settings.model_dump(mode="json"),
        "kept_epoch": fitted.history.kept_step,
        "held_back_balanced_accuracy": round(fitted.balanced_accuracy, 4),
        "held_back_interval": None if fitted.interval is None else [round(each, 4) for each in fitted.interval],
        "chance": round(fitted.chance, 4),
        "better_than_chance": fitted.better_than_chance,
        "sentence": fitted.sentence(),
        "patients": fitted.patients,
        "held_back_patients": fitted.held_back,
        "windows": fitted.windows,
        "windows_by_class": list(fitted.windows_by_class),
    }


def _write_encoder(fitted: FittedHead, card: EncoderCard, folder: Path, facts: Mapping[str, Any]) -> EncoderCard:
    """Write the trained encoder and read it back: an own family may keep its weights under other names."""
    assert isinstance(fitted.encoder, nn.Module)
    state = fitted.encoder.state_dict()
    training = _inherited(card, facts)
    sealed = save_encoder(folder, state, card.model_copy(update={"training": training, "digest": ""}))
    read = load_encoder(folder)
    again = read.state_dict() if isinstance(read, nn.Module) else {}
    if again.keys() != state.keys() or not all(torch.equal(again[name].cpu(), state[name].cpu()) for name in state):
        raise WeightsError(
            f"the family '{card.family}' can't be trained as a whole",
            why="what its load() makes of its own state_dict() is another network",
            fix="let load() fill in weights under their names in state_dict(), or set train: head",
        )
    return sealed


def _inherited(card: EncoderCard, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance of an encoder that was trained on: what holds of the original holds of it, too.

    It counts as public only where both trainings were, and as private where one of them was.
    """
    before, private = card.training, card.training.get("public") is False or bool(card.training.get("private_patients"))
    public = before.get("public") is True or bool(before.get("public_patients"))
    found = {key: before[key] for key in _ORIGIN if key in before}
    found |= {key: before[key] for key in _PRIVATE if private and key in before}
    found |= dict(facts)
    if private or facts.get("public") is False:
        found["public"] = False
    if not public or found.get("public") is False:
        found = {key: value for key, value in found.items() if key not in _PUBLIC or value is False}
    found["trained_from"] = card.digest
    told = dict.fromkeys(str(each) for each in (before.get("data"), facts.get("data")) if each)
    found["data"] = "; then ".join(told)
    return found


def _into_place(partial: Path, folder: Path, names: list[str]) -> None:
    """Move the folders to their names, the head last: with it all is there. What can't be finished is taken back."""
    done: list[Path] = []
    try:
        for name in names:
            # Temporary folders, and what safetensors writes, are their maker's alone; services read as other users.
            (partial / name).chmod(0o755)
            (partial / name / WEIGHTS).chmod(0o644)
            (partial / name).rename(folder / name)
            done.append(folder / name)
    except OSError:
        for each in done:
            shutil.rmtree(each, ignore_errors=True)
        raise

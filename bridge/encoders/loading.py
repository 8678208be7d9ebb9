"""Model folders: write an encoder with its sealed card, and load whatever family a card names, frozen."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from bridge.encoders.cards import WEIGHTS, EncoderCard, read_card, seal, write_card
from bridge.encoders.protocol import Encoder, Side
from bridge.errors import WeightsError
from bridge.hashing import sha256_file

GROUP = "fedbridge.encoders"
"""Entry points: family name to a class with `load(folder: Path, card: EncoderCard) -> Encoder`."""


def save_encoder(folder: Path, tensors: Mapping[str, Tensor], card: EncoderCard) -> EncoderCard:
    """Write `weights.safetensors` and the sealed `card.json` into `folder` (made if absent); return the sealed card."""
    weights_sha256 = save_tensors(folder, tensors)
    sealed = seal(card.model_copy(update={"weights_sha256": weights_sha256}))
    write_card(folder, sealed)
    return sealed


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors as `folder/weights.safetensors`; return the file's sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, folder / WEIGHTS)
    return sha256_file(folder / WEIGHTS)


def read_encoder_card(folder: Path) -> EncoderCard:
    """The card of a model folder, checked against its hashes, without building the network. Raises `WeightsError`."""
    return read_card(folder, EncoderCard)


def load_encoder(folder: Path) -> Encoder:
    """The frozen encoder of a model folder: eval mode, no parameter wants a gradient.

    Raises `WeightsError` where the folder is damaged, no installed package knows the card's family, or the network
    that was built is not the one that the card describes.
    """
    card = read_encoder_card(folder)
    encoder = _family(card.family, folder).load(folder, card)
    if not isinstance(encoder, Encoder):
        raise WeightsError(
            f"{folder}: family '{card.family}' gave something that is no encoder",
            why="it lacks methods of bridge.encoders.protocol.Encoder",
            fix="run bridge.encoders.contract.check_encoder on what its load returns",
        )
    if isinstance(encoder, nn.Module):
        encoder.eval().requires_grad_(False)
    _check_against_card(encoder, card, folder)
    return encoder


def _family(name: str, folder: Path) -> Any:
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise WeightsError(
            f"{folder}: its card names the encoder family '{name}', which is not installed here",
            why=f"installed families: {', '.join(sorted(found)) or 'none'}",
            fix=f"install the package that offers '{name}' in the entry point group {GROUP}",
        )
    return found[name].load()


def _check_against_card(encoder: Encoder, card: EncoderCard, folder: Path) -> None:
    sides: tuple[Side, Side] = ("in", "out")
    built = [tuple(tuple(encoder.layout(i, side)) for i in range(encoder.positions)) for side in sides]
    checks = (
        ("window", encoder.window, card.window),
        ("digest", encoder.digest, card.digest),
        ("input layouts", built[0], card.layouts_in),
        ("output layouts", built[1], card.layouts_out),
    )
    for what, is_, said in checks:
        if is_ != said:
            raise WeightsError(
                f"{folder}: the {what} of the network that was built differ from its card's",
                why=f"built: {is_}; card: {said}",
                fix="use the package version that the weights were made with",
            )

"""From a published model's official file to a model folder: `weights.safetensors` and a sealed card.

The same file, windows and options always give the same folder, byte for byte: hospitals that must fetch a file
themselves, because its licence forbids passing it on, get the digest that the study names. So the card names the file
by its sha256; when it was converted, under which name and by which versions is in `conversion.json` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from bridge.encoders.cards import WEIGHTS, EncoderCard
from bridge.encoders.checkpoint_file import CheckpointFile, read_checkpoint
from bridge.encoders.loading import save_encoder
from bridge.encoders.published import PublishedModel
from bridge.encoders.recipes import RECIPES
from bridge.errors import ConfigError, WeightsStorageError
from bridge.files import cause, require_free, whole_folder, write_whole
from bridge.windows import Modality, WindowSpec

CONVERSION = "conversion.json"
"""What is known of a conversion that is no property of its result."""


@dataclass(frozen=True)
class Conversion:
    """What an official file is converted for."""

    model: PublishedModel
    window: WindowSpec
    """The windows that the network is bound to."""
    options: Mapping[str, str | int]
    by_window: bool = False
    """Whether the recordings are epochs of their own, each prepared by itself."""


def window_for(
    model: PublishedModel,
    channels: Sequence[str] = (),
    seconds: float | None = None,
    rate_hz: float | None = None,
    modality: Modality | None = None,
) -> WindowSpec:
    """The model's windows; what is not given is as in the published experiments. Raises `ConfigError`."""
    rate = model.rate_hz[1] if rate_hz is None else rate_hz
    length = model.seconds if seconds is None else seconds
    samples = round(length * rate)
    if abs(samples - length * rate) > 1e-6:
        raise ConfigError(
            f"windows of {length:g} s can't be cut at {rate:g} Hz",
            why=f"they would have {length * rate:g} samples",
            fix="give seconds that make a whole number of samples",
        )
    names = tuple(channels) or model.channels
    if any(not name.strip() for name in names) or len(set(names)) < len(names):
        raise ConfigError(
            f"the channels {', '.join(map(repr, names))} can't be told apart",
            why="each needs a name of its own",
            fix="give names separated by commas, such as C3,C4",
        )
    try:
        return WindowSpec(modality=modality or model.modality, channels=names, rate_hz=rate, samples=samples)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(
            "there can be no such windows",
            why=f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}",
            fix="give a length and a rate above 0, and a modality that there is",
        ) from error


def convert(asked: Conversion, file: Path, out: Path) -> EncoderCard:
    """Write the model folder `out` from the official file, whole or not at all; returns its card.

    Raises `WeightsError` where the file is not the model's (missing, extra and misshapen keys by name), `WindowError`
    where the windows do not fit it, `ConfigError` for options that it has not and for an `out` that exists, and
    `WeightsStorageError` where `out` can't be written.
    """
    require_free(out)
    read = read_checkpoint(file)
    tensors, architecture = asked.model.convert(asked.model.unwrap(read.content), asked.window, **asked.options)
    encoder = asked.model.encoder().build(asked.window, architecture, tensors)
    recipe = RECIPES[asked.model.name]
    card = encoder.card(recipe.by_window() if asked.by_window else recipe, _training(asked, read))
    try:
        with whole_folder(out) as partial:
            sealed = save_encoder(partial, tensors, card)
            # Such a folder, and what safetensors writes, are their maker's alone; services read models as other users.
            partial.chmod(0o755)
            (partial / WEIGHTS).chmod(0o644)
            write_whole(partial / CONVERSION, _protocol(asked, file, read, sealed))
    except (OSError, SafetensorError) as error:
        raise WeightsStorageError(
            f"{out}: the model folder can't be written",
            why=cause(error) if isinstance(error, OSError) else str(error),
            fix="free space, or name a folder that can be written; nothing was left behind",
        ) from error
    return sealed


def _training(asked: Conversion, read: CheckpointFile) -> dict[str, str | bool]:
    """Provenance for the card; the sha256 of the result is the card's `weights_sha256`."""
    model = asked.model
    options = {name: asked.options.get(name, values[0] if values else 0) for name, values in model.options.items()}
    return {
        "data": f"as its authors trained {model.title}",
        "model": model.title,
        "official_file": model.official_file,
        "source_sha256": read.sha256,
        "licence_code": model.licence_code,
        "licence_weights": model.licence_weights,
        "commercial_use": model.commercial_use,
        "options": ", ".join(f"{name}={value}" for name, value in options.items()) or "none",
    }


def _protocol(asked: Conversion, file: Path, read: CheckpointFile, card: EncoderCard) -> str:
    facts = {
        "model": asked.model.name,
        "source": file.name,
        "source_sha256": read.sha256,
        "result_sha256": card.weights_sha256,
        "digest": card.digest,
        "converted": datetime.now(UTC).isoformat(timespec="seconds"),
        "fedbridge": version("fedbridge"),
        "torch": torch.__version__,
    }
    return json.dumps(facts, indent=2) + "\n"

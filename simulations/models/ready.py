"""Encoders that are not trained here: published ones from their official files, and ready model folders; their heads.

What takes long is made once and cached by content: a conversion by file, windows and options, a head by encoder,
windows, labels and settings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.encoders.convert import Conversion, convert
from bridge.encoders.loading import load_encoder
from bridge.encoders.pretrain import Progress
from bridge.errors import ConfigError, WeightsError
from bridge.files import cause
from bridge.hashing import sha256_file
from bridge.head_fit import fit_head, save_fitted
from bridge.windows import WindowSpec
from simulations.models.compact import provenance
from simulations.models.config import HeadConfig, NewEncoderConfig, PublishedConfig
from simulations.models.layouts import published_card
from simulations.models.places import HEAD, OLD, belong_together, is_encoder, made_once
from simulations.models.windows import PublicWindows

_RECIPE = 1
"""Part of the cache keys: raised when the code changes what it makes from the same files and settings."""

_ENCODER = "encoder"


def ready_encoder(encoder: NewEncoderConfig, window: WindowSpec, *, by_window: bool) -> Path:
    """The model folder of a published or ready encoder; a published one is converted for these windows, once.

    Raises `WeightsError` where its file or folder is missing, damaged or another model's, `ConfigError` where the file
    has another size, and `UnwritableError` where the cache can't be written.
    """
    if encoder.published is None:
        assert encoder.folder is not None
        read_card(encoder.folder, EncoderCard)
        return encoder.folder
    published = encoder.published
    key = [_RECIPE, published.model, _content(published), window.model_dump(mode="json"), published.options, by_window]

    def make(folder: Path) -> None:
        asked = Conversion(published.known, window, published.options, by_window)
        _check_size(published, convert(asked, published.file, folder / _ENCODER))

    return made_once(key, make, lambda folder: is_encoder(folder / _ENCODER)) / _ENCODER


def with_head(
    encoder: Path,
    head: HeadConfig,
    public: Callable[[], PublicWindows],
    classes: tuple[str, ...],
    *,
    seed: int,
    data: str = "",
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """The folders of old encoder and head: a ready head, or one that is fitted on the labelled public windows, which
    may make another encoder of the given one.

    Raises what `fit_head` raises; `WeightsError` and `ConfigError` where a ready head is damaged, or is not this
    encoder's or these classes'.
    """
    card = read_card(encoder, EncoderCard)
    if head.folder is not None:
        _check_ready_head(card, head.folder, classes)
        return encoder, head.folder
    old, settings = public().labelled(), head.settings()
    key = [_RECIPE, card.digest, settings.model_dump(mode="json"), list(classes), seed, data, old.key()]

    def make(folder: Path) -> None:
        network = load_encoder(encoder)
        fitted = fit_head(
            network, old.x, old.labels, old.patients, len(classes), settings, seed=seed, progress=progress
        )
        training = provenance(old, data, seed) | {"public": True}
        save_fitted(fitted, card, folder, classes=classes, training=training)

    def trained(folder: Path) -> Path:
        return folder / OLD if settings.train == "whole" else encoder

    place = made_once(key, make, lambda folder: belong_together(trained(folder), folder / HEAD))
    return trained(place), place / HEAD


def _check_ready_head(card: EncoderCard, folder: Path, classes: tuple[str, ...]) -> None:
    head = read_card(folder, HeadCard)
    if head.old_encoder != card.digest:
        raise ConfigError(
            f"{folder}: not a head of the old encoder",
            why=f"it was fitted on {head.old_encoder[:16]}..., the encoder's digest is {card.digest[:16]}...",
            fix="name the head that was fitted on this encoder, or leave encoders.old.head.folder out",
        )
    if head.classes != classes:
        raise ConfigError(
            f"{folder}: a head for other classes",
            why=f"it answers {', '.join(head.classes)}; the recordings have {', '.join(classes)}",
            fix="name another head, or leave encoders.old.head.folder out",
        )


def _content(published: PublishedConfig) -> str:
    """The file's sha256. Raises `WeightsError` where it can't be read."""
    try:
        return sha256_file(published.file)
    except OSError as error:
        raise WeightsError(
            f"{published.file}: can't be read",
            why=f"the configuration takes {published.known.title} from it: {cause(error)}",
            fix="get the official file from its authors (docs/published-models.md), and put it there",
        ) from error


def _check_size(published: PublishedConfig, card: EncoderCard) -> None:
    """The plan counted with a size: the file must have it."""
    if published.size is None:
        return
    planned = published_card(published, card.window)
    if (planned.layouts_in, planned.layouts_out) != (card.layouts_in, card.layouts_out):
        raise ConfigError(
            f"{published.file}: not the size '{published.size}' of {published.known.title}",
            why=f"it has {card.positions} positions of width {card.layouts_out[-1][1]}; "
            f"{published.size} has {planned.positions} of width {planned.layouts_out[-1][1]}",
            fix="name the file of that size, or set published.size to the file's",
        )

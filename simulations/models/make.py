"""The models of a simulation, from its configuration and its public patients: all of them, or one modality's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from simulations.config import SimulationConfig
from simulations.models.compact import train_models, train_new, train_old
from simulations.models.config import HeadConfig
from simulations.models.places import HEAD, NEW, OLD, PUBLIC_VECTORS, copy, into_place, made_once
from simulations.models.public import (
    Vectors,
    centroid_vectors,
    needed_by,
    pooled_vectors,
    save_public,
    token_vectors,
)
from simulations.models.reading import input_form, public_windows
from simulations.models.ready import ready_encoder, with_head
from simulations.models.signals import signals_of
from simulations.models.windows import PublicWindows
from simulations.progress import Progress
from simulations.source import Source
from simulations.split import Split

_RECIPE = 1
"""Part of the cache key of public vectors: raised when their code changes."""


def _silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


def make_models(
    config: SimulationConfig, source: Source, split: Split, out: Path, progress: Progress = _silent
) -> Path:
    """Make the models folder `out` with both encoders, the head and what public patients lend; return `out`.

    What was made before is taken from the cache. Raises `SelectionError` where the public windows do not suffice,
    `WeightsError`, `WindowError` and `ConfigError` where a published file or a ready folder does not serve, and
    `UnwritableError` where the disk is full or read-only.
    """
    public = _Public(config, source, split, progress)
    if config.encoders.are_compact:
        old, new = public.old, public.new
        return train_models(old, new, source.classes, config.encoders, out, data=source.description, progress=progress)
    encoder, head = _old(public)
    new_encoder = _new(public)
    vectors = _vectors(public, encoder, new_encoder)

    def assemble(folder: Path) -> None:
        for name, made in ((OLD, encoder), (HEAD, head), (NEW, new_encoder)):
            copy(made, folder / name)
        if vectors is not None:
            copy(vectors, folder)

    into_place(assemble, out)
    return out


def make_old(
    config: SimulationConfig, source: Source, split: Split, out: Path, progress: Progress = _silent
) -> tuple[EncoderCard, HeadCard]:
    """Make the folder `out` with `old_encoder` and the `task_head` that belongs to it; return their cards.

    Raises as `make_models`.
    """
    encoder, head = _old(_Public(config, source, split, progress))

    def assemble(folder: Path) -> None:
        copy(encoder, folder / OLD)
        copy(head, folder / HEAD)

    into_place(assemble, out)
    return read_card(out / OLD, EncoderCard), read_card(out / HEAD, HeadCard)


def make_new(
    config: SimulationConfig, source: Source, split: Split, out: Path, progress: Progress = _silent
) -> EncoderCard:
    """Make the folder `out` with `new_encoder`; return its card. Raises as `make_models`."""
    encoder = _new(_Public(config, source, split, progress))
    into_place(lambda folder: copy(encoder, folder / NEW), out)
    return read_card(out / NEW, EncoderCard)


@dataclass
class _Public:
    """The public patients, whose windows are read when something first asks for them."""

    config: SimulationConfig
    source: Source
    split: Split
    progress: Progress

    @cached_property
    def old(self) -> PublicWindows:
        self.progress("public windows of the old modality", 0, 1)
        found = public_windows(self.source, self.split.public_old, self.config, "old")
        self.progress("public windows of the old modality", 1, 1)
        return found

    @cached_property
    def new(self) -> PublicWindows:
        self.progress("public windows of the new modality", 0, 1)
        found = public_windows(self.source, self.split.public_new, self.config, "new")
        self.progress("public windows of the new modality", 1, 1)
        return found


def _old(public: _Public) -> tuple[Path, Path]:
    """The folders of the old encoder and of its head."""
    encoders, classes, data = public.config.encoders, public.source.classes, public.source.description
    if encoders.old.is_compact:
        made = train_old(public.old, classes, encoders, data=data, progress=public.progress)
        return made / OLD, made / HEAD
    form, signals = input_form(public.config, "old"), signals_of(public.config.data)
    encoder = ready_encoder(encoders.old, form.window, by_window=signals.by_window)
    head = encoders.old.head or HeadConfig()
    return with_head(
        encoder, head, lambda: public.old, classes, seed=encoders.seed, data=data, progress=public.progress
    )


def _new(public: _Public) -> Path:
    """The folder of the new encoder."""
    encoders = public.config.encoders
    if encoders.new.is_compact:
        return train_new(public.new, encoders, data=public.source.description, progress=public.progress) / NEW
    form, signals = input_form(public.config, "new"), signals_of(public.config.data)
    return ready_encoder(encoders.new, form.window, by_window=signals.by_window)


def _vectors(public: _Public, old: Path, new: Path) -> Path | None:
    """The cached folder of the public vectors that the job asks for; None where it asks for none."""
    needed, encoders = needed_by(public.config.bridge, public.config.selection), public.config.encoders
    if not (needed.of_old or needed.moments):
        return None
    digests = [read_card(each, EncoderCard).digest for each in (old, new)]
    read = [public.old.key() if needed.of_old else [], public.new.key() if needed.moments else []]
    key = [_RECIPE, vars(needed), digests, read, encoders.public_vectors, encoders.seed]

    def make(folder: Path) -> None:
        found: Vectors = {}
        if needed.centroids:
            about = {"count": encoders.public_vectors, "seed": encoders.seed}
            found |= centroid_vectors(old, public.old.x, position=needed.position, **about)
        if needed.tokens:
            found |= token_vectors(old, public.old, needed.position)
        if needed.moments:
            found |= pooled_vectors(new, public.new)
        save_public(folder, found)

    return made_once(key, make, lambda folder: (folder / PUBLIC_VECTORS).is_file())

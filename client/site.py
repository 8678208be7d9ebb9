"""A site: its file, and what lies behind it on disk (models' cards, reader, recordings)."""

from __future__ import annotations

import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

from bridge.compute import Compute, compute_on
from bridge.config import Settings, load_model
from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.errors import ConfigError, WeightsError
from bridge.windows import Preprocessing, WindowSpec
from client.errors import ModelsError, NoWindowsError, RecordingError, SiteFileError
from client.readers.base import Reader, find_reader
from client.site_file import Role, SiteFile

SITE_FILE = "site.yaml"

Card = TypeVar("Card", EncoderCard, HeadCard)


class Site:
    """A site file with its place on disk. Everything behind it (cards, reader, files) is read when first asked for."""

    def __init__(self, path: Path, file: SiteFile) -> None:
        self.path = path
        self.file = file

    @property
    def name(self) -> str:
        """The site's agreed name."""
        return self.file.site

    @property
    def folder(self) -> Path:
        """Folder of the site file."""
        return self.path.parent

    def resolve(self, path: Path) -> Path:
        """A path of the site file, made absolute."""
        return path if path.is_absolute() else self.folder / path

    @property
    def policy_path(self) -> Path | None:
        """The policy, or None for the strictest defaults."""
        return None if self.file.policy is None else self.resolve(self.file.policy)

    @property
    def audit_path(self) -> Path:
        """The audit log."""
        return self.resolve(self.file.audit)

    @property
    def ledger_path(self) -> Path:
        """The privacy ledger."""
        return self.resolve(self.file.ledger)

    @property
    def key_path(self) -> Path:
        """The site's secret key, beside the ledger."""
        return self.ledger_path.with_suffix(".key")

    @property
    def log_path(self) -> Path:
        """The site's own log."""
        return self.resolve(self.file.log)

    @property
    def cache_folder(self) -> Path:
        """Folder of the feature cache."""
        return self.resolve(self.file.cache.folder)

    @property
    def coordinator_path(self) -> Path:
        """The coordinator's file."""
        return self.resolve(self.file.deployment.coordinator)

    @property
    def keys_folder(self) -> Path:
        """Folder of the node's secret key and the executor's secret."""
        return self.resolve(self.file.deployment.keys)

    @property
    def studies_folder(self) -> Path:
        """Folder of the studies that were accepted."""
        return self.resolve(self.file.deployment.studies)

    @property
    def state_folder(self) -> Path:
        """Folder of Flower's own files, of process ids and of what the services print."""
        return self.resolve(self.file.deployment.state)

    @cached_property
    def old_card(self) -> EncoderCard:
        """Card of the old encoder, checked against its weights and the site file. Raises `ModelsError`."""
        return self._fitting("old", self._card("old_encoder", EncoderCard))

    @cached_property
    def new_card(self) -> EncoderCard:
        """Card of the new encoder, checked against its weights and the site file. Raises `ModelsError`."""
        return self._fitting("new", self._card("new_encoder", EncoderCard))

    @cached_property
    def head_card(self) -> HeadCard:
        """Card of the task head. Raises `ModelsError` where it belongs to another old encoder or other classes."""
        card = self._card("task_head", HeadCard)
        if card.old_encoder != self.old_card.digest:
            raise ModelsError(
                "the task head was fitted on another old encoder",
                why=f"its card names {card.old_encoder[:16]}..., the site has {self.old_card.digest[:16]}...",
                fix="copy the three model folders from one source",
            )
        classes = self.file.labels.classes
        if classes and classes != card.classes:
            raise ModelsError(
                f"labels.classes {list(classes)} are not the task head's classes",
                why=f"its card lists {list(card.classes)}, in this order",
                fix="write labels.classes as the card has them",
            )
        return card

    def model_folder(self, name: Literal["old_encoder", "new_encoder", "task_head"]) -> Path:
        """Folder of one of the three models. Raises `ModelsError` where the site file names none."""
        if self.file.models is None:
            raise ModelsError(
                f"the site file of '{self.name}' names no models", fix=f"add the key 'models' to {self.path}"
            )
        return self.resolve(getattr(self.file.models, name))

    @property
    def awaits_models(self) -> bool:
        """Whether the site file names places for models of which none holds anything yet."""
        models = self.file.models
        if models is None:
            return False
        folders = [self.resolve(each) for each in (models.old_encoder, models.new_encoder, models.task_head)]
        return not any(map(occupied, folders))

    @cached_property
    def compute(self) -> Compute:
        """How the machine runs the frozen networks. Raises `SiteFileError` where it can't do so as the file says."""
        asked = self.file.compute
        try:
            return compute_on(asked.device, asked.precision, asked.memory_gigabytes)
        except ConfigError as error:
            raise SiteFileError(f"{self.path}: {error.what}", why=error.why, fix=error.fix) from error

    @cached_property
    def reader(self) -> Reader:
        """The reader with its options. Raises `SiteFileError`."""
        kind = find_reader(self.file.reader.name)
        try:
            return kind(dict(self.file.reader.options))
        except ConfigError as error:
            raise SiteFileError(f"{self.path}: {error.what}", why=error.why, fix=error.fix) from error

    def all_files(self) -> tuple[list[Path], list[Path]]:
        """The recordings' paths, and those that `exclude` leaves out.

        Raises `SiteFileError` where the folder is missing, `NoWindowsError` where it holds no recording, and
        `RecordingError` where two recordings have the same name (labels and results are joined by it).
        """
        folder = self.resolve(self.file.folder)
        if not folder.is_dir():
            raise SiteFileError(
                f"{folder}: no such folder", why=f"{self.path} names it as 'folder'", fix="correct the path"
            )
        found = self.reader.files(folder)
        excluded = [path for path in found if self._is_excluded(path)]
        left = [path for path in found if path not in set(excluded)]
        if not left:
            raise NoWindowsError(
                f"{folder}: no recordings",
                why=f"the reader '{self.file.reader.name}' finds {len(found)}, 'exclude' leaves out {len(excluded)}",
                fix="correct folder, reader.options or exclude",
            )
        names = [self.reader.name(path) for path in left]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise RecordingError(
                f"{len(twice)} file name(s) occur twice below {folder}, the first is '{twice[0]}'",
                why="recordings are told apart by name",
                fix="rename the files, or exclude one of each",
            )
        return left, excluded

    def _is_excluded(self, path: Path) -> bool:
        """Whether `exclude` names the file, or its recording (in some sets files of two patients have one name)."""
        names = (path.name, self.reader.name(path))
        return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in self.file.exclude)

    def files(self) -> list[Path]:
        """The recordings' paths, sorted; raises as `all_files`."""
        return self.all_files()[0]

    def _card(self, name: Literal["old_encoder", "new_encoder", "task_head"], kind: type[Card]) -> Card:
        try:
            return read_card(self.model_folder(name), kind)
        except WeightsError as error:
            raise ModelsError(error.what, why=error.why, fix=error.fix) from error

    def _fitting(self, role: Role, card: EncoderCard) -> EncoderCard:
        """The card, if windows of this site file can be cut for it."""
        section, window = self.file.section(role), card.window
        missing = [channel for channel in window.channels if channel not in section.channels]
        why = ""
        if window.modality != section.modality:
            why = f"it reads {window.modality}, the site file's '{role}' is {section.modality}"
        elif missing:
            why = f"it reads the channel(s) {', '.join(missing)}; the site file lists {', '.join(section.channels)}"
        elif abs(window.seconds - self.file.window.seconds) > 1e-6 * window.seconds:
            why = f"it reads windows of {window.seconds:g} s, the site file cuts {self.file.window.seconds:g} s"
        if not why:
            return card
        what = f"the {role} encoder does not fit the recordings of '{self.name}'"
        raise ModelsError(what, why=why, fix="correct the site file, or use the models of this study")


def occupied(folder: Path) -> bool:
    """Whether anything is at this place but an empty folder."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def open_site(path: Path) -> Site:
    """Open a site file, or the `site.yaml` of a folder. Raises `SiteFileError` that names file, key and closest key."""
    path = path / SITE_FILE if path.is_dir() else path
    try:
        return Site(path.absolute(), load_model(path, SiteFile))
    except ConfigError as error:
        raise SiteFileError(error.what, why=error.why, fix=error.fix) from error


class InputFormat(Settings):
    """What an encoder wants to read: window and preprocessing, as its card has them."""

    window: WindowSpec
    preprocessing: Preprocessing

    @classmethod
    def of(cls, card: EncoderCard) -> InputFormat:
        """From a card."""
        return cls(window=card.window, preprocessing=card.preprocessing)

"""A study file on disk: written the same byte for byte from the same content, and opened as if it came from an enemy.

The zip holds its files uncompressed, so that none can be larger than the zip itself. Nothing is read before its name,
kind and size are those that `study.json` lists, and nothing is believed before its hash is.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from bridge.encoders.cards import CARD, EncoderCard, HeadCard, seal
from bridge.errors import ConfigError, StudyError, StudyStorageError
from bridge.files import cause, whole_file
from bridge.hashing import sha256_file
from bridge.job import Job, parse_job
from bridge.study.checks import (
    DAMAGED,
    LARGEST,
    REBUILD,
    check_entries,
    check_entry,
    check_listed,
    check_plain,
    no_study,
    read_manifest,
)
from bridge.study.manifest import JOB_YAML, MODEL_NAMES, MODELS, PAGE, STUDY_JSON, STUDY_SIG, Manifest, Member, study_id
from bridge.study.signing import SIGNATURE_BYTES, is_signed, sign

_CHUNK = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)

Card = TypeVar("Card", EncoderCard, HeadCard)


def members_of(files: Mapping[str, bytes | Path]) -> dict[str, Member]:
    """What `study.json` says of these files: hash and size of each, by its path in the study. Raises `OSError`."""
    return {name: _member(files[name]) for name in sorted(files)}


def _member(content: bytes | Path) -> Member:
    if isinstance(content, bytes):
        return Member(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    return Member(sha256=sha256_file(content), bytes=content.stat().st_size)


def write_study(path: Path, manifest: Manifest, files: Mapping[str, bytes | Path], secret: bytes) -> str:
    """Write a signed study file, whole or not at all, over what was there; return the sha256 of its `study.json`.

    `files` are the manifest's members. Raises `StudyError` where one is not as the manifest lists it, and
    `StudyStorageError` where a file can't be read or written.
    """
    content = manifest.canonical()
    check_listed(path, read_manifest(path, content))
    if set(files) != set(manifest.members):
        raise StudyError(f"{path}: the files are not those that the manifest lists", fix="list exactly what is written")
    try:
        with whole_file(path, sync=True) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, small in ((STUDY_JSON, content), (STUDY_SIG, sign(secret, content))):
                archive.writestr(_entry(name, len(small)), small)
            for name in sorted(files):
                _write_member(archive, name, files[name], manifest.members[name])
    except OSError as error:
        raise StudyStorageError(f"{path}: can't be written", why=cause(error), fix="choose a writable --out") from error
    return hashlib.sha256(content).hexdigest()


def _entry(name: str, size: int) -> zipfile.ZipInfo:
    """A zip entry without a time or an owner; the size decides beforehand whether it needs large fields."""
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.create_system, entry.external_attr, entry.file_size = 3, (stat.S_IFREG | 0o644) << 16, size
    return entry


def _write_member(archive: zipfile.ZipFile, name: str, content: bytes | Path, listed: Member) -> None:
    digest, size = hashlib.sha256(), 0
    source = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
    with source, archive.open(_entry(name, listed.bytes), "w") as target:
        while (chunk := source.read(_CHUNK)) and size <= listed.bytes:
            digest.update(chunk)
            size += len(chunk)
            target.write(chunk)
    if (digest.hexdigest(), size) != (listed.sha256, listed.bytes):
        raise StudyError(f"{name} is not what the manifest lists", why="it changed meanwhile", fix="build it again")


class Study:
    """An opened study file whose structure is sound: `open_study` makes one. Not yet checked: the signature, the cards
    (`cards`) and whatever else is in `models/` (`extract`)."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, manifest: Manifest, content: bytes, signature: bytes):
        self.path = path
        self.manifest = manifest
        self.content = content
        """The bytes of `study.json`."""
        self.signature = signature
        """The 64 bytes of `study.sig`."""
        self._archive = archive
        self.job_text = self._text(JOB_YAML)
        """`job.yaml`, the one text that every site is asked to do."""
        self.page = self._text(PAGE)
        """`page.md`."""
        self.job = self._job()
        """The job of that text."""

    @property
    def sha256(self) -> str:
        """Hex sha256 of `study.json`: it names the study."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def id(self) -> str:
        """How the study is called in commands and folders."""
        return study_id(self.manifest.name, self.sha256)

    def is_signed_by(self, public: bytes) -> bool:
        """Whether the signature is that of this key (32 bytes)."""
        return is_signed(public, self.signature, self.content)

    def require_signed_by(self, public: bytes, who: str) -> None:
        """Raise `StudyError` unless it is; `who` names the key's owner for people."""
        if not self.is_signed_by(public):
            raise StudyError(
                f"{self.path}: not signed by {who}",
                why="its signature is not that key's over its study.json",
                fix=f"get the study from {who}; if the key changed, get the new coordinator file and compare its "
                "fingerprint by telephone",
            )

    def cards(self) -> tuple[EncoderCard, EncoderCard, HeadCard]:
        """The cards of old encoder, new encoder and task head. Raises `StudyError` where one is damaged, is not the
        one that the manifest names, or the head belongs to another encoder."""
        old, new = self._card("old_encoder", EncoderCard), self._card("new_encoder", EncoderCard)
        head = self._card("task_head", HeadCard)
        width = old.layouts_out[-1][1]
        if head.old_encoder != old.digest or head.width != width:
            raise StudyError(
                f"{self.path}: the task head does not belong to the old encoder",
                why=f"it reads width {head.width} of encoder {head.old_encoder[:16]}..., the encoder has width {width}",
                fix=REBUILD,
            )
        return old, new, head

    def check(self) -> None:
        """Read every file and check its hash, and the cards. Raises `StudyError` that names the file that differs."""
        for name in self.manifest.members:
            for _ in self._chunks(name):
                pass
        self.cards()

    def extract(self, folder: Path) -> None:
        """Put every file of the study into a new folder, whole or not at all; each hash is checked.

        Raises `StudyError` that names the file that differs, or where `folder` is there already, and
        `StudyStorageError` where it can't be written.
        """
        self._extract({name: name for name in (STUDY_JSON, STUDY_SIG, *self.manifest.members)}, folder)

    def extract_models(self, folder: Path) -> None:
        """Put what lies in `models/` into a new folder; raises as `extract`."""
        prefix = f"{MODELS}/"
        self._extract(
            {name: name.removeprefix(prefix) for name in self.manifest.members if name.startswith(prefix)}, folder
        )

    def _extract(self, targets: Mapping[str, str], folder: Path) -> None:
        if folder.exists() or folder.is_symlink():
            raise StudyError(f"{folder}: is there already", fix="name a new folder, or remove it")
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            for name, target in targets.items():
                place = partial / target
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("xb") as file:
                    for chunk in self._chunks(name):
                        file.write(chunk)
            partial.replace(folder)
        except OSError as error:
            raise StudyStorageError(
                f"{folder}: the study can't be taken apart", why=cause(error), fix="free space, or choose another place"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _chunks(self, name: str) -> Iterator[bytes]:
        """A file's bytes in pieces; raises `StudyError` at its end where it is not the listed one."""
        if name in (STUDY_JSON, STUDY_SIG):
            yield self.content if name == STUDY_JSON else self.signature
            return
        listed, digest, size = self.manifest.members[name], hashlib.sha256(), 0
        for chunk in _read_chunks(self.path, self._archive, name):
            digest.update(chunk)
            size += len(chunk)
            yield chunk
        if (digest.hexdigest(), size) != (listed.sha256, listed.bytes):
            raise StudyError(
                f"{self.path}: {name} is not what the study was signed with",
                why=f"its sha256 is {digest.hexdigest()[:16]}..., study.json lists {listed.sha256[:16]}...",
                fix=DAMAGED,
            )

    def _text(self, name: str) -> str:
        try:
            text = b"".join(self._chunks(name)).decode()
        except UnicodeDecodeError as error:
            raise no_study(self.path, f"{name} is not UTF-8 text") from error
        check_plain(self.path, name, text)
        return text

    def _job(self) -> Job:
        try:
            job = parse_job(self.job_text)
        except (ConfigError, RecursionError) as error:
            why = ascii(error.what) if isinstance(error, ConfigError) else "it is nested too deeply"
            raise StudyError(f"{self.path}: {JOB_YAML} is not a job", why=why, fix=DAMAGED) from error
        pairs = [("name", job.name, self.manifest.name), ("coordinator", job.coordinator, self.manifest.coordinator)]
        pairs += [(name, getattr(job.models, name), self.manifest.models[name].digest) for name in MODEL_NAMES]
        for what, asked, listed in pairs:
            if asked != listed:
                raise StudyError(
                    f"{self.path}: {JOB_YAML} and {STUDY_JSON} disagree about the {what}",
                    why=f"the job says {asked[:64]!r}, study.json {listed[:64]!r}",
                    fix=REBUILD,
                )
        return job

    def _card(self, name: str, kind: type[Card]) -> Card:
        member, listed = f"{MODELS}/{name}/{CARD}", self.manifest.models[name]
        try:
            card = kind.model_validate_json(self._text(member))
        except ValidationError as error:
            first = error.errors()[0]
            why = ascii(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
            raise StudyError(f"{self.path}: {member} is not a {kind.__name__}", why=why, fix=DAMAGED) from error
        if seal(card).digest != card.digest or (card.digest, card.weights_sha256) != (
            listed.digest,
            listed.weights_sha256,
        ):
            raise StudyError(
                f"{self.path}: {member} is not the card of the {name} that the study names",
                why=f"study.json names {listed.digest[:16]}..., the card {card.digest[:16]}...",
                fix=REBUILD,
            )
        return card


@contextmanager
def open_study(path: Path) -> Iterator[Study]:
    """A study file whose structure, job and page were checked; open as long as the block lasts.

    Reads `study.json`, `study.sig`, `job.yaml` and `page.md`, no weights. Says nothing about who signed it
    (`Study.require_signed_by`). Raises `StudyError` where the file is missing, is no study, is damaged, or holds
    anything else than it lists.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(_BoundedFile(path))
            archive = stack.enter_context(zipfile.ZipFile(file))
            study = _opened(path, archive, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise StudyError(f"{path}: can't be read", why=cause(error), fix="check the path") from error
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise no_study(path, str(error)) from error
        yield study


class _BoundedFile(io.FileIO):
    """A file of which no more than `_CHUNK` is read at once: a zip's directory says itself how long it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        asked = _CHUNK + 1 if size is None or size < 0 else size
        content = super().read(min(asked, _CHUNK + 1))
        if len(content) > _CHUNK:
            raise zipfile.BadZipFile("its directory is too large")
        return content


def _opened(path: Path, archive: zipfile.ZipFile, size: int) -> Study:
    entries = {entry.filename: entry for entry in archive.infolist()}
    for entry in archive.infolist():
        check_entry(path, entry)
    if len(entries) != len(archive.infolist()):
        raise no_study(path, "it holds a file twice")
    for name in (STUDY_JSON, STUDY_SIG):
        if name not in entries:
            raise no_study(path, f"it holds no {name}")
    signature = _whole(path, archive, entries[STUDY_SIG], SIGNATURE_BYTES)
    if len(signature) != SIGNATURE_BYTES:
        raise no_study(path, f"{STUDY_SIG} has {len(signature)} bytes, not {SIGNATURE_BYTES}")
    content = _whole(path, archive, entries[STUDY_JSON], LARGEST[STUDY_JSON])
    manifest = read_manifest(path, content)
    check_entries(path, manifest, entries, size)
    return Study(path, archive, manifest, content, signature)


def _whole(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    if entry.file_size > limit:
        raise no_study(path, f"{entry.filename} has {entry.file_size} bytes, more than {limit}")
    return b"".join(_read_chunks(path, archive, entry.filename))


def _read_chunks(path: Path, archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    try:
        with archive.open(name) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except (zipfile.BadZipFile, EOFError) as error:
        raise StudyError(f"{path}: {name} is damaged", why=str(error) or "it ends too early", fix=DAMAGED) from error

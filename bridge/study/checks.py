"""What may stand in a study's zip: names, kinds and sizes, judged before anything is read; and texts that show what
they hold."""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bridge.encoders.cards import CARD, WEIGHTS
from bridge.errors import StudyError
from bridge.study.manifest import JOB_YAML, MODEL_NAMES, MODELS, PAGE, STUDY_JSON, STUDY_SIG, Manifest

LARGEST = {STUDY_JSON: 1 << 20, JOB_YAML: 1 << 16, PAGE: 1 << 20, CARD: 1 << 20}
"""Bytes of the files that are read whole, at most; of a job as many as a site reads of one."""
MEMBER = re.compile(
    rf"{re.escape(JOB_YAML)}|{re.escape(PAGE)}|{MODELS}/[A-Za-z0-9][A-Za-z0-9_-]{{0,60}}\.safetensors"
    rf"|{MODELS}/(?:{'|'.join(MODEL_NAMES)})/(?:{re.escape(CARD)}|{re.escape(WEIGHTS)})"
)
"""What a study may hold beside `study.json` and `study.sig`."""
DAMAGED = "get the file again from the coordinator"
REBUILD = "ask the coordinator to build the study again"


def check_entry(path: Path, entry: zipfile.ZipInfo) -> None:
    """Plain files under the names that a study may have: nothing compressed, encrypted, linked, or oddly named."""
    name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
    known = name in (STUDY_JSON, STUDY_SIG) or MEMBER.fullmatch(name)
    if not known or name != entry.filename:
        raise no_study(path, f"it holds {name[:80]!r}, which is no file of a study")
    if kind not in (0, stat.S_IFREG):
        raise no_study(path, f"{name} is a link or another special file")
    if entry.flag_bits or entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise no_study(path, f"{name} is compressed, encrypted or patched; a study holds its files as they are")


def check_entries(path: Path, manifest: Manifest, entries: Mapping[str, zipfile.ZipInfo], size: int) -> None:
    """Exactly the listed files, each of its listed size, together no larger than the zip."""
    check_listed(path, manifest)
    for name in sorted({*manifest.members, STUDY_JSON, STUDY_SIG} ^ set(entries)):
        missing = name in manifest.members
        raise no_study(path, f"{name} is listed in {STUDY_JSON} and missing" if missing else f"{name} is not listed")
    for name, listed in manifest.members.items():
        if entries[name].file_size != listed.bytes:
            raise no_study(path, f"{name} has {entries[name].file_size} bytes, {STUDY_JSON} lists {listed.bytes}")
    if sum(entry.file_size for entry in entries.values()) > size:
        raise no_study(path, "its files overlap")


def check_listed(path: Path, manifest: Manifest) -> None:
    """Whether the manifest itself lists what a study has to have, and nothing else."""
    needed = {JOB_YAML, PAGE, *(f"{MODELS}/{name}/{CARD}" for name in MODEL_NAMES)}
    if set(manifest.models) != set(MODEL_NAMES) or not needed <= set(manifest.members):
        raise no_study(path, f"{STUDY_JSON} lacks a job, a page, or one of the models {', '.join(MODEL_NAMES)}")
    for name, listed in manifest.members.items():
        if not MEMBER.fullmatch(name):
            raise no_study(path, f"{STUDY_JSON} lists {name[:80]!r}, which is no file of a study")
        if listed.bytes > LARGEST.get(Path(name).name, listed.bytes):
            raise no_study(path, f"{name} is larger than {LARGEST[Path(name).name]} bytes")
    for name, model in manifest.models.items():
        weights = manifest.members.get(f"{MODELS}/{name}/{WEIGHTS}")
        if model.included != (weights is not None) or (weights and weights.sha256 != model.weights_sha256):
            raise no_study(path, f"{STUDY_JSON} contradicts itself about the weights of the {name}")


def read_manifest(path: Path, content: bytes) -> Manifest:
    """The manifest of the bytes of `study.json`. Raises `StudyError`."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise no_study(path, f"{STUDY_JSON}: {'.'.join(map(str, first['loc']))!a}: {first['msg']}") from error
    if manifest.canonical() != content:
        raise no_study(path, f"{STUDY_JSON} is not written the one way that it is signed in")
    check_plain(path, STUDY_JSON, "".join(_texts(manifest.model_dump())))
    return manifest


def check_plain(path: Path, name: str, text: str) -> None:
    """Raise `StudyError` where a text holds what a terminal does not show as it stands: control characters, invisible
    ones, a changed direction of writing."""
    strange = next((each for each in text if not each.isprintable() and each != "\n"), None)
    if strange is not None:
        raise no_study(path, f"{name} holds the character U+{ord(strange):04X}, which is not for reading")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from (*_texts(key), *_texts(each))


def no_study(path: Path, why: str) -> StudyError:
    """The error of a file that is no sound study; `path` is the file's."""
    return StudyError(f"{path}: is not a sound study file", why=why, fix=DAMAGED)

"""Reading a published checkpoint of `torch.save` without running anything that is pickled inside it.

A pickle names the functions that rebuild its objects. Three things keep them from being called: the file's own table
of contents is checked first, then every name in the pickle is looked up in the lists below before torch sees it, and
then `torch.load(weights_only=True)` reads it, which knows tensors alone. The configuration objects that some authors
pickled beside their weights become `Inert`: their names are on a list, and nothing of them is imported, built or kept.

torch before 2.6 could be made to run code all the same (CVE-2025-32434); pyproject.toml asks for a later one.
"""

from __future__ import annotations

import pickletools
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.errors import WeightsError
from bridge.hashing import sha256_file

_KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")

TENSORS = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.nn.parameter.Parameter",
    "torch.Size",
    "torch.device",
    "torch.storage.UntypedStorage",
    *(f"torch.{kind}Storage" for kind in _KINDS),
    # How bytes were written for Python 2: text and the name of its encoding.
    "_codecs.encode",
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
)
"""Names that torch resolves itself: what tensors and the containers around them are made of."""

INERT = (
    "hubert_ecg.*",
    "*.hubert_ecg.HuBERTECGConfig",
    "__main__.HuBERTECGConfig",
    "transformers.*",
    "fairseq.*",
    "fairseq_signals.*",
    "omegaconf.*",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "typing.*",
    "collections.defaultdict",
    "copyreg._reconstructor",
    "pathlib.*Path",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")),
    # Scores of the training, kept beside the weights.
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
)
"""Names of configurations and of bookkeeping beside the weights: passed over, whatever they would have done."""

_EXPANSION = 4
"""Tensors may share storage; together they may say at most this many times what is stored."""


class Inert:
    """Stands for an object whose name is on the list `INERT`: takes any arguments and any state, and keeps none."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        """An object without content; a plain dict where entries are put into it afterwards."""
        return {} if cls.__qualname__ == "defaultdict" else super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Forget what the object was."""


@dataclass(frozen=True)
class CheckpointFile:
    """What was read from a published file."""

    content: Mapping[str, Any]
    """As the file has it; what is neither a tensor nor a plain value is `Inert`."""
    sha256: str
    """Of the file."""


def read_checkpoint(path: Path) -> CheckpointFile:
    """Read a file of `torch.save`. Its tensors stay on the disk until they are used: don't change it meanwhile.

    Raises `WeightsError` where it can't be read, is no such file, is truncated or damaged, names anything that is on
    neither list, or declares more than it holds.
    """
    try:
        digest = sha256_file(path)
        names, stored = _look_into(path)
    except OSError as error:
        raise WeightsError(
            f"{path}: can't be read", why=error.strerror or str(error), fix="check the path and its permissions"
        ) from error
    refused = sorted(name for name in names if not _is_in(name, TENSORS) and not _is_in(name, INERT))
    if refused:
        raise WeightsError(
            f"{path}: holds a pickle that asks for more than weights; nothing of it was run",
            why=f"it names {', '.join(refused)}",
            fix="don't open this file in any other way; get the official one from its source, and compare its sha256",
        )
    content = _load(path, [name for name in names if not _is_in(name, TENSORS)])
    _check_sizes(path, content, stored)
    return CheckpointFile(content, digest)


def _look_into(path: Path) -> tuple[set[str], int]:
    """The names in the file's pickle, and the bytes of its tensors. Raises `WeightsError` and `OSError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, entries)
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise _unreadable(path, "it is an archive, but not one that torch.save writes")
            damaged = archive.testzip()
            if damaged is not None:
                raise _unreadable(path, f"{damaged} does not have its checksum: the file is damaged")
            for entry in entries:
                if entry.filename.endswith("/byteorder") and archive.read(entry).decode("latin-1") != sys.byteorder:
                    raise _unreadable(path, "it was written on a machine of another byte order")
            names = set(_names_in(archive.read(pickles[0])))
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            begins = file.read(4) == b"PK\x03\x04"
        why = "it is truncated: it begins as torch.save's files do, and its end is missing" if begins else ""
        raise _unreadable(path, why or "torch.save's files are archives since torch 1.6, and this is none") from error
    except (ValueError, UnicodeDecodeError, NotImplementedError, RuntimeError, EOFError) as error:
        raise _unreadable(path, f"its list of contents or its pickle is damaged: {error}") from error
    return names, sum(entry.file_size for entry in entries if "/data/" in entry.filename)


def _check_entries(path: Path, entries: Iterable[zipfile.ZipInfo]) -> None:
    """torch.save compresses nothing, so no entry is larger than its place in the file, nor all than the file."""
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1]
    if packed:
        raise _unreadable(path, f"{packed[0]} is compressed or encrypted, and torch.save does neither")
    declared, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if declared > size:
        raise _unreadable(path, f"it declares {declared:,} bytes of content and has {size:,}")


def _names_in(pickled: bytes) -> Iterator[str]:
    """Everything that the pickle would import, by its name of today; nothing is executed."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            yield f"{module}.{name}"
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"{opcode.name} is no instruction of torch.save's pickles")


def _load(path: Path, inert: Iterable[str]) -> Mapping[str, Any]:
    # torch finds a class by where it says that it was defined.
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    for full_name in inert:
        module, _, name = full_name.rpartition(".")
        stand_ins.append(type(name, (Inert,), {"__module__": module, "__qualname__": name}))
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # mmap: whatever sizes the pickle declares, nothing outside the file can be reached.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a malformed pickle makes torch raise anything
        raise _unreadable(path, f"its pickle is damaged: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(loaded, Mapping):
        raise _unreadable(path, f"it holds a {type(loaded).__name__} and no weights by name")
    return loaded


def _check_sizes(path: Path, content: Mapping[str, Any], stored: int) -> None:
    """Tensors can be declared larger than what is stored (repeated, or reaching past their own entry)."""
    tensors = list(_tensors_of(content))
    strange = [name for name, tensor in tensors if tensor.layout != torch.strided or tensor.device.type != "cpu"]
    if strange:
        raise _unreadable(path, f"{strange[0]} is no plain tensor")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in tensors if t.numel()}
    declared = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    if sum(storages.values()) > stored or declared > _EXPANSION * stored:
        raise _unreadable(path, f"its tensors declare {declared:,} bytes, and {stored:,} are stored")


def _tensors_of(content: Mapping[str, Any], depth: int = 1) -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield str(name), value
        elif isinstance(value, Mapping) and depth:
            yield from _tensors_of(value, depth - 1)


def _is_in(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _unreadable(path: Path, why: str) -> WeightsError:
    return WeightsError(
        f"{path}: no checkpoint that can be read",
        why=why,
        fix="download the official file again, and compare its size and sha256 with its source's",
    )

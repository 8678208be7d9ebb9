"""Where the models of a study lie, and how they get there whole or not at all.

A models folder holds `old_encoder/`, `new_encoder/`, `task_head/` (each a card and safetensors) and, where a bridge
needs them, `public_vectors.safetensors` (`simulations.models.public`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.errors import WeightsError
from bridge.files import whole_folder
from bridge.hashing import sha256_json
from simulations.errors import UnwritableError
from simulations.source import cache_root

OLD, NEW, HEAD, PUBLIC_VECTORS = "old_encoder", "new_encoder", "task_head", "public_vectors.safetensors"


def made_once(key: object, make: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> Path:
    """The folder in the cache that `make` fills, made where it is not there or not whole; `key` says what is in it.

    Raises `UnwritableError` where the cache can't be written.
    """
    place = cache_root() / "models" / sha256_json(key)[:32]
    if not is_whole(place):
        into_place(make, place)
    return place


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a models folder whose cards, weights and digests fit each other."""
    return are_old(folder) and is_new(folder) and (folder / PUBLIC_VECTORS).is_file()


def are_old(folder: Path) -> bool:
    """Whether `folder` has an old encoder and the head that belongs to it."""
    return belong_together(folder / OLD, folder / HEAD)


def belong_together(encoder: Path, head: Path) -> bool:
    """Whether these are the folders of an encoder and of a head that was fitted on it."""
    try:
        return read_card(head, HeadCard).old_encoder == read_card(encoder, EncoderCard).digest
    except WeightsError:
        return False


def is_new(folder: Path) -> bool:
    """Whether `folder` has a new encoder."""
    return is_encoder(folder / NEW)


def is_encoder(folder: Path) -> bool:
    """Whether `folder` is a model folder whose card and weights fit each other."""
    try:
        read_card(folder, EncoderCard)
    except WeightsError:
        return False
    return True


def into_place(make: Callable[[Path], None], target: Path) -> None:
    """Make a folder beside `target`, then rename it: a kill leaves nothing half-made under the final name."""
    try:
        with whole_folder(target) as partial:
            make(partial)
            if target.exists():
                shutil.rmtree(target)
    except (OSError, SafetensorError) as error:
        raise UnwritableError(
            f"{target}: the models can't be written",
            why=str(error),
            fix="free space, or set FEDBRIDGE_CACHE to a writable folder",
        ) from error


def copy(source: Path, folder: Path) -> None:
    """All of `source` into `folder`, which may be there and empty."""
    shutil.copytree(source, folder, dirs_exist_ok=True)

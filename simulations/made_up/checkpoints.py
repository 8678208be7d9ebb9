"""Files in the five published formats, filled with numbers that are a fixed function of name and shape."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.errors import ConfigError
from bridge.files import cause, whole_file
from simulations.errors import UnwritableError
from simulations.made_up.checkpoint_keys import COUNTER, SIZES, published_keys
from simulations.parity.fill import weight

_OLDER = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
_WRAPPERS: Mapping[str, str] = {"labram": "model", "normwear": "model", "ecg-fm": "model", "papagei": ""}


def filled_state(model: str, size: str = "base", seed: int = 0) -> dict[str, Tensor]:
    """The model's state dict in its file's own names, filled; as the fixtures fill it for this seed.

    Raises `ConfigError` for a size that the model has not.
    """
    sizes = SIZES.get(model, {})
    if size not in sizes:
        raise ConfigError(f"there is no {model} of size '{size}'", fix=f"name one of {', '.join(sizes) or 'none'}")
    return {
        name: weight(name, shape, torch.int64 if name.endswith(COUNTER) else torch.float32, seed, "normal")
        for name, shape in published_keys(model, size).items()
    }


def file_content(model: str, state: Mapping[str, Tensor], older_names: bool = False) -> dict[str, Any]:
    """What the published file holds around a state dict: its wrapper, and what its authors pickled beside.

    A plain namespace stands for the authors' configuration objects, whose packages are not here. `older_names`: the
    weight norm under its names of torch before 2.0.
    """
    named = {_older(name) if older_names else name: tensor for name, tensor in state.items()}
    if model == "hubert-ecg":
        return {"model_state_dict": named, "model_config": argparse.Namespace(model_type="hubert_ecg"), "step": 0}
    beside: dict[str, Any] = {"cfg": argparse.Namespace(model="wav2vec2_cmsc")} if model == "ecg-fm" else {}
    wrapper = _WRAPPERS[model]
    return {wrapper: named, **beside} if wrapper else named


def write_checkpoint(model: str, path: Path, size: str = "base", *, seed: int = 0, older_names: bool = False) -> Path:
    """Write a filled file in the model's published format; makes its folder, returns the path.

    The file of a size is as large as the published one: 37 MB (LaBraM) to 0.75 GB (HuBERT-ECG large). Raises
    `ConfigError` for an unknown size, and `UnwritableError` where it can't be written; then nothing is left behind.
    """
    content = file_content(model, filled_state(model, size, seed), older_names)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's own writer tells of a full disk by RuntimeError
        raise UnwritableError(
            f"{path}: can't be written",
            why=cause(error) if isinstance(error, OSError) else str(error).splitlines()[0],
            fix="free space, or name a folder that can be written",
        ) from error
    return path


def _older(name: str) -> str:
    for today, before in _OLDER.items():
        if name.endswith(today):
            return name.removesuffix(today) + before
    return name

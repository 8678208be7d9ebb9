"""From a published state dict to exactly the tensors that a network wants, with every difference named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from bridge.config import Settings
from bridge.errors import ConfigError, WeightsError, WindowError
from bridge.windows import Modality, WindowSpec

_LISTED = 20

Architecture = TypeVar("Architecture", bound=Settings)


def state_dict_of(loaded: Mapping[str, Any], wrapper: str, model: str) -> dict[str, Tensor]:
    """The state dict under the key `wrapper`, or `loaded` itself where there is none, as `{name: tensor}`.

    Raises `WeightsError` where it is no mapping of names to tensors.
    """
    state = loaded.get(wrapper, loaded)
    if not isinstance(state, Mapping) or not state:
        raise WeightsError(
            f"the file holds no weights of {model}",
            why=f"under '{wrapper}' a state dict is expected, not {type(state).__name__}",
            fix="use the official file as it was published",
        )
    others = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        raise WeightsError(
            f"the file holds no state dict of {model}",
            why=f"these entries are no tensors: {_listed(others)}",
            fix="use the official file as it was published",
        )
    return dict(state)


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors, `prefix` taken off the names that have it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def with_weight_norm_renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Older torch's `weight_g` and `weight_v` under the names that they have today."""
    today = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}

    def renamed(name: str) -> str:
        stem, dot, leaf = name.rpartition(".")
        return f"{stem}{dot}{today.get(leaf, leaf)}"

    return {renamed(name): tensor for name, tensor in state.items()}


def taken(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, torch.Size],
    unused: Sequence[str],
    model: str,
    published_name: Callable[[str], str] = lambda name: name,
) -> dict[str, Tensor]:
    """The tensors `wanted` (the network's own names and shapes), floats as float32, under the network's names.

    `published_name` tells the name in `state` of one of the network's; `unused` are patterns of the names that may be
    left over. Raises `WeightsError` listing by name what is missing, extra, of another shape, or not finite.
    """
    sources = {published_name(name): name for name in wanted}
    missing = sorted(sources.keys() - state.keys())
    extra = sorted(name for name in state.keys() - sources.keys() if not any(fnmatchcase(name, p) for p in unused))
    found = {source: name for source, name in sources.items() if source in state}
    misshapen = [
        f"{source} {tuple(state[source].shape)} instead of {tuple(wanted[name])}"
        for source, name in found.items()
        if state[source].shape != wanted[name]
    ]
    broken = [source for source in found if not bool(torch.isfinite(state[source]).all())]
    problems = (("missing", missing), ("extra", extra), ("of another shape", misshapen), ("not finite", broken))
    if any(names for _, names in problems):
        raise WeightsError(
            f"the file's weights are not those of {model}",
            why="; ".join(f"{what}: {_listed(names)}" for what, names in problems if names),
            fix="use the official file as it was published, and the model that it belongs to",
        )
    return {name: _plain(state[source]) for source, name in found.items()}


def size_of(state: Mapping[str, Tensor], name: str, axis: int, model: str) -> int:
    """One size of a tensor whose shape tells the network's size. Raises `WeightsError` where there is none."""
    if name not in state or state[name].ndim <= axis:
        raise WeightsError(
            f"the file's weights are not those of {model}",
            why=f"missing: {name}, whose shape tells the network's size",
            fix="use the official file as it was published, and the model that it belongs to",
        )
    return state[name].shape[axis]


def count_of(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks there are under `prefix`: one more than the highest number that follows it."""
    numbers = [name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)]
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)


def heads_of(width: int, known: Mapping[int, int], heads: int, model: str) -> int:
    """The number of attention heads, which no shape tells: of the published width, or `heads` where that is given.

    Raises `ConfigError` where neither tells.
    """
    if heads or width in known:
        return heads or known[width]
    raise ConfigError(
        f"{model} of width {width} is none that was published",
        why=f"its number of attention heads is not told by the weights; published widths: {sorted(known)}",
        fix="give the option heads",
    )


def architecture_of(kind: type[Architecture], settings: Mapping[str, Any], model: str) -> Architecture:
    """The settings as an architecture; raises `WeightsError` where they are none that can be."""
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        raise WeightsError(
            f"the file's weights are not those of {model}",
            why="; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()),
            fix="use the official file as it was published, and the model that it belongs to",
        ) from error


def require_window(window: WindowSpec, modality: Modality, rate_hz: tuple[float, float], model: str) -> None:
    """Raise `WindowError` unless the windows are of this modality, at a rate between these two."""
    low, high = rate_hz
    if window.modality == modality and low <= window.rate_hz <= high:
        return
    rate = f"{low:g} Hz" if low == high else f"{low:g} to {high:g} Hz"
    raise WindowError(
        f"{model} can't read {window.modality} windows at {window.rate_hz:g} Hz",
        why=f"it reads {modality} at {rate}",
        fix=f"give it {modality} windows resampled to {rate}",
    )


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")

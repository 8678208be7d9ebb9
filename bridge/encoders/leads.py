"""The twelve standard ECG leads, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.errors import WindowError
from bridge.windows import WindowSpec

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
"""In the standard order, in which networks of twelve leads take them."""


def lead_places(window: WindowSpec, model: str) -> tuple[int, ...]:
    """The place of each of the window's channels among the twelve leads.

    One channel alone may have any name: an unknown one (a chest lead, say) takes the first place, as in the published
    experiments. Raises `WindowError` where one of several is no standard lead or comes twice.
    """
    places = {name.upper(): place for place, name in enumerate(LEADS)}
    names = [channel.upper() for channel in window.channels]
    if len(names) == 1:
        return (places.get(names[0], 0),)
    unknown = [channel for channel, name in zip(window.channels, names, strict=True) if name not in places]
    if unknown or len(set(names)) < len(names):
        raise WindowError(
            f"{model} can't place the channels {', '.join(window.channels)}",
            why=f"no standard leads: {', '.join(unknown)}" if unknown else "a lead comes twice",
            fix=f"give one channel, or any of {', '.join(LEADS)}, each once",
        )
    return tuple(places[name] for name in names)


def in_twelve_leads(x: Tensor, places: tuple[int, ...]) -> Tensor:
    """`(batch, channels, samples)` to `(batch, 12, samples)`: channels at their places, zeros elsewhere."""
    padded = torch.zeros(len(x), len(LEADS), x.shape[-1], dtype=x.dtype, device=x.device)
    padded[:, list(places)] = x
    return padded

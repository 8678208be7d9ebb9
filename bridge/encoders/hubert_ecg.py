"""HuBERT-ECG small, base and large (ECG, 100 Hz): `HubertModel` of `transformers` over leads laid end to end.

Source: the checkpoints of https://huggingface.co/Edoardo-BS, CC BY-NC 4.0 (no commercial use).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn

from bridge.encoders.checkpoints import (
    architecture_of,
    heads_of,
    require_window,
    state_dict_of,
    taken,
    with_weight_norm_renamed,
)
from bridge.encoders.leads import LEADS, in_twelve_leads, lead_places
from bridge.encoders.published import published_model
from bridge.encoders.speech import (
    SpeechArchitecture,
    SpeechEncoder,
    from_transformers,
    require_a_token,
    speech_sizes,
)
from bridge.errors import WindowError
from bridge.windows import WindowSpec

FAMILY = "hubert-ecg"
_MODEL = published_model(FAMILY)
_HEADS = {512: 8, 768: 12, 960: 12}
_STRIDES = (4, 2, 2, 2, 2)
_NAMES = {
    "filters": "feature_extractor.conv_layers.{}.conv.weight",
    "projection": "feature_projection.projection.weight",
    "place": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
    "feed_forward": "encoder.layers.{}.feed_forward.intermediate_dense.weight",
}

Leads = Literal["none", "zero_pad", "repeat"]


class HubertEcgArchitecture(SpeechArchitecture):
    """Sizes of a HuBERT-ECG, and how leads are laid end to end."""

    leads: Leads = "none"
    """`none`: the window's leads, in the standard order. `zero_pad`: twelve, those that it has not being zeros.
    `repeat`: its one lead twelve times."""


class HubertEcgEncoder(SpeechEncoder):
    """A frozen HuBERT-ECG; position `i` is layer `i`, whose tokens follow time and then leads."""

    family = FAMILY
    architecture_type = HubertEcgArchitecture
    architecture: HubertEcgArchitecture

    def __init__(self, window: WindowSpec, architecture: HubertEcgArchitecture, digest: str = "") -> None:
        require_window(window, _MODEL.modality, _MODEL.rate_hz, _MODEL.title)
        self._places = lead_places(window, _MODEL.title)
        if architecture.leads == "repeat" and len(self._places) > 1:
            raise WindowError(
                f"{_MODEL.title} can't repeat {len(self._places)} leads",
                why="the option leads: repeat is for one lead",
                fix="choose one lead, or leads: none or zero_pad",
            )
        copies = 1 if architecture.leads == "none" else len(LEADS)
        samples = window.samples * (len(self._places) if copies == 1 else copies)
        require_a_token(architecture, samples, _MODEL.title)
        super().__init__(window, architecture, digest)

    def make_network(self, architecture: SpeechArchitecture) -> nn.Module:
        """A `HubertModel`."""
        settings = from_transformers("HubertConfig")(**architecture.settings())
        return cast("nn.Module", from_transformers("HubertModel")(settings))

    def arrange(self, x: Tensor) -> Tensor:
        """Leads end to end: `(batch, 1, samples)`."""
        leads = self.architecture.leads
        if leads == "repeat":
            x = x.expand(-1, len(LEADS), -1)
        elif leads == "zero_pad":
            x = in_twelve_leads(x, self._places)
        else:
            x = x[:, sorted(range(len(self._places)), key=self._places.__getitem__)]
        return x.flatten(1).unsqueeze(1)


def unwrap(loaded: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict out of what a published file holds, older names of the weight norm brought up to date."""
    return with_weight_norm_renamed(state_dict_of(loaded, "model_state_dict", _MODEL.title))


def published(
    state: Mapping[str, Tensor], window: WindowSpec, *, leads: Leads = "none", heads: int = 0
) -> tuple[Mapping[str, Tensor], HubertEcgArchitecture]:
    """The encoder's tensors and architecture from an unwrapped state dict; its size is told from the shapes.

    `heads` is needed for a width that was not published. Raises `WeightsError`, `WindowError` and `ConfigError`.
    """
    sizes = speech_sizes(state, _NAMES, _MODEL.title)
    heads = heads_of(sizes["width"], _HEADS, heads, _MODEL.title)
    settings = {**sizes, "heads": heads, "strides": _STRIDES, "leads": leads}
    architecture = architecture_of(HubertEcgArchitecture, settings, _MODEL.title)
    wanted = HubertEcgEncoder.skeleton(window, architecture).shapes()
    tensors = taken(state, wanted, _MODEL.unused, _MODEL.title, lambda name: name.removeprefix("network."))
    return tensors, architecture

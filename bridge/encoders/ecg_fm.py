"""ECG-FM (ECG, 500 Hz): `Wav2Vec2Model` of `transformers` with a first convolution over twelve leads.

Source: `wanglab/ecg-fm-preprint`; code MIT, weights as its model card says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

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
from bridge.windows import WindowSpec

FAMILY = "ecg-fm"
_MODEL = published_model(FAMILY)
_HEADS = {768: 12}
_STRIDE = 2
_NAMES = {
    "filters": "feature_extractor.conv_layers.{}.0.weight",
    "projection": "post_extract_proj.weight",
    "place": "conv_pos.pos_conv.0.parametrizations.weight.original1",
    "feed_forward": "encoder.layers.{}.fc1.weight",
}
# Our names to the published ones.
_FRONTS = (
    ("feature_projection.layer_norm.", "layer_norm."),
    ("feature_projection.projection.", "post_extract_proj."),
    ("encoder.pos_conv_embed.conv.", "conv_pos.pos_conv.0."),
)
_CONVOLUTION = {"conv": "0", "layer_norm": "2"}
_LAYER = {
    "attention": "self_attn",
    "layer_norm": "self_attn_layer_norm",
    "feed_forward.intermediate_dense": "fc1",
    "feed_forward.output_dense": "fc2",
}


class EcgFmEncoder(SpeechEncoder):
    """A frozen ECG-FM; position `i` is layer `i`. Leads that the window has not are zeros."""

    family = FAMILY
    architecture_type = SpeechArchitecture

    def __init__(self, window: WindowSpec, architecture: SpeechArchitecture, digest: str = "") -> None:
        require_window(window, _MODEL.modality, _MODEL.rate_hz, _MODEL.title)
        self._places = lead_places(window, _MODEL.title)
        require_a_token(architecture, window.samples, _MODEL.title)
        super().__init__(window, architecture, digest)

    def make_network(self, architecture: SpeechArchitecture) -> nn.Module:
        """A `Wav2Vec2Model` over twelve leads."""
        # Without masking it has no embedding of masked places, which the encoder does not need.
        settings = from_transformers("Wav2Vec2Config")(**architecture.settings(), mask_time_prob=0.0)
        network = cast("nn.Module", from_transformers("Wav2Vec2Model")(settings))
        first, kernel, stride = architecture.filters[0], architecture.kernels[0], architecture.strides[0]
        convolution = nn.Conv1d(len(LEADS), first, kernel, stride, bias=False)
        network.get_submodule("feature_extractor.conv_layers.0").conv = convolution
        return network

    def arrange(self, x: Tensor) -> Tensor:
        """Leads at their places among the twelve: `(batch, 12, samples)`."""
        return in_twelve_leads(x, self._places)


def unwrap(loaded: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict out of what the published file holds, older names of the weight norm brought up to date."""
    return with_weight_norm_renamed(state_dict_of(loaded, "model", _MODEL.title))


def published(
    state: Mapping[str, Tensor], window: WindowSpec, *, heads: int = 0
) -> tuple[Mapping[str, Tensor], SpeechArchitecture]:
    """The encoder's tensors and architecture from an unwrapped state dict.

    `heads` is needed for a width that was not published. Raises `WeightsError`, `WindowError` and `ConfigError`.
    """
    sizes = speech_sizes(state, _NAMES, _MODEL.title)
    heads = heads_of(sizes["width"], _HEADS, heads, _MODEL.title)
    settings = {**sizes, "heads": heads, "strides": (_STRIDE,) * len(sizes["filters"])}
    architecture = architecture_of(SpeechArchitecture, settings, _MODEL.title)
    wanted = EcgFmEncoder.skeleton(window, architecture).shapes()
    return taken(state, wanted, _MODEL.unused, _MODEL.title, _published_name), architecture


def _published_name(name: str) -> str:
    """The name in the published file of one of the network's tensors."""
    name = name.removeprefix("network.")
    for ours, theirs in _FRONTS:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    parts = name.split(".")
    if name.startswith("feature_extractor."):
        parts[3] = _CONVOLUTION[parts[3]]
    if name.startswith("encoder.layers."):
        head, leaf = ".".join(parts[3:-1]), parts[-1]
        for ours, theirs in _LAYER.items():
            if head == ours or head.startswith(f"{ours}."):
                return ".".join([*parts[:3], theirs + head.removeprefix(ours), leaf])
    return ".".join(parts)

"""What the two ECG models share: networks of `transformers` that were made for speech, cut at their layers.

Convolutions turn the signal into features; a projection, a positional convolution and a layer norm make the input of
layer 0; post-norm transformer layers follow. `transformers` is imported when such a network is built, from settings in
code: nothing is fetched.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

from pydantic import Field, model_validator
from torch import Tensor, nn

from bridge.config import Settings
from bridge.encoders.checkpoints import count_of, size_of
from bridge.encoders.split import SplitEncoder
from bridge.errors import WindowError
from bridge.windows import WindowSpec

_importing = threading.Lock()


def from_transformers(name: str) -> Any:
    """A class of `transformers` by its name; two threads that import its lazy modules at once would find them half
    made."""
    with _importing:
        import transformers

        return getattr(transformers, name)


class SpeechArchitecture(Settings):
    """Sizes of a network that was made for speech."""

    width: int = Field(gt=0)
    """Numbers in a token."""
    layers: int = Field(ge=1)
    """Transformer layers, which are the positions of a bridge."""
    heads: int = Field(ge=1)
    """Attention heads; divides the width."""
    feed_forward: int = Field(gt=0)
    """Hidden width of a layer's feed-forward part."""
    filters: tuple[int, ...] = Field(min_length=1)
    """Output channels of each convolution."""
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    place_kernel: int = Field(gt=0)
    """Tokens that the positional convolution sees."""
    place_groups: int = Field(ge=1)
    """Groups of the positional convolution."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> SpeechArchitecture:
        if self.width % self.heads or self.width % self.place_groups:
            raise ValueError(f"heads ({self.heads}) and place_groups must divide width ({self.width})")
        if not len(self.filters) == len(self.kernels) == len(self.strides):
            raise ValueError("filters, kernels and strides must have one entry a convolution")
        return self

    def tokens(self, samples: int) -> int:
        """How many tokens the convolutions make of `samples` samples."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

    def shortest(self) -> int:
        """How many samples one token needs."""
        samples = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `HubertConfig` and `Wav2Vec2Config`."""
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.feed_forward,
            "conv_dim": self.filters,
            "conv_kernel": self.kernels,
            "conv_stride": self.strides,
            "conv_bias": False,
            "num_conv_pos_embeddings": self.place_kernel,
            "num_conv_pos_embedding_groups": self.place_groups,
            "feat_extract_norm": "group",
            "do_stable_layer_norm": False,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "feat_extract_activation": "gelu",
        }


class SpeechEncoder(SplitEncoder):
    """An encoder around a `HubertModel` or `Wav2Vec2Model`; position `i` is its layer `i`."""

    architecture: SpeechArchitecture

    def __init__(self, window: WindowSpec, architecture: SpeechArchitecture, digest: str = "") -> None:
        super().__init__(window, architecture, digest)
        self.network = self.make_network(architecture)

    @abstractmethod
    def make_network(self, architecture: SpeechArchitecture) -> nn.Module:
        """The network of `transformers`."""

    @abstractmethod
    def arrange(self, x: Tensor) -> Tensor:
        """Windows `(batch, channels, samples)` as the first convolution takes them."""

    @property
    def positions(self) -> int:
        """The number of transformer layers."""
        return self.architecture.layers

    def embed(self, x: Tensor) -> Tensor:
        """The input of layer 0."""
        # The network's own forward would take one channel alone.
        features = self.arrange(x)
        for convolution in self._part("feature_extractor.conv_layers"):
            features = convolution(features)
        h = self.project(features.transpose(1, 2))
        h = h + self._part("encoder.pos_conv_embed")(h)
        return cast(Tensor, self._part("encoder.layer_norm")(h))

    def project(self, features: Tensor) -> Tensor:
        """Features `(batch, tokens, filters)` to the network's width."""
        projection = self._part("feature_projection")
        return cast(Tensor, projection.projection(projection.layer_norm(features)))

    def run_block(self, i: int, native: Tensor) -> Tensor:
        """Layer `i`."""
        return cast(Tensor, self._part("encoder.layers")[i](native))

    def _part(self, name: str) -> Any:
        return self.network.get_submodule(name)


def require_a_token(architecture: SpeechArchitecture, samples: int, model: str) -> None:
    """Raise `WindowError` where so short a signal has no token."""
    if architecture.tokens(samples) < 1:
        raise WindowError(
            f"{model} can't read windows of {samples} samples",
            why=f"its convolutions need {architecture.shortest()} for one token",
            fix=f"use windows of at least {architecture.shortest()} samples",
        )


def speech_sizes(state: Mapping[str, Tensor], names: Mapping[str, str], model: str) -> dict[str, Any]:
    """The sizes that the shapes of a published state dict tell: all of an architecture but heads and strides.

    `names` are its names of `filters` (with `{}` for the number), `projection`, `place`, `layers` and `feed_forward`
    (with `{}` for the layer). Raises `WeightsError` where one is missing.
    """
    prefix = names["filters"].partition("{}")[0]
    convolutions = [names["filters"].format(i) for i in range(max(1, count_of(state, prefix)))]
    width = size_of(state, names["projection"], 0, model)
    return {
        "width": width,
        "layers": max(1, count_of(state, names["feed_forward"].partition("{}")[0])),
        "feed_forward": size_of(state, names["feed_forward"].format(0), 0, model),
        "filters": tuple(size_of(state, name, 0, model) for name in convolutions),
        "kernels": tuple(size_of(state, name, 2, model) for name in convolutions),
        "place_kernel": size_of(state, names["place"], 2, model),
        "place_groups": max(1, width // max(1, size_of(state, names["place"], 1, model))),
    }

"""From a case's recipes to the encoder that the product makes of such a file, and to what its first block takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridge.encoders.leads import LEADS
from bridge.encoders.normwear import NormwearEncoder
from bridge.encoders.published import MODELS, PublishedModel
from bridge.encoders.scalogram import LOST, SERIES, WIDTHS
from bridge.encoders.split import SplitEncoder
from bridge.windows import WindowSpec
from simulations.errors import FixtureError
from simulations.parity.cases import EncoderFacts, FoundCase, SignalRecipe, checkpoint_keys
from simulations.parity.fill import checkpoint_sha256, signal, tensor_sha256, weight

State = dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A case, ready to run."""

    encoder: SplitEncoder
    windows: Tensor
    """`(batch, channels, samples)`; of NormWear zeros, since its cases begin behind the wavelets."""
    embed: Callable[[], Tensor]
    """What the first block takes, native."""
    weights_stated: bool
    """Whether the case says the weights' digest, which is theirs then."""


@dataclass(frozen=True)
class _Model:
    """How the fixtures describe a model."""

    windows: Callable[[EncoderFacts, Tensor], Tensor]
    channels: Callable[[EncoderFacts, Tensor], tuple[str, ...]]
    options: Callable[[EncoderFacts], dict[str, str | int]]
    wrapper: str = ""


def prepare(case: FoundCase, facts: EncoderFacts) -> Prepared:
    """Build weights, encoder and input. Raises `FixtureError` where a digest differs or the model is unknown, and what
    conversion raises where the weights do not fit."""
    published, model = _model(case, facts)
    state, stated = _weights(case, facts)
    made = made_signal(case.name, facts.input)
    x = model.windows(facts, made)
    window = WindowSpec(
        modality=published.modality,
        channels=model.channels(facts, x),
        rate_hz=published.rate_hz[1],
        samples=x.shape[-1],
    )
    loaded: dict[str, Any] = {model.wrapper: state} if model.wrapper else dict(state)
    tensors, architecture = published.convert(published.unwrap(loaded), window, **model.options(facts))
    encoder = published.encoder().build(window, architecture, tensors)
    if isinstance(encoder, NormwearEncoder):
        pictures, normwear = _scalogram(case.name, facts.input, made), encoder
        return Prepared(encoder, x, lambda: normwear.embed_scalogram(pictures), stated)
    return Prepared(encoder, x, lambda: encoder.embed(x), stated)


def made_signal(name: str, recipe: SignalRecipe) -> Tensor:
    """The case's input as its recipe makes it, before anything is done to it. Raises `FixtureError`."""
    made = signal(recipe.tag, recipe.shape, recipe.amplitude)
    if tensor_sha256(made) != recipe.digest:
        raise FixtureError(
            f"{name}: damaged",
            why="the input that its recipe makes does not have the digest that it says",
            fix="copy the folder again",
        )
    return made


def _weights(case: FoundCase, facts: EncoderFacts) -> tuple[State, bool]:
    state = {}
    for name, (shape, kind) in checkpoint_keys(case, facts).items():
        dtype = getattr(torch, kind, None)
        if not isinstance(dtype, torch.dtype):
            raise FixtureError(f"{case.name}: damaged", why=f"{kind} is no kind of number", fix="copy the folder again")
        state[name] = weight(name, shape, dtype, facts.seed, facts.profile)
    if facts.checkpoint_sha256 and checkpoint_sha256(state) != facts.checkpoint_sha256:
        raise FixtureError(
            f"{case.name}: damaged",
            why="the weights that its recipe makes do not have the digest that it says",
            fix="copy the folder again, with its keys/",
        )
    rows, name = facts.time_embed_length, "student.time_embed"
    if rows is not None and name in state and state[name].shape[1] != rows:
        # The published experiments put longer time embeddings into the model.
        state[name] = weight(name, (1, rows, state[name].shape[2]), torch.float32, facts.seed, facts.profile)
    return state, bool(facts.checkpoint_sha256)


def _model(case: FoundCase, facts: EncoderFacts) -> tuple[PublishedModel, _Model]:
    for published in MODELS:
        if published.name.replace("-", "") == facts.model.replace("-", "").replace("_", ""):
            return published, _MODELS[published.name]
    raise FixtureError(
        f"{case.name}: unknown model '{facts.model}'",
        why=f"known: {', '.join(model.name for model in MODELS)}",
        fix="use a version of fedbridge that has this model",
    )


def _shaped(facts: EncoderFacts, x: Tensor, dimensions: int) -> Tensor:
    if x.ndim != dimensions:
        raise FixtureError(f"{facts.model}: an input of shape {tuple(x.shape)}", why=f"{dimensions} axes are expected")
    return x


def _labram_windows(facts: EncoderFacts, x: Tensor) -> Tensor:
    """The format gives microvolts; the model reads hundreds of them."""
    return _shaped(facts, x, 3) / 100


def _labram_channels(facts: EncoderFacts, x: Tensor) -> tuple[str, ...]:
    return facts.channels or tuple(f"channel {i}" for i in range(x.shape[1]))


def _normwear_windows(facts: EncoderFacts, x: Tensor) -> Tensor:
    batch, channels = _shaped(facts, x, 5).shape[:2]
    return torch.zeros(batch, channels, x.shape[-1] + LOST)


def _scalogram(name: str, recipe: SignalRecipe, made: Tensor) -> Tensor:
    """`(batch, channels, 3, samples - 2, 65)`; the format has the last two axes the other way round."""
    if made.shape[2:4] != (SERIES, len(WIDTHS)):
        raise FixtureError(
            f"{name}: an input of shape {tuple(made.shape)} is no scalogram",
            why=f"(batch, channels, {SERIES}, {len(WIDTHS)}, samples) is expected",
        )
    return made.transpose(-1, -2)


def _heads(settings: str, key: str) -> Callable[[EncoderFacts], dict[str, str | int]]:
    def options(facts: EncoderFacts) -> dict[str, str | int]:
        given: dict[str, Any] = getattr(facts, settings)
        return {"heads": given[key]} if key in given else {}

    return options


_MODELS = {
    "labram": _Model(
        windows=_labram_windows,
        channels=_labram_channels,
        options=lambda facts: {"electrode_embedding": "on" if facts.use_abs_pos_emb else "off"},
        wrapper="model",
    ),
    "hubert-ecg": _Model(
        # The format's leads lie end to end already.
        windows=lambda facts, x: _shaped(facts, x, 2).unsqueeze(1),
        channels=lambda facts, x: ("ECG",),
        options=_heads("config", "num_attention_heads"),
        wrapper="model_state_dict",
    ),
    "ecg-fm": _Model(
        windows=lambda facts, x: _shaped(facts, x, 3),
        channels=lambda facts, x: LEADS if x.shape[1] == len(LEADS) else ("ECG",) * x.shape[1],
        options=_heads("config", "encoder_attention_heads"),
        wrapper="model",
    ),
    "papagei": _Model(
        windows=lambda facts, x: _shaped(facts, x, 3),
        channels=lambda facts, x: ("PPG",) * x.shape[1],
        options=lambda facts: {},
    ),
    "normwear": _Model(
        windows=_normwear_windows,
        channels=lambda facts, x: tuple(f"EMG{i}" for i in range(x.shape[1])),
        options=_heads("arch", "num_heads"),
        wrapper="model",
    ),
}

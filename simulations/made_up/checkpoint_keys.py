"""What the published files hold: names and shapes of their entries, by rules of our own.

Written from the models' descriptions and not from the encoders, so that a conversion can be tested against it. Sizes of
what no encoder uses (vocabularies, decoders) are the published ones where they are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
Entry = tuple[str, Shape]

COUNTER = "num_batches_tracked"
"""The one kind of entry that holds a whole number; all others are float32."""


@dataclass(frozen=True)
class Size:
    """What tells a model's sizes apart."""

    width: int
    blocks: int
    hidden: int
    """Width of the feed-forward part."""
    convolutions: int = 512
    """Width of a speech network's convolutions."""
    vocabulary: int = 16
    """Of what the model was pretrained to predict."""
    projected: int = 16
    """Width in which it was compared there."""
    positional: tuple[int, int] = (128, 16)
    """Kernel and groups of a speech network's positional convolution."""
    whole: bool = True
    """Whether the parts that only pretraining used are there in full."""


SIZES: Mapping[str, Mapping[str, Size]] = {
    "labram": {"base": Size(200, 12, 800, vocabulary=8192), "tiny": Size(200, 3, 800)},
    "hubert-ecg": {
        "small": Size(512, 8, 2048, vocabulary=1000, projected=256),
        "base": Size(768, 12, 3072, vocabulary=1000, projected=256),
        "large": Size(960, 16, 3840, vocabulary=1000, projected=512),
        "tiny": Size(32, 3, 64, convolutions=24, vocabulary=10, positional=(16, 4)),
    },
    "papagei": {"base": Size(32, 18, 256, vocabulary=3), "tiny": Size(4, 6, 4, vocabulary=2)},
    "normwear": {"base": Size(768, 12, 3072), "tiny": Size(24, 3, 96, whole=False)},
    "ecg-fm": {
        "base": Size(768, 12, 3072, convolutions=256, vocabulary=640, projected=256),
        "tiny": Size(32, 3, 64, convolutions=24, positional=(16, 4)),
    },
}
"""By model and size; `tiny` is no published one, for tests."""


def published_keys(model: str, size: str) -> dict[str, Shape]:
    """Every entry of the model's state dict as its file names it, with its shape; `KeyError` for what there is not."""
    return dict(_RULES[model](SIZES[model][size]))


def _labram(size: Size) -> Iterator[Entry]:
    w = size.width
    for name, shape in (("cls", (1, 1, w)), ("mask", (1, 1, w))):
        yield f"student.{name}_token", shape
    yield "student.pos_embed", (1, 129, w)
    yield "student.time_embed", (1, 16, w)
    for i, kernel in ((1, (8, 1, 1, 15)), (2, (8, 8, 1, 3)), (3, (8, 8, 1, 3))):
        yield from _layer(f"student.patch_embed.conv{i}", *kernel)
        yield from _norm(f"student.patch_embed.norm{i}", 8)
    for i in range(size.blocks):
        at = f"student.blocks.{i}"
        yield from ((f"{at}.gamma_{side}", (w,)) for side in (1, 2))
        yield f"{at}.attn.qkv.weight", (3 * w, w)
        yield from _norm(f"{at}.attn.q_norm", 20)
        yield from _norm(f"{at}.attn.k_norm", 20)
        yield from _block(at, w, size.hidden)
    yield from _norm("student.norm", w)
    yield from _layer("student.lm_head", size.vocabulary, w)
    yield from _layer("lm_head", size.vocabulary, w)
    yield from _layer("projection_head.0", w, w)


def _hubert_ecg(size: Size) -> Iterator[Entry]:
    w, c = size.width, size.convolutions
    yield "masked_spec_embed", (w,)
    for i, kernel in enumerate((10, 3, 3, 2, 2)):
        yield f"feature_extractor.conv_layers.{i}.conv.weight", (c, c if i else 1, kernel)
    yield from _norm("feature_extractor.conv_layers.0.layer_norm", c)
    yield from _norm("feature_projection.layer_norm", c)
    yield from _layer("feature_projection.projection", w, c)
    yield from _positional("encoder.pos_conv_embed.conv", size)
    yield from _norm("encoder.layer_norm", w)
    names = ("attention", "layer_norm", "feed_forward.intermediate_dense", "feed_forward.output_dense")
    for i in range(size.blocks):
        yield from _speech_layer(f"encoder.layers.{i}", names, size)
    yield from _layer("final_proj.0", size.projected, w)
    yield "label_embedding.0.weight", (size.vocabulary, size.projected)


def _ecg_fm(size: Size) -> Iterator[Entry]:
    w, c = size.width, size.convolutions
    yield "mask_emb", (w,)
    for i in range(4):
        yield f"feature_extractor.conv_layers.{i}.0.weight", (c, c if i else 12, 2)
    yield from _norm("feature_extractor.conv_layers.0.2", c)
    yield from _norm("layer_norm", c)
    yield from _layer("post_extract_proj", w, c)
    yield from _positional("conv_pos.pos_conv.0", size)
    yield from _norm("encoder.layer_norm", w)
    for i in range(size.blocks):
        yield from _speech_layer(f"encoder.layers.{i}", ("self_attn", "self_attn_layer_norm", "fc1", "fc2"), size)
    yield "quantizer.vars", (1, size.vocabulary, size.projected // 2)
    yield from _layer("quantizer.weight_proj", size.vocabulary, c)
    yield from _layer("project_q", size.projected, size.projected)
    yield from _layer("final_proj", size.projected, w)


def _papagei(size: Size) -> Iterator[Entry]:
    """A pyramid: the width doubles at every fourth block. Two mixtures of experts follow it."""
    yield from _layer("module.first_block_conv.conv", size.width, 1, 3)
    yield from _batch_norm("module.first_block_bn", size.width)
    before = size.width
    for i in range(size.blocks):
        at, after = f"module.basicblock_list.{i}", size.width * 2 ** (i // 4)
        yield from _batch_norm(f"{at}.bn1", before)
        yield from _layer(f"{at}.conv1.conv", after, before, 3)
        yield from _batch_norm(f"{at}.bn2", after)
        yield from _layer(f"{at}.conv2.conv", after, after, 3)
        before = after
    yield from _batch_norm("module.final_bn", before)
    yield from _layer("module.dense", before, before)
    for head, last in ((1, 2), (2, 3)):
        for expert in range(size.vocabulary):
            yield from _layer(f"module.expert_layers_{head}.{expert}.0", size.hidden, before)
            yield from _layer(f"module.expert_layers_{head}.{expert}.{last}", 1, size.hidden)
        yield from _layer(f"module.gating_network_{head}.0", size.vocabulary, before)


def _normwear(size: Size) -> Iterator[Entry]:
    """Every second block has a second part, over the channels' class tokens; a decoder follows."""
    w = size.width
    yield "cls_token", (1, 1, w)
    yield "pos_embed", (1, 560, w)
    yield from _layer("patch_embed.proj", w, 3, 9, 5)
    for i in range(size.blocks):
        for part in ("variate_encoder", "cls_fusion") if i % 2 == 0 else ("variate_encoder",):
            at = f"encoder_blocks.{i}.{part}"
            yield from _layer(f"{at}.attn.qkv", 3 * w, w)
            yield from _block(at, w, size.hidden)
    yield from _norm("norm", w)
    if size.whole:
        yield from _normwear_decoder(w, 512)


def _normwear_decoder(encoded: int, w: int) -> Iterator[Entry]:
    yield "mask_token", (1, 1, w)
    yield "decoder_pos_embed", (1, 560, w)
    yield from _layer("decoder_embed", w, encoded)
    for i in range(2):
        at = f"decoder_blocks.{i}"
        yield f"{at}.attn.qkv.weight", (3 * w, w)
        yield from _block(at, w, 4 * w)
    yield from _norm("decoder_norm", w)
    yield from _layer("temporal_recon", 388, 560)
    yield from _batch_norm("spatial_recon.norm", 2048)
    yield from _layer("spatial_recon.conv1", 384, 2048, 1)
    yield from _layer("spatial_recon.conv2", 4, 384, 1)


def _layer(name: str, *shape: int) -> Iterator[Entry]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _norm(name: str, width: int) -> Iterator[Entry]:
    yield from _layer(name, width)


def _batch_norm(name: str, width: int) -> Iterator[Entry]:
    yield from _layer(name, width)
    yield from ((f"{name}.running_{what}", (width,)) for what in ("mean", "var"))
    yield f"{name}.{COUNTER}", ()


def _block(at: str, width: int, hidden: int) -> Iterator[Entry]:
    """What every vision transformer's block has, beside its queries, keys and values."""
    yield from _norm(f"{at}.norm1", width)
    yield from _layer(f"{at}.attn.proj", width, width)
    yield from _norm(f"{at}.norm2", width)
    yield from _layer(f"{at}.mlp.fc1", hidden, width)
    yield from _layer(f"{at}.mlp.fc2", width, hidden)


def _speech_layer(at: str, names: tuple[str, str, str, str], size: Size) -> Iterator[Entry]:
    attention, norm, first, second = names
    for matrix in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield from _layer(f"{at}.{attention}.{matrix}", size.width, size.width)
    yield from _norm(f"{at}.{norm}", size.width)
    yield from _layer(f"{at}.{first}", size.hidden, size.width)
    yield from _layer(f"{at}.{second}", size.width, size.hidden)
    yield from _norm(f"{at}.final_layer_norm", size.width)


def _positional(name: str, size: Size) -> Iterator[Entry]:
    """A convolution with weight norm, under the names of torch since 2.0."""
    kernel, groups = size.positional
    yield f"{name}.bias", (size.width,)
    yield f"{name}.parametrizations.weight.original0", (1, 1, kernel)
    yield f"{name}.parametrizations.weight.original1", (size.width, size.width // groups, kernel)


_RULES: Mapping[str, Callable[[Size], Iterator[Entry]]] = {
    "labram": _labram,
    "hubert-ecg": _hubert_ecg,
    "papagei": _papagei,
    "normwear": _normwear,
    "ecg-fm": _ecg_fm,
}

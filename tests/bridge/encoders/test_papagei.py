"""PaPaGei-S against the numbers of the original, and its pyramid and odd lengths by hand."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridge.encoders.contract import check_encoder
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.encoders.papagei import PapageiArchitecture, PapageiEncoder, published, unwrap
from bridge.encoders.published import published_model
from bridge.encoders.recipes import PAPAGEI
from bridge.encoders.split import SplitEncoder
from bridge.errors import WeightsError, WindowError
from bridge.windows import WindowSpec
from tests.bridge.encoders.oracle import Case, assert_parity, converted


def window(samples: int = 101, *, channels: tuple[str, ...] = ("PLETH",), rate: float = 125) -> WindowSpec:
    return WindowSpec(modality="PPG", channels=channels, rate_hz=rate, samples=samples)


def encoder_of(case: Case) -> tuple[SplitEncoder, Tensor]:
    x = case.signal()
    return converted("papagei", case.checkpoint(), window(x.shape[-1])), x


def made(samples: int, width: int = 4, blocks: int = 6) -> PapageiEncoder:
    """An encoder with random weights and the norms' statistics such as they could be."""
    torch.manual_seed(5)
    fresh = PapageiEncoder(window(samples), PapageiArchitecture(width=width, blocks=blocks))
    state = fresh.state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_mean", "running_var")):
            state[name] = torch.rand_like(tensor) + 0.5
    return PapageiEncoder.build(window(samples), fresh.architecture, state, "0" * 64)


@pytest.mark.parametrize("name", ["papagei_tiny", "papagei_tiny_eps"])
def test_tiny_parity(oracle: Path, name: str) -> None:
    case = Case(oracle, name)
    encoder, x = encoder_of(case)
    assert_parity(case, encoder, x)
    check_encoder(encoder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["papagei_s_10s", "papagei_s_wesad"])
def test_full_size_parity(oracle: Path, name: str) -> None:
    case = Case(oracle, name)
    encoder, x = encoder_of(case)
    assert_parity(case, encoder, x)


def test_layouts_of_a_minute_are_the_published_pyramid() -> None:
    encoder = PapageiEncoder.skeleton(window(7500), PapageiArchitecture())
    lengths = [7500] * 2 + [3750] * 2 + [1875] * 2 + [938] * 2 + [469] * 2 + [235] * 2 + [118] * 2 + [59] * 2 + [30] * 2
    widths = [32] * 5 + [64] * 4 + [128] * 4 + [256] * 4 + [512]
    assert [encoder.layout(i, "in") for i in range(18)] == list(zip(lengths, widths, strict=True))
    assert encoder.layout(17, "out") == (15, 512)


def test_every_number_of_the_published_file_is_accounted_for(oracle: Path) -> None:
    keys = json.loads((oracle / "keys" / "papagei-s.json").read_text())["keys"]
    encoder = PapageiEncoder.skeleton(window(1250), PapageiArchitecture())
    widths = [32, *(32 * 2 ** (i // 4) for i in range(18))]
    blocks = sum(3 * a * b + 3 * b * b + 4 * b for a, b in pairwise(widths))
    first_norms = 2 * sum(widths[1:-1])
    assert sum(p.numel() for p in encoder.parameters()) == 3 * 32 + 32 + 2 * 32 + blocks + first_norms
    state = {name.removeprefix("module."): torch.empty(shape) for name, (shape, _) in keys.items()}
    assert sum(tensor.numel() for tensor in state.values()) == published_model("papagei").parameters["base"]
    left_over = {"final_bn", "dense", "basicblock_list.0.bn1"}
    left_over |= {f"{part}_{n}" for part in ("expert_layers", "gating_network") for n in (1, 2)}
    unused = sum(t.numel() for name, t in state.items() if any(name.startswith(part + ".") for part in left_over))
    kept = sum(tensor.numel() for tensor in encoder.state_dict().values())
    assert kept + unused == 5_797_554


@pytest.mark.parametrize("length", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("i", [1, 4])
def test_a_block_is_the_one_that_was_trained(length: int, i: int) -> None:
    """Sums written out by hand, with the padding's formula and the zero on the right of the pooling."""
    encoder = made(64)
    w = {k.removeprefix(f"blocks.{i}."): v.double() for k, v in encoder.state_dict().items()}
    native = torch.randn(1, w["conv1.weight"].shape[1], length) - 2
    found = encoder.run_block(i, native)[0]

    def normed(h: Tensor, norm: str) -> Tensor:
        mean, var = w[f"{norm}.running_mean"], w[f"{norm}.running_var"]
        scaled = (h - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
        return (scaled * w[f"{norm}.weight"][:, None] + w[f"{norm}.bias"][:, None]).clamp(min=0)

    def convolved(h: Tensor, conv: str, stride: int) -> Tensor:
        n = h.shape[1]
        count = math.ceil(n / stride)
        left = max(0, (count - 1) * stride + 3 - n) // 2
        kernel = w[f"{conv}.weight"]
        out = w[f"{conv}.bias"][:, None].repeat(1, count)
        for t in range(count):
            for k in range(3):
                place = t * stride + k - left
                if 0 <= place < n:
                    out[:, t] += kernel[:, :, k] @ h[:, place]
        return out

    stride = 2 if i % 2 else 1
    h = convolved(normed(convolved(normed(native[0].double(), "norm1"), "conv1", stride), "norm2"), "conv2", 1)
    shortcut = native[0].double()
    if stride == 2:
        padded = torch.cat([shortcut, torch.zeros(len(shortcut), 1)], dim=1)
        shortcut = torch.stack([padded[:, 2 * t : 2 * t + 2].amax(1) for t in range(math.ceil(length / 2))], dim=1)
    more = (len(h) - len(shortcut)) // 2
    shortcut = torch.cat([torch.zeros(more, shortcut.shape[1]), shortcut, torch.zeros(more, shortcut.shape[1])])
    assert (found - (h + shortcut)).abs().max() < 1e-5


def test_it_comes_back_from_a_folder_and_fulfils_the_contract(tmp_path: Path) -> None:
    encoder = made(75)
    save_encoder(tmp_path, encoder.state_dict(), encoder.card(PAPAGEI, {"source": "none"}))
    loaded = load_encoder(tmp_path)
    check_encoder(loaded)
    x = torch.randn(3, 1, 75)
    assert torch.equal(loaded.prefix(x, 5), encoder.prefix(x, 5))


def test_a_file_without_the_prefix_loads_too(oracle: Path) -> None:
    state = Case(oracle, "papagei_tiny").checkpoint()
    assert all(name.startswith("module.") for name in state)
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    one, other = (published(unwrap(each), window())[0] for each in (state, bare))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (window(rate=64), "it reads PPG at 125 Hz"),
        (window().model_copy(update={"modality": "ECG"}), "it reads PPG at 125 Hz"),
        (window(channels=("red", "green")), "it reads one channel of PPG"),
    ],
)
def test_windows_that_do_not_fit_are_refused(spec: WindowSpec, says: str) -> None:
    with pytest.raises(WindowError) as caught:
        PapageiEncoder.skeleton(spec, PapageiArchitecture())
    assert says in caught.value.why


def test_differences_of_a_file_are_told_by_name(oracle: Path) -> None:
    state = dict(unwrap(Case(oracle, "papagei_tiny").checkpoint()))
    state["basicblock_list.3.conv1.conv.bias"] = torch.zeros(5)
    state["surprise"] = torch.zeros(1)
    del state["basicblock_list.5.bn2.running_var"]
    with pytest.raises(WeightsError) as caught:
        published(state, window())
    assert caught.value.why == (
        "missing: basicblock_list.5.bn2.running_var; extra: surprise; "
        "of another shape: basicblock_list.3.conv1.conv.bias (5,) instead of (4,)"
    )
    with pytest.raises(WeightsError, match=r"missing: first_block_conv\.conv\.weight"):
        published({"dense.weight": torch.zeros(1)}, window())

"""The list of published models, and taking tensors out of their files by name."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from bridge.encoders.checkpoints import count_of, state_dict_of, taken, with_weight_norm_renamed
from bridge.encoders.loading import GROUP
from bridge.encoders.published import MODELS, PublishedModel, published_model
from bridge.errors import ConfigError, WeightsError, WindowError
from bridge.windows import WindowSpec

SIZE = torch.Size


def test_the_list_needs_no_torch() -> None:
    script = (
        "import sys; from bridge.encoders.published import MODELS; "
        "print(len(MODELS), sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "5 []"


def test_networks_of_transformers_are_imported_when_built() -> None:
    script = (
        "import sys, bridge.encoders.hubert_ecg, bridge.encoders.ecg_fm, bridge.encoders.labram; "
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_has_a_module_and_an_entry_point(model: PublishedModel) -> None:
    points = {point.name: point.load() for point in entry_points(group=GROUP)}
    assert points[model.encoder().family] is model.encoder()
    with pytest.raises(WeightsError, match="holds no"):
        model.unwrap({})
    with pytest.raises(WeightsError, match="holds no"):
        model.unwrap({"surprise": "text"})


def test_licences_that_forbid_commercial_use_are_told() -> None:
    assert {model.name for model in MODELS if model.commercial is False} == {"hubert-ecg"}
    assert {model.name for model in MODELS if model.commercial is None} == {"papagei", "ecg-fm"}


def test_unknown_models_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="'bert' is no published model") as caught:
        published_model("bert")
    assert "labram" in caught.value.fix
    window = WindowSpec(modality="EEG", channels=("C3",), rate_hz=200, samples=400)
    model = published_model("labram")
    with pytest.raises(ConfigError, match="no option 'leads'") as caught:
        model.convert({}, window, leads="none")
    assert "electrode_embedding, time_embedding, seed" in caught.value.fix
    with pytest.raises(ConfigError, match="electrode_embedding can't be 'yes'") as caught:
        model.convert({}, window, electrode_embedding="yes")
    assert "on, off" in caught.value.fix
    for bad in ("x", -1, True):
        with pytest.raises(ConfigError, match="option seed can't be"):
            model.convert({}, window, seed=bad)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_windows_at_another_rate_and_empty_files_are_refused(model: PublishedModel) -> None:
    window = WindowSpec(modality=model.modality, channels=("C3",), rate_hz=1000, samples=20_000)
    with pytest.raises((WindowError, WeightsError)):
        model.convert({}, window)
    right = window.model_copy(update={"rate_hz": model.rate_hz[1]})
    with pytest.raises(WeightsError, match="not those of"):
        model.convert({"other": torch.zeros(3)}, right)


def test_taken_lists_every_difference_by_name() -> None:
    wanted = {"net.a": SIZE([2, 3]), "net.b": SIZE([4]), "net.c": SIZE([1]), "net.d": SIZE([1])}
    state = {
        "a": torch.zeros(3, 2),
        "b": torch.tensor([1.0, float("nan"), 0.0, 0.0]),
        "d": torch.zeros(1),
        "head.weight": torch.zeros(9),
        "stray": torch.zeros(1),
    }
    with pytest.raises(WeightsError) as caught:
        taken(state, wanted, ("head.*",), "Net", lambda name: name.removeprefix("net."))
    assert caught.value.why == ("missing: c; extra: stray; of another shape: a (3, 2) instead of (2, 3); not finite: b")


def test_taken_gives_single_precision_under_the_networks_names() -> None:
    state = {"a": torch.ones(2, dtype=torch.float64), "n": torch.tensor(3), "head.bias": torch.zeros(1)}
    found = taken(state, {"x.a": SIZE([2]), "x.n": SIZE([])}, ("head.*",), "Net", lambda name: name[2:])
    assert found.keys() == {"x.a", "x.n"}
    assert found["x.a"].dtype == torch.float32
    assert found["x.n"].dtype == torch.int64


def test_a_long_list_is_cut() -> None:
    wanted = {f"w{i:02}": SIZE([1]) for i in range(30)}
    with pytest.raises(WeightsError) as caught:
        taken({}, wanted, (), "Net")
    assert caught.value.why.endswith("w18, w19 and 10 more")


def test_wrappers_come_off() -> None:
    state = {"a": torch.zeros(1)}
    assert state_dict_of({"model": state, "cfg": object()}, "model", "Net") == state
    assert state_dict_of(state, "model", "Net") == state
    with pytest.raises(WeightsError, match="holds no weights of Net"):
        state_dict_of({"model": [1, 2]}, "model", "Net")
    with pytest.raises(WeightsError) as caught:
        state_dict_of({"model": {"a": torch.zeros(1), "epoch": 3}}, "model", "Net")
    assert caught.value.why == "these entries are no tensors: epoch"


def test_older_names_of_the_weight_norm_are_brought_up_to_date() -> None:
    g, v = torch.zeros(1), torch.ones(1)
    assert with_weight_norm_renamed({"conv.weight_g": g, "conv.weight_v": v, "conv.bias": g}) == {
        "conv.parametrizations.weight.original0": g,
        "conv.parametrizations.weight.original1": v,
        "conv.bias": g,
    }


def test_blocks_are_counted_by_their_highest_number() -> None:
    state = {"blocks.0.w": torch.zeros(1), "blocks.10.w": torch.zeros(1), "other.99": torch.zeros(1)}
    assert count_of(state, "blocks.") == 11
    assert count_of(state, "layers.") == 0

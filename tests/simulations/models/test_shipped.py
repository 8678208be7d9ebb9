"""The paper's directions as they ship: bridges of the published sizes, windows as the models read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bridge.errors import ConfigError, FedbridgeError, WindowError
from bridge.windows import WindowSpec
from simulations.cli import app
from simulations.config import SimulationConfig, load_simulation
from simulations.models.config import PublishedConfig
from simulations.models.layouts import published_card
from simulations.models.reading import input_form
from tests.conftest import ROOT

PARAMETERS = {
    "isruc_eeg2ecg": 1_813_984,
    "isruc_ecg2eeg": 140_000,
    "fog_eeg2emg": 1_209_408,
    "fog_emg2eeg": 712_000,
    "wesad_ppg2ecg": 398_784,
    "wesad_ecg2ppg": 188_912,
}
"""Trained numbers of the paper's bridges (BioX-Bridge)."""

SHIPPED = (*PARAMETERS, "wesad_ppg2ecg_ecgfm")


def path_of(name: str) -> Path:
    return ROOT / "configs" / f"{name}.yaml"


def config_of(name: str, *overrides: str) -> SimulationConfig:
    return load_simulation(path_of(name), overrides)


def planned(name: str, *overrides: str) -> dict[str, int]:
    sets = [part for each in overrides for part in ("--set", each)]
    result = CliRunner().invoke(app, ["plan", str(path_of(name)), "--json", *sets])
    assert result.exit_code == 0, result.output
    bridge: dict[str, int] = json.loads(result.stdout)["bridge"]
    return bridge


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_plan_counts_the_papers_parameters(name: str) -> None:
    bridge = planned(name)
    assert (bridge["parameters"], bridge["parameters_least"]) == (PARAMETERS[name], PARAMETERS[name])


def test_the_bridge_from_ecg_fm_has_about_as_many_as_the_paper_tells() -> None:
    # 768 numbers a token of ECG-FM; 235 tokens of width 128 at the input of PaPaGei's block 11.
    assert planned("wesad_ppg2ecg_ecgfm")["parameters"] == 768 * 8 + 8 * 235 * 50 + 50 * 128 == 106_544
    assert round(106_544 / 1e6, 2) == 0.11


def test_selection_is_planned_over_all_positions() -> None:
    bridge = planned("wesad_ppg2ecg", "selection={mode: scores}")
    # Most at PaPaGei's first blocks (7,500 tokens of width 32), fewest at its last (30 tokens of width 512).
    assert bridge["parameters"] == 512 * 32 + 32 * 7500 * 50 + 50 * 32
    assert bridge["parameters_least"] == 512 * 32 + 32 * 30 * 50 + 50 * 256


@pytest.mark.parametrize(("size", "width"), [("small", 512), ("base", 768), ("large", 960)])
def test_the_size_of_hubert_ecg_is_a_key(size: str, width: int) -> None:
    bridge = planned("isruc_eeg2ecg", f"encoders.new.published.size={size}")
    assert bridge["parameters"] == PARAMETERS["isruc_eeg2ecg"] + (width - 512) * 32


PPG, ECG = ("PPG", ("PPG",), 125.0, 7500), ("ECG", ("ECG",), 100.0, 6000)
EEG_NAMES, EMG_NAMES = ("F3", "C3", "O1", "F4", "C4", "O2"), ("EMG1", "EMG2", "EMG3")
EEG, EMG = ("EEG", ("F3", "F4", "C3", "C4", "O1", "O2"), 200.0, 600), ("EMG", EMG_NAMES, 130.0, 390)
SLEEP_EEG, SLEEP_ECG = ("EEG", EEG_NAMES, 200.0, 6000), ("ECG", ("ECG",), 100.0, 3000)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("isruc_eeg2ecg", SLEEP_EEG, SLEEP_ECG),
        ("isruc_ecg2eeg", SLEEP_ECG, SLEEP_EEG),
        ("wesad_ppg2ecg", PPG, ECG),
        ("wesad_ecg2ppg", ECG, PPG),
        ("fog_eeg2emg", EEG, EMG),
        ("fog_emg2eeg", EMG, EEG),
        ("wesad_ppg2ecg_ecgfm", PPG, ("ECG", ("ECG",), 500.0, 30000)),
    ],
)
def test_windows_are_as_the_models_read_them(name: str, old: tuple[object, ...], new: tuple[object, ...]) -> None:
    config = config_of(name)
    for role, wanted in (("old", old), ("new", new)):
        form = input_form(config, role)  # type: ignore[arg-type]
        window = form.window
        assert (window.modality, window.channels, window.rate_hz, window.samples) == wanted
        # Epochs are prepared by themselves, recordings as a whole; LaBraM is not normalised.
        normalise = "none" if window.modality == "EEG" else "window" if name.startswith("isruc") else "recording"
        assert form.preprocessing.over == ("window" if name.startswith("isruc") else "run")
        assert form.preprocessing.normalise == normalise


def test_shuffled_windows_are_prepared_by_themselves() -> None:
    form = input_form(config_of("fog_eeg2emg", "data.fog.windows=shuffled_008"), "new")
    assert (form.preprocessing.over, form.preprocessing.normalise) == ("window", "window")


def window(modality: str, channels: tuple[str, ...], rate: float, samples: int) -> WindowSpec:
    return WindowSpec.model_validate({"modality": modality, "channels": channels, "rate_hz": rate, "samples": samples})


@pytest.mark.parametrize(
    ("published", "spec", "tokens", "positions", "width"),
    [
        ({"model": "hubert-ecg", "size": "small"}, window("ECG", ("ECG",), 100, 3000), 46, 8, 512),
        ({"model": "hubert-ecg", "size": "base"}, window("ECG", ("ECG",), 100, 6000), 93, 12, 768),
        ({"model": "ecg-fm"}, window("ECG", ("ECG",), 500, 15000), 937, 12, 768),
        ({"model": "ecg-fm"}, window("ECG", ("ECG",), 500, 30000), 1875, 12, 768),
        ({"model": "labram"}, window("EEG", EEG_NAMES, 200, 6000), 181, 12, 200),
        ({"model": "labram"}, window("EEG", EEG_NAMES, 200, 600), 19, 12, 200),
        ({"model": "normwear"}, window("EMG", EMG_NAMES, 130, 390), 1680, 12, 768),
    ],
)
def test_layouts_are_those_that_the_paper_tells(
    published: dict[str, str], spec: WindowSpec, tokens: int, positions: int, width: int
) -> None:
    card = published_card(PublishedConfig.model_validate(published | {"file": "official.pt"}), spec)
    assert card.layouts_in == card.layouts_out == ((tokens, width),) * positions


def test_leads_multiply_the_tokens_of_hubert_ecg() -> None:
    spec = window("ECG", ("II",), 100, 3000)
    asked = {"model": "hubert-ecg", "size": "small", "file": "x.pt", "options": {"leads": "repeat"}}
    # 36,000 samples through strides of 64 in all: (36000 - 82) // 64 + 1.
    assert published_card(PublishedConfig.model_validate(asked), spec).layouts_in[0] == (562, 512)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("encoders.new.folder=somewhere", "published and folder each name the encoder"),
        ("encoders.new.architecture={width: 16}", "published names the encoder: leave out the keys of a compact one"),
        ("encoders.old.supervised.steps=3", "(supervised)"),
        ("encoders.new.published.size=null", "comes in sizes: give size as one of small, base, large"),
        ("encoders.new.published.size=huge", "encoders.new.published.size"),
        ("encoders.old.published.size=base", "labram has one size alone"),
        ("encoders.old.published.model=bert", "encoders.old.published.model"),
        ("encoders.old.published.options={electrodes: on}", "LaBraM-base has no option 'electrodes'"),
        ("encoders.old.published.options={time_embedding: stretched}", "can't be 'stretched'"),
        ("encoders.old.published.fil=x", "did you mean"),
        ("encoders.old.head={folder: heads, epochs: 3}", "leave the settings of its fit out"),
        ("encoders.old.head.learning_rate=0", "encoders.old.head.learning_rate"),
        ("encoders.old.published=null", "a compact encoder is trained with its head"),
    ],
)
def test_a_wrong_origin_is_told(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of("isruc_eeg2ecg", override)
    assert told in str(caught.value)


def test_yamls_on_and_off_are_words_of_the_options() -> None:
    options = config_of("isruc_eeg2ecg", "encoders.old.published.options={electrode_embedding: off}").encoders.old
    assert options.published is not None
    assert options.published.options == {"electrode_embedding": "off"}


def test_files_and_folders_are_relative_to_the_configuration() -> None:
    base = ROOT / "weights"
    old = config_of("isruc_eeg2ecg").encoders.old
    assert old.published is not None
    assert old.published.file == base / "labram-base.pth"
    ready = ("encoders.old.published=null", "encoders.old.folder=../eeg", "encoders.old.head={folder: ../head}")
    old = config_of("isruc_eeg2ecg", *ready).encoders.old
    assert (old.folder, old.head and old.head.folder) == (ROOT / "eeg", ROOT / "head")


@pytest.mark.parametrize(
    ("overrides", "error", "told"),
    [
        # A model of another modality, windows that it can't cut, a folder that is not there.
        (["encoders.old.published={model: papagei, file: x}"], WindowError, "can't read EEG windows"),
        (["encoders.old.published=null", "encoders.old.folder=nowhere"], FedbridgeError, "no complete model folder"),
    ],
)
def test_a_plan_tells_what_does_not_fit(overrides: list[str], error: type[FedbridgeError], told: str) -> None:
    from simulations.plan import plan

    with pytest.raises(error, match=told):
        plan(config_of("isruc_eeg2ecg", *overrides))

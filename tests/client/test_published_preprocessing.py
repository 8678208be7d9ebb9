"""The published models' own steps against the numbers of their authors' code, and what they leave as it was."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from bridge.encoders.cards import EncoderCard, seal
from bridge.encoders.recipes import ECG_FM, HUBERT_ECG, LABRAM, NORMWEAR, PAPAGEI, RECIPES
from bridge.windows import ChebyshevBandpass, FirBandpass, Preprocessing, Resampling, WindowSpec
from client.errors import RecordingError
from client.labels import LabelSource
from client.preprocessing import finish_windows, prepare_run
from client.site import InputFormat
from client.windowing import cut

from .files import noise, recording, site_file

RECIPE_OF = {"hubertecg": HUBERT_ECG, "ecgfm": ECG_FM, "papagei": PAPAGEI, "labram": LABRAM, "normwear": NORMWEAR}
CASES = (
    "hubertecg_isruc", "hubertecg_wesad", "ecgfm_isruc", "ecgfm_wesad",
    "papagei_wesad", "labram_fog", "normwear_fog", "constant_lead",
)  # fmt: skip
TOLERANCE = 1e-4


def raw_of(oracle: Path, recipe: dict[str, Any]) -> np.ndarray:
    spec = importlib.util.spec_from_file_location("oracle_fill", oracle / "oracle_fill.py")
    assert spec is not None
    assert spec.loader is not None
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    x = fill.make_signal(recipe["tag"], tuple(recipe["shape"]), recipe["amplitude"])
    assert fill.tensor_sha256(x) == recipe["sha256"]
    return np.asarray(x.numpy())


def prepared(raw: np.ndarray, rate: float, target: float, steps: Preprocessing) -> np.ndarray:
    """A recording `(channels, n)` as one window, or epochs `(n, channels, samples)` as a window each."""
    if raw.ndim == 3:
        by_epoch = steps.by_window()
        return finish_windows(np.stack([prepare_run(epoch, rate, target, by_epoch) for epoch in raw]), by_epoch)
    run = prepare_run(raw, rate, target, steps)
    return finish_windows(run[None], steps, run)[0]


@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_authors_steps(oracle: Path, name: str) -> None:
    facts = json.loads((oracle / "preprocessing.json").read_text())[name]
    with np.load(oracle / "preprocessing.npz") as file:
        want = file[name]
    raw = raw_of(oracle, facts["input"])
    steps = RECIPE_OF.get(name.split("_")[0], ECG_FM)
    found = prepared(np.atleast_2d(raw), facts["input"]["rate_hz"], facts["rate_out_hz"], steps)
    found = found.reshape(facts["output_shape"]) / np.float32(steps.scale)
    assert np.abs(found - want).max() <= TOLERANCE * want.std()


def test_linear_resampling_lays_the_ends_onto_each_other() -> None:
    steps = Preprocessing(stages=(Resampling(method="linear"),), normalise="none")
    x = np.array([[0.0, 1.0, 4.0, 9.0, 16.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    # int(5 * 70 / 40) = 8 samples, at 0, 4/7, 8/7, ... of the old ones
    found = prepare_run(x, 40, 70, steps)
    assert np.allclose(found[0], [0, 4 / 7, 1 + 3 / 7, 1 + 3 * 5 / 7, 4 + 5 * 2 / 7, 4 + 5 * 6 / 7, 9 + 3, 16])
    assert np.array_equal(found[1], np.full(8, 5.0))
    assert np.array_equal(prepare_run(x, 40, 40, steps), x)
    assert prepare_run(x[:, :1], 40, 10, steps).tolist() == [[0.0], [5.0]]


def test_fourier_resampling_keeps_a_whole_number_of_waves() -> None:
    steps = Preprocessing(stages=(Resampling(method="fourier", rate_hz=125),), normalise="none")
    wave = np.cos(2 * np.pi * 3 * np.arange(64) / 64)[None]
    assert np.allclose(prepare_run(wave, 64, 125, steps)[0], np.cos(2 * np.pi * 3 * np.arange(125) / 125), atol=1e-12)


def test_stages_run_in_their_order_and_end_at_the_windows_rate() -> None:
    stages = (Resampling(method="linear", rate_hz=200), ChebyshevBandpass(order=2, ripple_db=1, band_hz=(1, 90)))
    steps = Preprocessing(stages=stages, normalise="none")
    x = noise(4, 100, 0)
    assert prepare_run(x, 100, 50, steps).shape == (1, 200)
    with pytest.raises(RecordingError, match=r"a filter at 90 Hz does not fit a recording at 100 Hz"):
        prepare_run(x, 100, 50, Preprocessing(stages=stages[::-1], normalise="none"))
    with pytest.raises(RecordingError, match=r"a filter at 30 Hz does not fit a recording at 50 Hz"):
        prepare_run(x, 50, 50, Preprocessing(stages=(FirBandpass(taps=11, band_hz=(1, 30)),)))


@pytest.mark.parametrize("steps", RECIPES.values())
def test_a_run_of_a_few_samples_is_prepared_without_error(steps: Preprocessing) -> None:
    found = prepare_run(np.arange(10.0)[None], 250, 125, steps)
    assert np.isfinite(found).all()
    assert found.shape[1] >= 1


def test_windows_may_be_prepared_each_by_itself() -> None:
    ecg, ppg = noise(8, 100, 1), noise(8, 40, 2)
    steps = HUBERT_ECG.by_window()
    spec = WindowSpec(modality="ECG", channels=("I",), rate_hz=100, samples=200)
    signals = recording(8, ecg=ecg, ppg=ppg)
    form = InputFormat(window=spec, preprocessing=steps)
    found = cut(signals, site_file(), {"old": form}, LabelSource("none", {}))
    assert len(found.starts) == 7
    for start, window in zip(found.starts, found.signals["old"], strict=True):
        alone = prepare_run(ecg[:, round(start * 100) : round(start * 100) + 200], 100, 100, steps)
        assert np.array_equal(window, finish_windows(alone[None], steps)[0])
    whole = cut(
        signals, site_file(), {"old": InputFormat(window=spec, preprocessing=HUBERT_ECG)}, LabelSource("none", {})
    )
    run = prepare_run(ecg, 100, 100, HUBERT_ECG)
    assert np.array_equal(whole.signals["old"][2], finish_windows(run[None, :, 200:400], HUBERT_ECG, run)[0])


def test_the_last_window_is_held_where_the_recording_ends_within_a_sample_of_it() -> None:
    # 129 samples at 64.3 Hz are 2.006 s, 201 samples at 100 Hz; of the last window there are 200, which make 128.
    spec = WindowSpec(modality="ECG", channels=("I",), rate_hz=64.3, samples=129)
    form = InputFormat(window=spec, preprocessing=LABRAM.by_window())
    found = cut(recording(8), site_file(), {"old": form}, LabelSource("none", {})).signals["old"]
    assert found.shape == (7, 1, 129)
    assert (found[:, 0, 128] == found[:, 0, 127]).tolist() == [False] * 6 + [True]


OLD_KEYS = {
    "scale": 1.0, "bandpass_hz": [0.5, 40.0], "filter_order": 2,
    "notch_hz": 50.0, "normalise": "recording", "clip": 8.0,
}  # fmt: skip


def card(steps: Preprocessing) -> EncoderCard:
    spec = WindowSpec(modality="ECG", channels=("II",), rate_hz=125, samples=1250)
    layouts = ((50, 64),)
    return seal(
        EncoderCard(
            family="compact",
            window=spec,
            preprocessing=steps,
            layouts_in=layouts,
            layouts_out=layouts,
            parameters=1,
            weights_sha256="0" * 64,
        )
    )


def test_cards_and_keys_from_before_there_were_stages_stay_the_same() -> None:
    steps = Preprocessing.model_validate(OLD_KEYS)
    assert list(steps.model_dump(mode="json").items()) == list(OLD_KEYS.items())
    assert card(steps).digest == "53c8e8e9ddecf9197dfe7c0b2c9ee1d4d4b1daf18be697e08b31b1e8dae4c6f3"


def test_stages_are_part_of_a_card_and_come_back_from_it() -> None:
    digests = set()
    for steps in (Preprocessing(), *RECIPES.values(), *(each.by_window() for each in RECIPES.values())):
        sealed = card(steps)
        assert EncoderCard.model_validate_json(sealed.model_dump_json(by_alias=True)) == sealed
        digests.add(sealed.digest)
    # ECG-FM's and NormWear's steps are the same
    assert len(digests) == 1 + 2 * 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stages": [{"step": "resample", "method": "linear"}], "notch_hz": 50}, "or leave stages out"),
        ({"stages": [{"step": "fir_bandpass", "taps": 11, "band_hz": [8, 2]}]}, "0 < low < high"),
        ({"stages": [{"step": "wavelet"}]}, "does not match any of the expected tags"),
        ({"stages": [{"step": "resample", "method": "cubic"}]}, "'linear' or 'fourier'"),
        ({"over": "window", "normalise": "recording"}, "can't be normalised by the recording"),
    ],
)
def test_steps_that_can_not_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Preprocessing.model_validate(settings)

"""Models that are not trained here: converted, ready, with heads fitted on public patients; all of it once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.encoders.published import published_model
from bridge.errors import ConfigError, WeightsError
from bridge.hashing import sha256_file
from bridge.head import TaskHead, save_head
from bridge.windows import Preprocessing, WindowSpec
from simulations.config import SimulationConfig, load_simulation
from simulations.made_up.checkpoints import write_checkpoint
from simulations.made_up.recordings import write_recordings
from simulations.models.layouts import planned_card
from simulations.models.make import make_models, make_new, make_old
from simulations.models.reading import public_windows
from simulations.models.signals import signals_of
from simulations.prepare import load_source, prepare, read_job
from simulations.source import Source
from simulations.split import Split, split_patients
from tests.conftest import ROOT
from tests.simulations.studies import tiny

CLASSES = ("rest", "stress", "arrhythmia")


@dataclass
class Place:
    """An own old encoder, an official file of the new one, and a cache of their own."""

    folder: Path
    cache: Path
    source: Source
    split: Split

    def config(self, *overrides: str) -> SimulationConfig:
        return tiny(
            *("encoders.old={head: {epochs: 2, learning_rate: 0.01}}", f"encoders.old.folder={self.folder / 'ecg'}"),
            f"encoders.new={{published: {{model: papagei, file: {self.folder / 'papagei_s.pt'}}}}}",
            *overrides,
        )


def own_encoder(folder: Path, seed: int, samples: int = 500) -> EncoderCard:
    window = WindowSpec(modality="ECG", channels=("ECG",), rate_hz=50, samples=samples)
    torch.manual_seed(seed)
    encoder = CompactEncoder(window, CompactArchitecture(width=16, blocks=3, heads=2, tokens=10))
    return save_encoder(folder, encoder.state_dict(), encoder.card(Preprocessing(), {"data": "none: random"}))


@pytest.fixture(scope="module")
def place(session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder, cache = tmp_path_factory.mktemp("official"), tmp_path_factory.mktemp("own-cache")
    own_encoder(folder / "ecg", seed=1)
    write_checkpoint("papagei", folder / "papagei_s.pt")
    source = load_source(tiny().data, lambda what, done, total: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDBRIDGE_CACHE", str(cache))
        yield Place(folder, cache, source, split_patients(source, tiny().split))


def entries(place: Place) -> set[str]:
    return {path.name for path in (place.cache / "models").iterdir()} if (place.cache / "models").is_dir() else set()


def test_a_study_of_ready_and_published_models_is_prepared(place: Place, tmp_path: Path) -> None:
    config = place.config()
    seen: list[str] = []
    out = make_models(config, place.source, place.split, tmp_path / "models", lambda what, *_: seen.append(what))
    assert {path.name for path in out.iterdir()} == {"old_encoder", "new_encoder", "task_head"}
    old, new = (read_card(out / name, EncoderCard) for name in ("old_encoder", "new_encoder"))
    head = read_card(out / "task_head", HeadCard)
    assert old == read_card(place.folder / "ecg", EncoderCard)
    assert (head.old_encoder, head.classes, head.width) == (old.digest, CLASSES, 16)
    assert head.training["data"] == place.source.description
    assert (head.training["public_patients"], head.training["public"]) == (6, True)
    assert head.training["sentence"].startswith("balanced accuracy ")
    assert head.training["settings"]["epochs"] == 2
    assert (new.family, new.window.samples, new.window.rate_hz) == ("papagei", 1250, 125)
    assert new.training["source_sha256"] == sha256_file(place.folder / "papagei_s.pt")
    # The plan knew the layouts without the file.
    signals = signals_of(config.data)
    planned = planned_card(config.encoders.new, signals.new, signals.seconds)
    assert (planned.layouts_in, planned.layouts_out) == (new.layouts_in, new.layouts_out)
    assert "task head" in seen

    # The second time all comes from the cache, into a whole study.
    before = entries(place)
    seen.clear()
    study = prepare(config, tmp_path / "study", progress=lambda what, *_: seen.append(what))
    assert "task head" not in seen
    assert entries(place) == before
    models = read_job(study).models
    assert (models.old_encoder, models.new_encoder, models.task_head) == (old.digest, new.digest, head.digest)


def test_either_modality_is_made_alone(place: Place, tmp_path: Path) -> None:
    config = place.config()
    encoder, head = make_old(config, place.source, place.split, tmp_path / "old")
    assert {path.name for path in (tmp_path / "old").iterdir()} == {"old_encoder", "task_head"}
    assert head.old_encoder == encoder.digest
    card = make_new(config, place.source, place.split, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["new_encoder"]
    assert card.training["model"] == "PaPaGei-S"


@pytest.mark.slow
def test_a_compact_encoder_goes_with_a_published_one(place: Place, tmp_path: Path) -> None:
    config = tiny(f"encoders.new={{published: {{model: papagei, file: {place.folder / 'papagei_s.pt'}}}}}")
    out = make_models(config, place.source, place.split, tmp_path / "models")
    old, head = read_card(out / "old_encoder", EncoderCard), read_card(out / "task_head", HeadCard)
    assert (old.family, head.old_encoder) == ("compact", old.digest)
    assert not (out / "public_vectors.safetensors").exists()


def test_the_whole_encoder_may_be_trained_with_its_head(place: Place, tmp_path: Path) -> None:
    encoder, head = make_old(
        place.config("encoders.old.head={train: whole, epochs: 1}"), place.source, place.split, tmp_path / "old"
    )
    given = read_card(place.folder / "ecg", EncoderCard)
    assert encoder.digest != given.digest
    assert head.old_encoder == encoder.digest
    assert encoder.training["trained_from"] == given.digest
    assert (encoder.window, encoder.preprocessing) == (given.window, given.preprocessing)


def test_public_vectors_are_made_where_the_bridge_asks_for_them_and_only_those(place: Place, tmp_path: Path) -> None:
    fixed = "selection={mode: fixed, input_position: 1, output_position: 2}"
    config = place.config(fixed, "bridge={rank: 4, prototypes: 8, initialisation: public, whitening: public}")
    out = make_models(config, place.source, place.split, tmp_path / "models")
    vectors = load_file(out / "public_vectors.safetensors")
    each = {f"{kind}.{position}" for kind in ("mean", "covariance") for position in range(18)}
    assert set(vectors) == {"in.2", *each}
    assert vectors["in.2"].shape == (128, 16)
    windows = public_windows(place.source, place.split.public_new, config, "new")
    with torch.no_grad():
        pooled = load_encoder(out / "new_encoder").taps(torch.from_numpy(windows.x)).outputs[17].double().numpy()
    by_patient = [pooled[windows.patients == name].mean(0) for name in np.unique(windows.patients)]
    np.testing.assert_allclose(vectors["mean.17"], np.mean(by_patient, axis=0), rtol=1e-3, atol=1e-4)

    tokens = place.config("bridge={rank: 4, prototypes: 8, initialisation: directions}")
    vectors = load_file(
        make_models(tokens, place.source, place.split, tmp_path / "more") / "public_vectors.safetensors"
    )
    # The position is still to be selected.
    assert set(vectors) == {"tokens.0", "tokens.1", "tokens.2"}
    assert vectors["tokens.1"].shape[1:] == (10, 16)


def ready_head(folder: Path, digest: str, classes: tuple[str, ...] = CLASSES) -> Path:
    torch.manual_seed(3)
    save_head(folder, TaskHead(16, len(classes)), classes=classes, old_encoder=digest, training={"data": "elsewhere"})
    return folder


def test_a_ready_head_is_taken_as_it_is(place: Place, tmp_path: Path) -> None:
    card = read_card(place.folder / "ecg", EncoderCard)
    head = ready_head(tmp_path / "head", card.digest)
    config = place.config(f"encoders.old.head={{folder: {head}}}")
    before = entries(place)
    assert make_old(config, place.source, place.split, tmp_path / "old") == (card, read_card(head, HeadCard))
    assert entries(place) == before


@pytest.mark.parametrize(
    ("digest", "classes", "told"),
    [
        ("0" * 64, CLASSES, "not a head of the old encoder"),
        ("", ("rest", "arrhythmia", "stress"), "a head for other classes"),
    ],
)
def test_a_head_of_another_encoder_or_of_other_classes_is_refused(
    place: Place, tmp_path: Path, digest: str, classes: tuple[str, ...], told: str
) -> None:
    own = read_card(place.folder / "ecg", EncoderCard).digest
    head = ready_head(tmp_path / "head", digest or own, classes)
    with pytest.raises(ConfigError, match=told):
        make_old(place.config(f"encoders.old.head={{folder: {head}}}"), place.source, place.split, tmp_path / "old")
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize("trouble", ["missing", "a folder", "cut short", "another model's", "unreadable card"])
def test_a_file_that_does_not_serve_leaves_nothing_behind(place: Place, tmp_path: Path, trouble: str) -> None:
    official, folder = tmp_path / "official.pt", tmp_path / "ecg"
    shutil.copytree(place.folder / "ecg", folder)
    content = (place.folder / "papagei_s.pt").read_bytes()
    if trouble == "a folder":
        official.mkdir()
    elif trouble == "cut short":
        official.write_bytes(content[: len(content) // 2])
    elif trouble == "another model's":
        torch.save({"first_block_conv.conv.weight": torch.zeros(32, 1, 3)}, official)
    elif trouble == "unreadable card":
        official.write_bytes(content)
        (folder / "card.json").write_text("{}")
    config = place.config(f"encoders.new.published.file={official}", f"encoders.old.folder={folder}")
    before = entries(place)
    with pytest.raises(WeightsError) as caught:
        make_models(config, place.source, place.split, tmp_path / "models")
    assert (str(folder) if trouble == "unreadable card" else str(official)) in str(caught.value) or trouble.startswith(
        "another"
    )
    assert caught.value.fix
    assert not (tmp_path / "models").exists()
    # The old encoder's head may have been fitted before; nothing of the file was kept.
    assert {name for name in entries(place) - before if name.startswith(".")} == set()


def test_a_folder_that_reads_other_windows_is_refused(place: Place, tmp_path: Path) -> None:
    own_encoder(tmp_path / "short", seed=1, samples=250)
    with pytest.raises(ConfigError, match="does not read what the recordings have") as caught:
        make_old(place.config(f"encoders.old.folder={tmp_path / 'short'}"), place.source, place.split, tmp_path / "x")
    assert "5 s of ECG" in str(caught.value)


@pytest.mark.slow
def test_a_file_of_another_size_is_refused(place: Place, tmp_path: Path) -> None:
    write_checkpoint("hubert-ecg", tmp_path / "hubert_ecg_small.pt", "small")
    asked = f"{{model: hubert-ecg, size: base, file: {tmp_path / 'hubert_ecg_small.pt'}}}"
    config = tiny(f"encoders.old={{published: {asked}}}")
    before = entries(place)
    with pytest.raises(ConfigError, match="not the size 'base' of HuBERT-ECG") as caught:
        make_old(config, place.source, place.split, tmp_path / "old")
    assert "8 positions of width 512; base has 12 of width 768" in str(caught.value)
    assert entries(place) == before
    right = tiny(f"encoders.old={{published: {asked.replace('base', 'small')}, head: {{epochs: 1}}}}")
    card, head = make_old(right, place.source, place.split, tmp_path / "old")
    assert card.parameters == published_model("hubert-ecg").parameters["small"]
    assert head.training["commercial_use"] == "forbidden"


def test_what_a_plan_takes_for_the_sources_signals_is_what_they_have(place: Place) -> None:
    signals = signals_of(tiny().data)
    assert (signals.old, signals.new) == (place.source.old, place.source.new)
    assert signals.seconds == place.source.window_seconds


@pytest.mark.parametrize("name", ["isruc_eeg2ecg", "isruc_ecg2eeg", "wesad_ecg2ppg", "fog_emg2eeg"])
def test_so_are_those_of_the_published_sets(tmp_path: Path, name: str) -> None:
    data = load_simulation(ROOT / "configs" / f"{name}.yaml").data
    section = getattr(data, data.source).model_copy(update={"folder": tmp_path})
    data = data.model_copy(update={data.source: section})
    write_recordings(data, tmp_path, patients=1, windows=1, seed=0)
    source = load_source(data, lambda what, done, total: None)
    signals = signals_of(data)
    assert (signals.old, signals.new, signals.seconds) == (source.old, source.new, source.window_seconds)

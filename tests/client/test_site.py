"""The site file: keys, errors that help, splits, and what is checked when a site is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.errors import ExitCode
from bridge.messages import ReasonCode
from client.errors import ModelsError, NoWindowsError, RecordingError, SiteFileError
from client.site import open_site
from client.site_file import SplitsSection, write_site_file

from .files import site_file, write_npz
from .sites import build_models, build_site


def written(folder: Path, **changes: Any) -> Path:
    """A site file as a hospital's engineer would have typed it."""
    content = site_file().model_dump(mode="json", by_alias=True, exclude_defaults=True)
    content = {key: value for key, value in {**content, **changes}.items() if value is not ...}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sites": "x"}, "unknown key 'sites', did you mean 'site'"),
        ({"window": {"seconds": 2, "step": 1}}, "unknown key 'window.step', did you mean 'step_seconds'"),
        ({"quality": {"flat_shar": 0.1}}, "did you mean 'flat_share'"),
        ({"cache": {"max_gigabyte": 1}}, "did you mean 'max_gigabytes'"),
        ({"window": ...}, "key 'window' is missing"),
        ({"window": {"seconds": 0, "step_seconds": 1}}, r"window.seconds(.|\n)*greater than 0(.|\n)*found 0"),
        ({"site": "a b"}, "key 'site'(.|\n)*leaves the site"),
        ({"site": "a\n"}, "key 'site'(.|\n)*leaves the site"),
        ({"old": {"modality": "EOG", "channels": ["x"], "rate_hz": 1}}, r"old.modality(.|\n)*'ECG', 'PPG'"),
        ({"new": {"modality": "ECG", "channels": ["x"], "rate_hz": 1}}, "both ECG"),
        ({"old": None, "new": None}, "one of 'old' and 'new' is needed"),
        ({"labels": {"source": "recording"}}, "at least 2 classes"),
        ({"labels": {"source": "csv", "classes": ["a", "b"]}}, "labels.path is needed"),
        ({"labels": {"unlabelled": "reject"}}, "needs a source of labels"),
        ({"splits": {"pair": ["a"], "test": ["a"], "validation": []}}, "a patient must be in one split"),
        ({"splits": {"pair": ["a"], "test": 0.3}}, "all lists or all fractions"),
        ({"splits": {"pair": 0.8, "test": 0.3}}, "sum to more than 1"),
        ({"schema": "fedbridge.site/2"}, "fedbridge.site/1"),
    ],
)
def test_a_wrong_site_file_names_file_key_and_remedy(tmp_path: Path, changes: dict, text: str) -> None:
    with pytest.raises(SiteFileError, match=text) as caught:
        open_site(written(tmp_path, **changes))
    assert str(tmp_path / "site.yaml") in str(caught.value)
    assert caught.value.exit_code == ExitCode.CONFIG
    assert caught.value.reason == ReasonCode.SITE_MISCONFIGURED


def test_no_site_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(SiteFileError, match=r"site.yaml: can't be read"):
        open_site(tmp_path)
    (tmp_path / "site.yaml").write_text("site: [unclosed")
    with pytest.raises(SiteFileError, match=r"line \d+ is not valid YAML"):
        open_site(tmp_path)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a", policy="p.yaml", cache={"folder": "/var/cache/x"})
    monkeypatch.chdir(tmp_path)
    for path in (Path("a"), Path("a/site.yaml"), tmp_path / "a"):
        site = open_site(path)
        assert (site.name, site.folder) == ("north", tmp_path / "a")
        assert site.policy_path == tmp_path / "a" / "p.yaml"
        assert site.audit_path == tmp_path / "a" / "audit.jsonl"
        assert site.log_path == tmp_path / "a" / "site.log"
        assert site.cache_folder == Path("/var/cache/x")
    assert open_site(written(tmp_path / "b")).policy_path is None


def test_a_written_site_file_is_read_back_equal(tmp_path: Path) -> None:
    file = site_file(
        labels={"source": "csv", "path": "labels.csv", "classes": ["a", "b"], "coverage": 0.9},
        splits={"pair": ["1", "x"], "validation": [], "test": ["007"]},
        models={"old_encoder": "m/o", "new_encoder": "m/n", "task_head": "/m/h"},
        exclude=["bad*.npz"],
    )
    write_site_file(tmp_path / "site.yaml", file)
    assert open_site(tmp_path).file == file


def test_unquoted_numbers_are_patients_too(tmp_path: Path) -> None:
    splits = open_site(written(tmp_path, splits={"pair": [1, 20], "validation": [], "test": ["3"]})).file.splits
    assert [splits.of(patient) for patient in ("1", "20", "3", "4")] == ["pair", "pair", "test", None]
    assert splits.listed == {"1", "20", "3"}


def test_fractions_divide_patients_for_good() -> None:
    patients = [f"patient {number}" for number in range(4000)]
    splits = SplitsSection(pair=0.5, validation=0.2, test=0.2)
    found = [splits.of(patient) for patient in patients]
    shares = [found.count(split) / 4000 for split in ("pair", "validation", "test", None)]
    assert np.allclose(shares, [0.5, 0.2, 0.2, 0.1], atol=0.025)
    assert found == [SplitsSection(pair=0.5, validation=0.2, test=0.2).of(patient) for patient in patients]
    other = [SplitsSection(pair=0.5, validation=0.2, test=0.2, key="k").of(patient) for patient in patients]
    assert np.mean([a == b for a, b in zip(found, other, strict=True)]) < 0.45
    # whoever is in the pairs stays there when only the rest is divided anew
    wider = SplitsSection(pair=0.6, validation=0.0, test=0.4)
    assert all(wider.of(p) == "pair" for p, split in zip(patients, found, strict=True) if split == "pair")


def test_files_excludes_and_refuses_double_names(tmp_path: Path) -> None:
    site = open_site(written(tmp_path, exclude=["b*.npz"]))
    with pytest.raises(SiteFileError, match="no such folder"):
        site.files()
    (tmp_path / "recordings").mkdir()
    with pytest.raises(NoWindowsError, match=r"no recordings(.|\n)*finds 0"):
        site.files()
    for name in ("a", "b1", "b2"):
        write_npz(tmp_path / "recordings", name)
    found, excluded = site.all_files()
    assert [path.name for path in found] == ["a.npz"]
    assert [path.name for path in excluded] == ["b1.npz", "b2.npz"]
    write_npz(tmp_path / "recordings" / "more", "a")
    with pytest.raises(RecordingError, match="the first is 'a'"):
        site.files()


def test_wrong_reader_options_are_the_site_files_fault(tmp_path: Path) -> None:
    with pytest.raises(SiteFileError, match=r"no reader 'dicom'"):
        _ = open_site(written(tmp_path, reader={"name": "dicom"})).reader
    options = {"signals": {"ECG": {"array": "E", "rates": 1, "channels": ["x"]}}}
    site = open_site(written(tmp_path, reader={"options": options}))
    with pytest.raises(SiteFileError, match=r"site.yaml(.|\n)*unknown key 'signals.ECG.rates', did you mean 'rate'"):
        _ = site.reader


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build_models(folder / "models")
    build_models(folder / "others", seed=1)
    return folder


def test_cards_are_those_of_the_model_folders(place: Path) -> None:
    site = open_site(build_site(place / "good", "good", patients=4))
    assert site.old_card == read_card(place / "models" / "old_encoder", EncoderCard)
    assert site.new_card == read_card(place / "models" / "new_encoder", EncoderCard)
    assert site.head_card == read_card(place / "models" / "task_head", HeadCard)


@pytest.mark.parametrize(
    ("card", "changes", "text"),
    [
        ("old_card", {"models": None}, "names no models"),
        ("old_card", {"window": {"seconds": 5, "step_seconds": 5}}, r"windows of 4 s, the site file cuts 5 s"),
        (
            "old_card",
            {"old": {"modality": "ECG", "channels": ["II"], "rate_hz": 64}},
            r"reads the channel\(s\) I; the site file lists II",
        ),
        ("new_card", {"new": {"modality": "EEG", "channels": ["P"], "rate_hz": 32}}, "reads PPG(.|\n)*'new' is EEG"),
        ("head_card", {"labels": {"source": "recording", "classes": ["fast", "slow"]}}, "not the task head's classes"),
        ("new_card", {"new": None}, "has no key 'new'"),
    ],
)
def test_models_that_do_not_fit_the_site_file(place: Path, card: str, changes: dict, text: str) -> None:
    folder = place / f"misfit-{len(list(place.iterdir()))}"
    site = open_site(build_site(folder, "x", patients=4, models=place / "models", changes=changes))
    with pytest.raises((ModelsError, SiteFileError), match=text):
        getattr(site, card)


def test_damaged_and_mixed_models_are_refused(place: Path, tmp_path: Path) -> None:
    models = build_models(tmp_path / "models")
    folder = build_site(tmp_path / "a", "a", patients=4)
    weights = models / "old_encoder" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ModelsError, match="not the weights that the card describes") as caught:
        _ = open_site(folder).old_card
    assert caught.value.reason == ReasonCode.WEIGHTS_MISSING
    mixed = {
        "old_encoder": str(place / "others" / "old_encoder"),
        "new_encoder": str(place / "models" / "new_encoder"),
        "task_head": str(place / "models" / "task_head"),
    }
    site = open_site(build_site(tmp_path / "b", "b", patients=4, changes={"models": mixed}))
    with pytest.raises(ModelsError, match="fitted on another old encoder"):
        _ = site.head_card

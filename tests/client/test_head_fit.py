"""`fedbridge-site head fit`: on the pair patients alone, only where the policy allows it, named in log and cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.encoders.loading import load_encoder
from bridge.errors import ConfigError, SelectionError, WeightsStorageError
from bridge.head import load_head
from bridge.head_fit import HeadSettings
from client.audit import AuditLog
from client.errors import AuditError, ModelsError, PolicyError, SiteFileError
from client.forget import forget
from client.head_fit import SiteFit, fit_site_head
from client.site import open_site
from client.windowing import windows_of
from tests.client.disk import read_only
from tests.client.sites import CLASSES, Small, build_site
from tests.client.test_cli import run

ALLOWED: dict[str, Any] = {"fit_head": True}
QUICK = HeadSettings(epochs=3, learning_rate=0.05)
WHOLE = HeadSettings(epochs=1, train="whole")


def site_at(small: Small, folder: Path, policy: dict[str, Any] = ALLOWED, **keys: Any) -> Path:
    """Twenty patients, ten of them for pairs, as long as `keys` do not say otherwise."""
    return build_site(folder, "north", models=small.models, policy=policy, **keys)


def fit(site: Path, out: Path, settings: HeadSettings = QUICK) -> SiteFit:
    return fit_site_head(open_site(site), out, settings)


def test_the_head_is_of_the_pair_patients(small: Small, tmp_path: Path) -> None:
    site = site_at(small, tmp_path / "s")
    found = fit(site, tmp_path / "out")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["task_head"]
    card = read_card(tmp_path / "out" / "task_head", HeadCard)
    assert card == found.head
    assert card.classes == CLASSES
    assert card.old_encoder == read_card(small.models / "old_encoder", EncoderCard).digest
    assert (found.fitted.patients, found.fitted.windows) == (10, 120)  # 48 s in 4 s windows
    windows = windows_of(open_site(site), "pair", roles=("old",))
    assert windows.old is not None
    pooled = load_encoder(small.models / "old_encoder").taps(torch.from_numpy(windows.old)).outputs[-1]
    right = load_head(tmp_path / "out" / "task_head")(pooled).argmax(1).numpy() == windows.table.labels
    assert right.mean() > 0.9


def test_validation_and_test_patients_are_never_used(small: Small, tmp_path: Path) -> None:
    """Other recordings of theirs make no difference, to the last bit."""
    a, b = (site_at(small, tmp_path / name) for name in ("a", "b"))
    pair = {f"north-p{i:02d}" for i in range(10)}
    for path in (b / "recordings").glob("*.npz"):
        if path.stem not in pair:
            with np.load(path) as file:
                content = dict(file)
            content["label"] = 1 - content["label"]
            np.savez(path, **content)
    assert fit(a, tmp_path / "out-a").head.digest == fit(b, tmp_path / "out-b").head.digest


def test_who_withdrew_is_left_out(small: Small, tmp_path: Path) -> None:
    site, without = site_at(small, tmp_path / "s"), site_at(small, tmp_path / "t")
    (without / "recordings" / "north-p03.npz").unlink()
    forget(open_site(site), "north-p03")
    found, expected = fit(site, tmp_path / "out"), fit(without, tmp_path / "other")
    assert (found.withdrawn, expected.withdrawn) == (1, 0)
    assert found.head.digest == expected.head.digest
    assert found.head.training["private_patients"] == 9


@pytest.mark.parametrize("settings", [QUICK, WHOLE], ids=["head", "whole"])
def test_cards_and_log_say_on_whom_it_was_fitted(small: Small, tmp_path: Path, settings: HeadSettings) -> None:
    site = site_at(small, tmp_path / "s")
    found = fit(site, tmp_path / "out", settings)
    written = {"task_head": found.head}
    if settings.train == "whole":
        written = {"old_encoder": found.encoder, **written}  # type: ignore[dict-item]
        assert found.encoder.training["trained_from"] == read_card(small.models / "old_encoder", EncoderCard).digest
        assert load_encoder(tmp_path / "out" / "old_encoder").digest == found.encoder.digest
    for card in written.values():
        assert card.training["fitted_on"] == "patients of north"
        assert card.training["privacy"] == "none: fitted on patients without a privacy mechanism"
        assert (card.training["public"], card.training["private_patients"]) == (False, 10)
        assert "public_patients" not in card.training
    entries = [line.entry for line in AuditLog(site / "audit.jsonl").verify()]
    assert [(each.event, each.item, each.sha256) for each in entries] == [
        ("fitted", name, card.digest) for name, card in written.items()
    ]
    for each in entries:
        weights = tmp_path / "out" / each.item / "weights.safetensors"
        assert each.bytes == weights.stat().st_size
        assert "10 patients" in each.purpose
        assert "without a privacy mechanism" in each.purpose


@pytest.mark.parametrize(("group", "shown"), [(3, False), (2, True)])
def test_metrics_of_a_small_group_and_counts_of_windows_stay(
    small: Small, tmp_path: Path, group: int, shown: bool
) -> None:
    """Two of ten patients are held back (0.25 of them, halves to even)."""
    site = site_at(small, tmp_path / "s", {**ALLOWED, "minimum_group": group})
    training = fit(site, tmp_path / "out").head.training
    assert training["held_back_patients"] == 2
    assert ("sentence" in training) == ("held_back_balanced_accuracy" in training) == shown
    assert not {"windows", "windows_by_class"} & set(training)


@pytest.mark.parametrize("policy", [{}, {"fit_head": False}, None])
def test_without_the_policys_word_nothing_is_read(small: Small, tmp_path: Path, policy: dict[str, Any] | None) -> None:
    site = build_site(tmp_path / "s", "north", models=small.models, policy=policy)
    shutil.rmtree(site / "recordings")
    with pytest.raises(PolicyError, match="no task head may be fitted") as caught:
        fit(site, tmp_path / "out")
    assert caught.value.reason.name == "POLICY_FORBIDS"
    assert not (tmp_path / "out").exists()
    assert not (site / "audit.jsonl").exists()


def _few(small: Small, folder: Path) -> Path:
    return site_at(small, folder, patients=8)


def _one(small: Small, folder: Path) -> Path:
    return site_at(small, folder, {**ALLOWED, "minimum_patients": 1}, patients=2)


def _no_labels(small: Small, folder: Path) -> Path:
    return site_at(small, folder, labels=False)


def _labels_elsewhere(small: Small, folder: Path) -> Path:
    """A label file that names no recording of theirs."""
    site = site_at(small, folder, changes={"labels": {"source": "csv", "path": "l.csv", "classes": list(CLASSES)}})
    (site / "l.csv").write_text("recording,start_seconds,end_seconds,label\nother,0,48,slow\n")
    return site


def _one_class(small: Small, folder: Path) -> Path:
    site = site_at(small, folder)
    for path in (site / "recordings").glob("*.npz"):
        with np.load(path) as file:
            content = dict(file)
        content["label"][:] = 1
        np.savez(path, **content)
    return site


def _no_model(small: Small, folder: Path) -> Path:
    models = {key: str(folder / "models" / key) for key in ("old_encoder", "new_encoder", "task_head")}
    return site_at(small, folder, changes={"models": models})


def _damaged_model(small: Small, folder: Path) -> Path:
    site = _no_model(small, folder)
    shutil.copytree(small.models, folder / "models")
    weights = folder / "models" / "old_encoder" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return site


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (_few, PolicyError, "4 patient"),
        (_one, SelectionError, "too few patients"),
        (_no_labels, SiteFileError, "names no labels"),
        (_labels_elsewhere, PolicyError, "0 patient"),
        (_one_class, SelectionError, "the training patients lack a class"),
        (_no_model, ModelsError, "no complete model folder"),
        (_damaged_model, ModelsError, "not the weights that the card describes"),
    ],
)
def test_bad_sites_are_refused(
    small: Small, tmp_path: Path, make: Callable[[Small, Path], Path], error: type[Exception], words: str
) -> None:
    site = make(small, tmp_path / "s")
    with pytest.raises(error, match=words):
        fit(site, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["s"]
    assert not (site / "audit.jsonl").exists()


def test_nothing_is_overwritten(small: Small, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        fit(site_at(small, tmp_path / "s"), tmp_path / "out")


def test_nothing_is_handed_out_that_can_not_be_logged(small: Small, tmp_path: Path) -> None:
    site = site_at(small, tmp_path / "s")
    (site / "audit.jsonl").mkdir()
    with pytest.raises(AuditError):
        fit(site, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["s"]


def test_a_place_that_can_not_be_written(small: Small, tmp_path: Path) -> None:
    site, shut = site_at(small, tmp_path / "s"), tmp_path / "shut"
    shut.mkdir()
    with read_only(shut), pytest.raises(WeightsStorageError, match="can't be written"):
        fit(site, shut / "out")
    assert not (site / "audit.jsonl").exists()


def test_the_command(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, settings = site_at(small, tmp_path / "s"), tmp_path / "head.yaml"
    settings.write_text("epochs: 2\nclass_weights: [1, 2]\n")
    words = ("head", "fit", site, "--out", tmp_path / "out", "--settings", settings, "--set", "learning_rate=0.1")
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 0
    card = read_card(tmp_path / "out" / "task_head", HeadCard)
    assert card.training["settings"] == HeadSettings(epochs=2, class_weights=(1, 2), learning_rate=0.1).model_dump(
        mode="json"
    )
    assert f"{tmp_path / 'out'}: fitted on 10 patients of this site" in out
    assert "too few patients to tell" in out
    assert f"digest of the head:            {card.digest}" in out
    assert "no privacy mechanism protects them" in out
    assert "task head: 2 of 2" in err
    code, out, _ = run(capsys, monkeypatch, "audit", "show", site)
    assert (code, f"task_head {card.digest[:16]}..." in out) == (0, True)
    code, _, err = run(capsys, monkeypatch, *words)
    assert (code, "exists already" in err) == (2, True)
    code, out, _ = run(capsys, monkeypatch, "policy", "show", site)
    assert yaml.safe_load(out)["fit_head"] is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "epoch=3"), "did you mean 'epochs'"),
        (("--set", "epochs"), "write KEY=VALUE"),
        (("--set", "epochs=[1"), "is not valid YAML"),
        (("--set", "class_weights=[1, 2, 3]"), "class_weights has 3 weights"),
        (("--settings", "none.yaml"), "can't be read"),
        (("--settings", "list.yaml"), "holds no keys"),
    ],
)
def test_bad_settings_of_the_command(
    small: Small,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text(json.dumps([1]))
    code, _, err = run(capsys, monkeypatch, "head", "fit", site_at(small, tmp_path / "s"), "--out", "out", *words)
    assert (code, said in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_without_the_policy(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_at(small, tmp_path / "s", {})
    code, _, err = run(capsys, monkeypatch, "head", "fit", site, "--out", tmp_path / "out")
    assert (code, "set fit_head: true if the hospital agrees" in err) == (5, True)

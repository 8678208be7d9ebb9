"""`fedbridge-sim head fit`: from a configuration to two folders that another configuration can name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.encoders.loading import load_encoder
from bridge.head import load_head
from simulations import cli
from tests.simulations.studies import SMOKE, TINY

COMPACT = [part for override in TINY for part in ("--set", override)]
READY = [part for override in TINY if not override.startswith("encoders.old") for part in ("--set", override)]


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(each) for each in arguments])
    return int(ended.value.code or 0)


def old(encoder: Path, **head: Any) -> list[str]:
    """An old encoder in a folder, and how its head is fitted."""
    return ["--set", "encoders.old=" + yaml.safe_dump({"folder": str(encoder), "head": head}, default_flow_style=True)]


def test_what_it_writes_can_be_named_by_a_configuration(
    session_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert call("head", "fit", SMOKE, *COMPACT, "--out", first, "--quiet") == 0
    told = capsys.readouterr()
    compact = read_card(first / "old_encoder", EncoderCard)
    assert (told.err, f"digest of the old encoder: {compact.digest}" in told.out) == ("", True)
    assert f"balanced accuracy {compact.training['held_back_balanced_accuracy']:.3f} on held-back" in told.out

    fit = old(first / "old_encoder", train="whole", epochs=2)
    assert call("head", "fit", SMOKE, *READY, *fit, "--out", second, "--quiet") == 0
    trained, head = read_card(second / "old_encoder", EncoderCard), read_card(second / "task_head", HeadCard)
    assert trained.digest != compact.digest == trained.training["trained_from"]
    assert (trained.training["public_patients"], head.training["public_patients"]) == (6, 6)
    assert head.old_encoder == trained.digest == load_encoder(second / "old_encoder").digest
    assert not load_head(second / "task_head").training
    assert f"  {head.training['sentence']}\n" in capsys.readouterr().out

    ready = old(second / "old_encoder", folder=str(second / "task_head"))
    assert call("head", "fit", SMOKE, *READY, *ready, "--out", third, "--quiet") == 0
    assert read_card(third / "task_head", HeadCard) == head
    assert (
        call(
            "head",
            "fit",
            SMOKE,
            *READY,
            *old(first / "old_encoder", folder=str(second / "task_head")),
            "--out",
            tmp_path / "fourth",
        )
        == 2
    )
    assert "not a head of the old encoder" in capsys.readouterr().err
    assert not (tmp_path / "fourth").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept").write_text("content")
    assert call("head", "fit", SMOKE, "--out", tmp_path / "kept") == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "kept").read_text() == "content"


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("encoders.old={folder: none}", 4, "no complete model folder"),
        ("encoders.old={folder: none, head: {epoch: 1}}", 2, "did you mean 'epochs'"),
    ],
)
def test_bad_configurations(
    change: str, code: int, said: str, session_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("head", "fit", SMOKE, *READY, "--set", change, "--out", tmp_path / "out") == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

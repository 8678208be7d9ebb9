"""The `flwr` command: what it answers is read, whatever its exit code, and it never sees the caller's folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from bridge.errors import ServiceError
from server.flower_command import FlowerCommand, words


def program(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> FlowerCommand:
    """A FlowerCommand whose `flwr` is a script of ours: for answers that the real one gives only sometimes."""
    path = folder / "bin" / "flwr"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("sys.executable", str(path.parent / "python"))
    return FlowerCommand(folder / "home", {"OWN": "mine"})


def test_the_real_command_says_in_json_that_nobody_answers(tmp_path: Path) -> None:
    flower = FlowerCommand(tmp_path / "home", {})
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:9"\ninsecure = true\n'
    )
    answer = flower.ask("list", "here")
    assert answer["success"] is False
    assert "127.0.0.1:9" in str(answer) or "connect" in words(answer).lower()
    unknown = flower.ask("list", "nowhere")
    assert not unknown.get("success")
    assert "nowhere" in words(unknown)


def test_it_runs_in_an_empty_folder_with_an_own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "client").mkdir()
    told = program(tmp_path, 'echo "$PWD"; ls -A; echo "$FLWR_HOME $OWN $FLWR_TELEMETRY_ENABLED"', monkeypatch).call(
        "x"
    )
    assert told.stdout.splitlines() == [str(tmp_path / "home" / "empty"), f"{tmp_path / 'home'} mine 0"]


def test_an_answer_after_other_lines_and_an_answer_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """case $1 in
    noisy) echo "a note"; echo '{"success": true, "run-id": "7"}';;
    words) echo "first" >&2; echo "it broke" >&2; exit 3;;
    list) echo '[1]';;
    esac"""
    flower = program(tmp_path, text, monkeypatch)
    assert flower.ask("noisy") == {"success": True, "run-id": "7"}
    assert flower.ask("words") == {"error-message": "it broke"}
    assert flower.ask("list") == {"error-message": "[1]"}
    assert flower.ask("silent") == {"error-message": "no answer"}
    assert words({"error-message": "a note\n\nthe reason"}) == "the reason"


def test_a_missing_command_and_a_home_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(ServiceError, match="could not be run") as caught:
        FlowerCommand(tmp_path / "home", {}).call("list")
    assert str(tmp_path / "home") in caught.value.why
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere" / "python"))
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ServiceError, match="`flwr` is not installed"):
        FlowerCommand(tmp_path / "other", {}).call("list")


def test_a_command_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.flower_command.ANSWER_SECONDS", 0.3)
    with pytest.raises(ServiceError, match="`flwr run` did not answer"):
        program(tmp_path, "exec sleep 60", monkeypatch).call("run")

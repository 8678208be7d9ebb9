from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from client.cli import main
from client.policy import Policy
from tests.client.sites import PERMISSIVE, Small, ask, build_job, build_site, start_arrays, train_config


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `fedbridge-site WORDS`."""
    monkeypatch.setattr(sys, "argv", ["fedbridge-site", *map(str, words)])
    try:
        main()
        code: object = 0
    except SystemExit as exit_:
        code = exit_.code or 0
    out, err = capsys.readouterr()
    assert isinstance(code, int)
    return code, out, err


@pytest.fixture
def asked(small: Small, tmp_path: Path) -> Path:
    """A site that has accepted a study, answered two rounds and refused one message."""
    site = build_site(tmp_path / "s", "beta", models=small.models, policy=PERMISSIVE)
    for round_ in (1, 2):
        ask(site, build_job(small.models), "train", train_config(round_), start_arrays())
    ask(site, build_job(small.models), "train", train_config(9), start_arrays())
    return site


def test_audit_show_sums_up_what_left(
    asked: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, "audit", "show", asked)
    assert code == 0
    rows = {words[1]: words[2:4] for words in (line.split() for line in out.splitlines()) if words[0] == "7"}
    sizes = {"update.A": 16 * 2 * 4, "update.B": 2 * 8 * 4 * 4, "update.P": 4 * 16 * 4, "weight": 8, "train_loss": 8}
    assert rows == {item: ["2", f"{2 * size:,}"] for item, size in sizes.items()}
    assert "1 message(s) were answered by a reason code alone" in out
    code, out, _ = run(capsys, monkeypatch, "audit", "show", asked, "--lines")
    assert len(out.splitlines()) == 12
    assert "round 2" in out
    assert "answered by MESSAGE_INVALID alone" in out
    assert "nothing has left" in run(capsys, monkeypatch, "audit", "show", asked, "--run", "8")[1]


def test_audit_verify(asked: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "audit", "verify", asked / "site.yaml")
    assert code == 0
    assert "12 entries" in out
    log = asked / "audit.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4] + lines[5:]))
    code, out, err = run(capsys, monkeypatch, "audit", "verify", asked)
    assert code == 7
    assert out == ""
    assert "line 5 " in err
    assert "Traceback" not in err


def test_policy_show_and_template(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = build_site(tmp_path / "bare", "bare", models=small.models, policy=None)
    code, out, _ = run(capsys, monkeypatch, "policy", "show", bare)
    assert code == 0
    assert "the strictest defaults hold" in out
    assert Policy.model_validate(yaml.safe_load(out)) == Policy()
    assert "never leaves: probe_moments, similarity_moments, closed_form_moments, train_loss, confusion.bridge" in out
    code, out, _ = run(capsys, monkeypatch, "policy", "show", small.site)
    assert Policy.model_validate(yaml.safe_load(out)) == Policy.model_validate(PERMISSIVE)
    code, out, _ = run(capsys, monkeypatch, "policy", "template", "--site", "north")
    assert Policy.model_validate(yaml.safe_load(out)) == Policy(site="north")


@pytest.mark.parametrize("command", [("audit", "show"), ("audit", "verify"), ("policy", "show"), ("check",)])
def test_errors_are_told_without_a_traceback(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, monkeypatch, *command, tmp_path / "site.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Why: " in err
    assert "What to do: " in err
    assert "Traceback" not in err


def test_an_unknown_key_names_the_closest(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, policy={"max_round": 3})
    code, _, err = run(capsys, monkeypatch, "policy", "show", site)
    assert code == 2
    assert "unknown key 'max_round', did you mean 'max_rounds'?" in err


def test_check_reads_the_site_and_draws(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "windows.png"
    code, out, _ = run(capsys, monkeypatch, "check", small.site, "--picture", picture)
    assert code == 0
    assert "alpha" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_predict_with_something_that_is_no_bridge(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, "predict", tmp_path, small.site, "--out", tmp_path / "p.csv")
    assert code == 7
    assert "manifest.json" in err
    assert not (tmp_path / "p.csv").exists()


def test_usage_errors_exit_with_two(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(capsys, monkeypatch, "audit", "shwo", "x")[0] == 2
    assert run(capsys, monkeypatch, "predict")[0] == 2


def test_help_explains_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, monkeypatch, "--help")
    assert code == 0
    assert {"check", "predict", "audit", "policy"} <= set(re.findall(r"\b\w+\b", out))
    for words in (["check"], ["predict"], ["audit", "show"], ["audit", "verify"], ["policy", "show"]):
        code, out, _ = run(capsys, monkeypatch, *words, "--help")
        assert code == 0
        assert "SITE.yaml" in out
        assert len(out) > 400

"""fedbridge-server as a command: what it prints, what it writes, how it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.console import run_app
from server.cli import app
from server.record import schema_text
from tests.server import runs

Ended = tuple[int, str, str]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> Ended:
        with pytest.raises(SystemExit) as ended:
            run_app(app, [str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_report_writes_beside_the_run_and_prints_the_path(command: Callable[..., Ended], tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "run", runs.completed())
    assert command("report", folder) == (0, f"{folder / 'report.html'}\n", "")
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    other = tmp_path / "other.html"
    assert command("report", folder, "--out", other) == (0, f"{other}\n", "")
    assert other.read_bytes() == (folder / "report.html").read_bytes()


def test_a_folder_without_a_run_is_refused_in_three_parts(command: Callable[..., Ended], tmp_path: Path) -> None:
    code, printed, error = command("report", tmp_path)
    assert (code, printed) == (7, "")
    assert error.splitlines() == [
        f"error: {tmp_path / 'run.json'}: can't be read",
        "Why: No such file or directory",
        "What to do: name the folder of a run (it holds run.json)",
    ]


def test_compare_prints_a_table_and_writes_what_is_asked_for(command: Callable[..., Ended], tmp_path: Path) -> None:
    folders = [runs.write_run(tmp_path / f"seed-{seed}", runs.completed(seed)) for seed in range(2)]
    folders.append(runs.write_run(tmp_path / "broken", runs.failed_early()))
    page, table = tmp_path / "compare.html", tmp_path / "compare.csv"
    code, printed, error = command("compare", *folders, "--out", page, "--csv", table)
    assert (code, error) == (0, "")
    for words in (
        "seed-0",
        "0.73–0.80",
        "Mean of 2 seeds",
        "Where the configurations differ",
        "scores: 3 → 3",
        "6.15 MB",
    ):
        assert words in printed
    assert "broken: 1 of at least 3 sites" in printed
    assert page.is_file()
    assert len(table.read_text(encoding="utf-8").splitlines()) == 4


def test_compare_refuses_the_same_run_twice(command: Callable[..., Ended], tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path, runs.completed())
    code, _, error = command("compare", folder, folder)
    assert code == 2
    assert error.startswith("error: the same run folder is named twice")


def test_schema_prints_the_published_schema(command: Callable[..., Ended]) -> None:
    assert command("schema") == (0, schema_text(), "")


def test_an_unknown_option_is_a_usage_error(command: Callable[..., Ended], tmp_path: Path) -> None:
    code, _, error = command("report", tmp_path, "--ouput", "x")
    assert code == 2
    assert "--ouput" in error


def test_a_defect_keeps_its_traceback() -> None:
    import typer

    broken = typer.Typer(pretty_exceptions_enable=False)

    @broken.command()
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_app(broken, [])


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from server.cli import main\n"
        "sys.argv = ['fedbridge-server', '--help']\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'flwr', 'matplotlib', 'jinja2', 'sklearn', 'scipy', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "compare" in done.stdout

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from simulations.cli_rehearse import register

SITE = str(Path(sys.executable).with_name("fedbridge-site"))

WITHOUT_SIMULATION = """
import sys
for name in ("ray", "neurokit2", "flwr.simulation"):
    sys.modules[name] = None
import server.app, simulations.rehearse.run, simulations.rehearse.message_process, simulations.rehearse.workers
import simulations.local_grid
from client.cli import main
sys.argv = ["fedbridge-site", "rehearse", "--help"]
main()
"""


def test_the_site_command_has_it_by_its_entry_point() -> None:
    done = subprocess.run([SITE, "rehearse", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "STUDY.zip" in done.stdout


def test_it_needs_nothing_that_only_simulations_need() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_SIMULATION], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "STUDY.zip" in done.stdout


def test_every_parameter_is_explained() -> None:
    app = typer.Typer()
    register(app)
    command = typer.main.get_command(app)
    assert command.help
    assert all(getattr(parameter, "help", None) for parameter in command.params if parameter.name != "help")


def test_registering_it_loads_nothing_heavy() -> None:
    heavy = ("flwr", "numpy", "pydantic", "torch", "yaml")
    code = f"import sys, simulations.cli_rehearse; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_absent_study_is_an_error_of_three_lines_and_not_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run([SITE, "rehearse", "absent.zip"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 5
    assert done.stderr.startswith("error: absent.zip: can't be read\n")
    assert list(tmp_path.iterdir()) == []

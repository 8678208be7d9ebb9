"""What the three console commands share: help for everything, the versions, and how they end."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
import typer

import client.cli
import server.cli
import simulations.cli

APPS = {"fedbridge-site": client.cli.app, "fedbridge-server": server.cli.app, "fedbridge-sim": simulations.cli.app}


def commands(command: click.Command, name: str) -> list[tuple[str, click.Command]]:
    found = [(name, command)]
    for key, inner in getattr(command, "commands", {}).items():
        found += commands(inner, f"{name} {key}")
    return found


@pytest.mark.parametrize("name", APPS)
def test_every_command_and_every_parameter_is_explained(name: str) -> None:
    found = commands(typer.main.get_command(APPS[name]), name)
    assert len(found) > 2
    for path, command in found:
        assert command.help, path
        for parameter in command.params:
            help_ = getattr(parameter, "help", None)
            assert help_, f"{path}: {parameter.name} has no help text (with click 8.5, typer 0.20 loses it)"


@pytest.mark.parametrize("name", APPS)
def test_the_versions_are_told(name: str) -> None:
    done = subprocess.run([Path(sys.executable).with_name(name), "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"fedbridge {version('fedbridge')}, Flower {version('flwr')}, Python 3.")


@pytest.mark.parametrize("name", APPS)
def test_a_wrong_option_is_a_usage_error(name: str) -> None:
    done = subprocess.run([Path(sys.executable).with_name(name), "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--nonsense" in done.stderr

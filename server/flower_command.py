"""The `flwr` command with an own home, asked for JSON, from an empty folder.

Its exit code says little: 0 where a run failed, and with `--format json` 0 even where nothing was started. So what it
answers is read (`success`, `error-message`). And what it starts imports from the folder in which it was called: that
one is empty.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.errors import ServiceError
from bridge.services import flower_environment

ANSWER_SECONDS = 120.0


class FlowerCommand:
    """`flwr` with `home` as its FLWR_HOME, run in `home/empty`; `environment` is added to the process's own."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self._empty = home / "empty"
        # What `flwr` starts (superexec, ServerApp) is called by its bare name.
        binaries = Path(sys.executable).parent
        self._command = shutil.which("flwr", path=str(binaries)) or shutil.which("flwr")
        self._environment = {
            **flower_environment(home),
            "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
            **environment,
        }

    def ask(self, *arguments: str) -> dict[str, Any]:
        """The JSON object that a command answers; what it printed instead comes under `error-message`.

        Raises `ServiceError` as `call` does.
        """
        done = self.call(*arguments, "--format", "json")
        told = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return _last_json(done.stdout) or {"error-message": told[-1].strip() if told else "no answer"}

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and return what it printed, whatever its exit code.

        Raises `ServiceError` where the command is not installed, its home can't be written, or it does not end.
        """
        if self._command is None:
            raise ServiceError("the command `flwr` is not installed", fix="pip install fedbridge again")
        try:
            self._empty.mkdir(parents=True, exist_ok=True)
            return subprocess.run(
                [self._command, *arguments],
                cwd=self._empty,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=ANSWER_SECONDS,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise ServiceError(
                f"`flwr {arguments[0]}` did not answer within {ANSWER_SECONDS:.0f} s", fix="try again"
            ) from error
        except OSError as error:
            raise ServiceError(
                f"`flwr {arguments[0]}` could not be run",
                why=f"{error.strerror or error}: {error.filename or self._command}",
                fix="correct the permissions or free space there",
            ) from error


def words(answer: Mapping[str, Any]) -> str:
    """Flower's own words for a failure: the last paragraph, after its notes on what it is about to do."""
    return str(answer.get("error-message") or dict(answer)).strip().rpartition("\n\n")[2]


def _last_json(text: str) -> dict[str, Any]:
    """The JSON object that `flwr ... --format json` printed, possibly after other lines."""
    start = text.find("{")
    try:
        value = json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}

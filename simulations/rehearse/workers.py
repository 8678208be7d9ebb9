"""Processes that compute messages, seen from the rehearsal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message

from simulations.errors import EngineError
from simulations.rehearse.envelope import read_reply, write_question


@dataclass(frozen=True)
class Cost:
    """Of a process: seconds from its start until it could begin to compute, and until the reply was there; and the most
    bytes of memory that it held."""

    ready: float
    seconds: float
    peak_bytes: int


class Worker:
    """One process (`message_process`), started when it is made. Its files lie in `folder`, its stderr in `log`."""

    def __init__(self, folder: Path, log: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        # -P: a folder named `client` where the command was given must not be taken for ours.
        command = [sys.executable, "-P", "-m", "simulations.rehearse.message_process"]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **environment},
                cwd=folder,
                # Ctrl-C is the rehearsal's to handle: it ends this process itself.
                start_new_session=True,
            )

    def ask(self, message: Message, context: Context) -> tuple[Message, Cost]:
        """The reply, and what the process has cost so far. Raises `EngineError` where it has died."""
        question, reply = self._folder / "question.zip", self._folder / "reply.zip"
        write_question(question, message, context)
        try:
            line = self._exchange(json.dumps([str(question), str(reply)]) + "\n")
            if not line:
                raise self._died(message.metadata.message_type)
            return read_reply(reply), Cost(*json.loads(line))
        finally:
            question.unlink(missing_ok=True)
            reply.unlink(missing_ok=True)

    def end(self) -> None:
        """End the process; it keeps nothing that would be lost."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _exchange(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except (OSError, ValueError):
            return ""

    def _died(self, message: str) -> EngineError:
        code = self._process.wait()
        signal = f"signal {-code}" if code < 0 else f"exit code {code}"
        why = "the machine ran out of memory, perhaps" if code == -9 else "see its last words above"
        return EngineError(
            f"the process that computed '{message}' died ({signal})",
            why=why,
            fix="free memory, or correct what it said, and rehearse again",
        )


class Workers:
    """A fresh process for each message of the site as it is, as deployed; one process for all other pretend sites,
    whose cost nobody asks for."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._others: Worker | None = None
        self._running: set[Worker] = set()
        self._lock = threading.Lock()
        self._ended = False

    def ask_fresh(self, message: Message, context: Context) -> tuple[Message, Cost]:
        """As `Worker.ask`, of a process that answers this message alone."""
        worker = self._start("own")
        try:
            return worker.ask(message, context)
        finally:
            self._end(worker)

    def ask_other(self, message: Message, context: Context) -> Message:
        """The reply of a process that answers many."""
        if self._others is None:
            self._others = self._start("others")
        return self._others.ask(message, context)[0]

    def end(self) -> None:
        """End all processes, also one that computes; none is started after that."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        for worker in running:
            self._end(worker)

    def last_words(self) -> str:
        """What the processes printed on stderr last, at most a few lines."""
        text = ""
        for path in sorted(self._folder.glob("*.stderr")):
            text += path.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.strip().splitlines()[-5:])

    def _start(self, name: str) -> Worker:
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if self._ended:
                raise EngineError("the rehearsal has ended", why="no message is computed any more")
            worker = Worker(folder, self._folder / f"{name}.stderr", self._environment)
            self._running.add(worker)
        return worker

    def _end(self, worker: Worker) -> None:
        worker.end()
        with self._lock:
            self._running.discard(worker)

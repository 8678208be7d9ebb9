"""How a task's process ends before its time: at once, and without a word to the SuperNode.

Flower's own way, when its executor dies or it is told to end, is to report the task as over. A SuperNode that hears so
without having got a reply waits for that reply for ever, and takes no other message. One that hears nothing more gives
the task up after about a minute, answers with an error, and goes on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

EXECUTOR_VARIABLE = "FEDBRIDGE_EXECUTOR"
"""Environment: the executor's process id, set by it."""

_POLL_SECONDS = 0.5


def end_with_executor() -> None:
    """From now on, kill this process as soon as the executor that started it is gone."""
    executor = int(os.environ.pop(EXECUTOR_VARIABLE, "0"))
    threading.Thread(target=_watch, args=(executor,), daemon=True).start()


def die_of_signals(register: Callable[..., None]) -> Callable[..., None]:
    """Flower's registration of what is done at an exit, but for what it does on signals: those end the process."""

    def registered(*arguments: Any, **options: Any) -> None:
        register(*arguments, **options)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)

    return registered


def _watch(executor: int) -> None:
    while os.getppid() == executor:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)

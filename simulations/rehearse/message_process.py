"""The process in which messages are computed: what a deployed site starts for each message, without the network.

Reads lines `[question, reply]` (JSON, two paths) from stdin, answers each question into its reply, and prints
`[ready, seconds, peak]`: how long this process had lived when it could begin to compute and when the reply was written,
and the most memory that it held. It ends with its stdin, whatever it is doing: nobody waits for it then.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from importlib import import_module
from pathlib import Path

_DEPLOYED = ("flwr.supernode.cli.flwr_clientapp", "client.deployment.clientapp", "client.study.acceptance", "torch")
"""What a deployed message's process imports, so that this one costs as much."""


def main() -> None:
    """Answer until stdin ends."""
    for each in _DEPLOYED:
        import_module(each)
    from flwr.supercore.task_identity import TaskIdentity

    from bridge.installation import check_installation
    from client.app import app
    from client.effort import peak_bytes, seconds_since_start
    from simulations.rehearse.envelope import read_question, write_reply

    check_installation()

    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    ready = seconds_since_start()
    while True:
        question, reply = map(Path, json.loads(lines.get()))
        message, context = read_question(question)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, context.run_id, context.node_id
        write_reply(reply, app(message, context))
        print(json.dumps([ready, seconds_since_start(), peak_bytes()]), flush=True)  # noqa: T201


def _listen(lines: queue.Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()

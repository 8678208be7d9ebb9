"""The coordinator's executor: Flower's superexec, held to ServerApps.

It asks the SuperLink (127.0.0.1, TLS, with the shared secret) for runs and starts one process for each; where it dies,
its runs end with it. A SuperLink can start one by itself, but not a second time, and then asks nobody for a secret.
"""

from __future__ import annotations

import os
import sys

from bridge.flower_names import flower_module
from bridge.installation import check_installation
from server.coordinator import superlink
from server.coordinator.folder import CoordinatorFolder


def run_executor(folder: CoordinatorFolder) -> None:
    """Start the runs that the SuperLink has, until ended. Raises `CodeError` where this Flower is another."""
    check_installation()
    constant = flower_module("flwr.supercore.constant", ("TaskType",))
    plugin = flower_module("flwr.supercore.superexec.plugin", ("AutoExecPlugin",)).AutoExecPlugin
    command = flower_module("flwr.supercore.cli.flower_superexec", ("flower_superexec",)).flower_superexec
    # A SuperLink also knows agents, connectors and models.
    plugin.supported_task_types = frozenset({constant.TaskType.SERVER_APP})
    os.environ |= superlink.environment(folder)
    superlink.enter_empty(folder)
    sys.argv = ["fedbridge-executor", "--runtime-api-address", folder.superlink_address]
    sys.argv += ["--root-certificates", str(folder.ca_certificate)]
    sys.argv += ["--superexec-auth-secret-file", str(folder.executor_secret)]
    command()

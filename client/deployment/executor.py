"""The pinned executor: Flower's superexec, held to ClientApp tasks and to this installation's own command for them.

It asks the site's SuperNode (127.0.0.1, with the shared secret) for tasks and starts one fresh process for each. No
task of another type is asked for, and none would be started: a SuperNode also knows agents, connectors and models.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from bridge.flower_names import flower_module, replace_names
from bridge.installation import check_installation
from client.deployment.abrupt import EXECUTOR_VARIABLE
from client.deployment.clientapp import SITE_VARIABLE, TOKEN_VARIABLE
from client.deployment.keys import executor_secret
from client.deployment.places import enter
from client.site import Site

CLIENTAPP = (sys.executable, "-P", "-m", "client.deployment.clientapp")
"""What runs a task. -P: a `client` folder in the working directory is none of ours."""

POLL_SECONDS = "0.2"


def run_executor(site: Site) -> None:
    """Work off the SuperNode's tasks until ended. Raises `CodeError`, and `EnrolmentError` for a secret that isn't."""
    check_installation()
    secret = executor_secret(site)
    enter(site)
    os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = POLL_SECONDS
    os.environ[SITE_VARIABLE] = str(site.path)
    command = pinned_superexec()
    address = f"127.0.0.1:{site.file.deployment.port}"
    # No TLS on this leg: it does not leave the machine, and both ends prove that they hold the secret.
    sys.argv = ["fedbridge-executor", "--insecure", "--runtime-api-address", address]
    sys.argv += ["--superexec-auth-secret-file", str(secret)]
    command()


def pinned_superexec() -> Any:
    """Flower's `flower_superexec()`, held to what this module says. Raises `CodeError` where this Flower is another."""
    constant = flower_module("flwr.supercore.constant", ("TaskType",))
    plugin = flower_module("flwr.supercore.superexec.plugin", ("AutoExecPlugin",)).AutoExecPlugin
    loop = flower_module("flwr.supercore.superexec.run_superexec", ("run_superexec", "AutoExecPlugin"))
    command = flower_module("flwr.supercore.cli.flower_superexec", ("flower_superexec", "run_superexec"))
    replace_names(loop, "run_superexec", {"get_executor": lambda *_, **__: PinnedExecutor()})
    plugin.supported_task_types = frozenset({constant.TaskType.CLIENT_APP})
    return command.flower_superexec


class PinnedExecutor:
    """Starts ClientApp tasks as processes of this installation; what Flower calls an Executor."""

    def get_eligible_capacity(self, supported_task_types: set[Any], **_: Any) -> tuple[set[Any], set[str]]:
        """Only ClientApps, whatever else might be supported."""
        return {each for each in supported_task_types if _is_client_app(each)}, set()

    def launch(self, spec: Any) -> Any:
        """Start the process of one task. Its token travels by the environment: command lines are for all to read."""
        types = flower_module("flwr.supercore.superexec.executor.types", ("LaunchResult",))
        if not _is_client_app(spec.task_type):
            return types.LaunchResult.failed(f"tasks of type {spec.task_type} are not run here")
        command = [*CLIENTAPP, "--runtime-api-address", spec.runtime_api_address, "--insecure"]
        environment = {**os.environ, TOKEN_VARIABLE: spec.token, EXECUTOR_VARIABLE: str(os.getpid())}
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        return types.LaunchResult.accepted()

    def reconcile(self) -> None:
        """Nothing is kept between tasks."""

    def close(self) -> None:
        """Nothing to release."""


def _is_client_app(task_type: Any) -> bool:
    from flwr.supercore.constant import TaskType

    return bool(task_type == TaskType.CLIENT_APP)

"""The door that sites come through: nginx, which forwards Flower's fleet calls to the SuperLink and nothing else.

Flower's SuperLink serves three interfaces on one port and authenticates only that of the sites, so it listens on
127.0.0.1 and nginx decides what gets there. TLS on both legs: Flower's node authentication asks for it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from bridge.errors import ServiceError
from bridge.processes import ProcessId, process_id, signal_process
from server.coordinator.folder import CoordinatorFolder, bracketed
from server.coordinator.templates import fill

FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""What a SuperNode with a key calls below /v1/fleet/. Flower has two more, `register-node` and `unregister-node`, by
which nodes without one enrol themselves: they stay shut."""
HEADERS = (
    "Content-Type",
    "Accept",
    "User-Agent",
    "flwr-public-key",
    "flwr-signature",
    "flwr-timestamp",
    "flwr-package-name",
    "flwr-package-version",
    "flwr-component-name",
)
"""What a SuperNode sends and the SuperLink reads."""
_TEST_SECONDS = 30


def configuration(folder: CoordinatorFolder) -> str:
    """The text of `nginx/nginx.conf`."""
    settings = folder.settings
    return fill(
        "nginx.conf.j2",
        name=" ".join(settings.name.split()),
        calls=FLEET_CALLS,
        headers=HEADERS,
        prefix=folder.nginx,
        keys=folder.keys,
        listen=[bracketed(each) for each in settings.listen],
        port=settings.port,
        superlink=folder.superlink_address,
        body_megabytes=settings.body_megabytes,
    )


def program() -> str | None:
    """Where nginx is installed, also where it is on an administrator's path alone; None where it is not."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/sbin")


def command(folder: CoordinatorFolder) -> tuple[str, ...]:
    """nginx in the foreground. Raises `ServiceError` where it is not installed."""
    found = program()
    if found is None:
        raise ServiceError(
            "nginx is not installed", fix="install it: apt install nginx-light, or your system's package"
        )
    return (
        found,
        "-p",
        str(folder.nginx),
        "-e",
        str(folder.nginx / "error.log"),
        "-c",
        str(folder.nginx_configuration),
    )


def check_configuration(folder: CoordinatorFolder) -> None:
    """Let nginx read its configuration and keys. Raises `ServiceError` with its words where it refuses them."""
    try:
        done = subprocess.run(
            [*command(folder), "-t"], capture_output=True, text=True, timeout=_TEST_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError("nginx could not be asked about its configuration", why=str(error)) from error
    if done.returncode:
        raise ServiceError(
            f"nginx refuses {folder.nginx_configuration}",
            why=done.stderr.strip(),
            fix="correct what it names, or write the file anew: `fedbridge-server init` with --force",
        )


def processes(folder: CoordinatorFolder) -> list[ProcessId]:
    """nginx's live processes of this folder: those that work in it. Workers outlive a killed master with its port."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            ours = entry.name.isdigit() and (entry / "comm").read_text().strip() == "nginx"
            if ours and (entry / "cwd").readlink() == folder.nginx and (process := process_id(int(entry.name))):
                found.append(process)
        except OSError:
            continue
    return found


def reload(folder: CoordinatorFolder) -> bool:
    """Let a running nginx read configuration and certificate again, without a break; False where none runs."""
    masters = [each for each in processes(folder) if _is_master(folder, each)]
    for each in masters:
        try:
            signal_process(each, signal.SIGHUP)
        except PermissionError as error:
            raise ServiceError(
                "nginx could not be told to read its certificate again",
                why="it runs as another user",
                fix=f"kill -HUP {each.pid}, as that user",
            ) from error
    return bool(masters)


def become(folder: CoordinatorFolder) -> None:
    """Replace this process by nginx."""
    os.chdir(folder.nginx)
    found = command(folder)
    os.execv(found[0], found)


def _is_master(folder: CoordinatorFolder, process: ProcessId) -> bool:
    try:
        return int((folder.nginx / "nginx.pid").read_text()) == process.pid
    except (OSError, ValueError):
        return False

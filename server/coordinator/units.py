"""systemd units of the coordinator: SuperLink, executor and door, as an own user that may write its folder alone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from bridge.errors import ServiceError
from server.coordinator.folder import CoordinatorFolder
from server.coordinator.templates import fill

USER = "fedbridge"
SUPERLINK_UNIT, NGINX_UNIT = "fedbridge-superlink.service", "fedbridge-nginx.service"
EXECUTOR_UNIT = "fedbridge-executor.service"
_HOMES = ("/home/", "/root/", "/run/user/")


def unit_texts(folder: CoordinatorFolder) -> dict[str, str]:
    """The text of each unit, by its file's name."""
    program = own_command()
    in_home = any(str(path).startswith(_HOMES) for path in (folder.path, program))
    content = {
        "folder": folder.path,
        "program": program,
        "binaries": program.parent,
        "user": USER,
        "homes": "read-only" if in_home else "yes",
        "superlink_unit": SUPERLINK_UNIT,
        "low_port": folder.settings.port < 1024,
    }
    return {
        SUPERLINK_UNIT: fill("superlink.service.j2", **content),
        EXECUTOR_UNIT: fill("executor.service.j2", **content),
        NGINX_UNIT: fill("nginx.service.j2", **content),
    }


def own_command() -> Path:
    """Where `fedbridge-server` is installed. Raises `ServiceError` where it is not."""
    beside = Path(sys.executable).with_name("fedbridge-server")
    found = beside if beside.exists() else shutil.which("fedbridge-server")
    if found is None:
        raise ServiceError("the command fedbridge-server is not installed", fix="pip install fedbridge again")
    return Path(found).absolute()

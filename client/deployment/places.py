"""Where the site's part of Flower works, and what it must find there."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from bridge.config import load_model
from bridge.enrolment import CoordinatorFile
from bridge.errors import ConfigError, EnrolmentError, ServiceError
from bridge.files import cause, write_whole
from bridge.services import flower_environment
from client.site import Site

FLOWER_HOME, CA_FILE = "flower", "ca.pem"


def read_coordinator(path: Path) -> CoordinatorFile:
    """The coordinator's file. Raises `EnrolmentError`."""
    try:
        return load_model(path, CoordinatorFile)
    except ConfigError as error:
        raise EnrolmentError(
            error.what,
            why=error.why,
            fix="put the coordinator's file there: `fedbridge-site init DIR --coordinator FILE`",
        ) from error


def write_ca(site: Site, coordinator: CoordinatorFile) -> Path:
    """The file of the coordinator's certificate authority, in the state folder. Raises `ServiceError`."""
    path = make_state(site) / CA_FILE
    try:
        write_whole(path, coordinator.ca_certificate)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def make_state(site: Site) -> Path:
    """The state folder; made where it is not there. Raises `ServiceError`."""
    folder = site.state_folder
    try:
        (folder / FLOWER_HOME).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def service_environment(site: Site) -> dict[str, str]:
    """The environment of the site's services: Flower's settings, and no folder before the installed packages."""
    environment = {**flower_environment(site.state_folder / FLOWER_HOME), "PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONPATH", None)
    return environment


def enter(site: Site) -> None:
    """Make this process one of the site's services: its environment and, as working folder, the state folder."""
    folder = make_state(site)
    os.environ.update(service_environment(site))
    os.environ.pop("PYTHONPATH", None)
    os.chdir(folder)


def own_command() -> Path:
    """Where `fedbridge-site` is installed. Raises `ServiceError` where it is not."""
    beside = Path(sys.executable).with_name("fedbridge-site")
    found = beside if beside.exists() else shutil.which("fedbridge-site")
    if found is None:
        raise ServiceError("the command fedbridge-site is not installed", fix="pip install fedbridge again")
    return Path(found).absolute()


def _unwritable(path: Path, error: OSError) -> ServiceError:
    return ServiceError(
        f"{path}: can't be written", why=cause(error), fix="give the services' user write access to the site's folder"
    )

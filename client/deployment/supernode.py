"""The site's SuperNode: Flower's, told to run no code itself, to trust the coordinator's authority alone, and to talk
to the executor over loopback.

It holds the node's key and the connection, and never a recording: what runs on the data is the executor's.
"""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler

from bridge.errors import ServiceError
from bridge.flower_names import flower_module
from bridge.installation import check_installation
from client.deployment.in_step import keep_in_step
from client.deployment.keys import NODE_KEY, executor_secret, node_key
from client.deployment.places import enter, read_coordinator, write_ca
from client.site import Site

SUPERNODE_LOG = "supernode.log"
"""In the state folder, whoever started it: what Flower's SuperNode says."""

_LOG_BYTES = 2_000_000


def run_supernode(site: Site) -> None:
    """Hold the connection to the coordinator until ended.

    Raises `CodeError`, and `EnrolmentError` and `ServiceError` where a key, the coordinator's file or the state folder
    can't be used.
    """
    check_installation()
    arguments = supernode_arguments(site)
    enter(site)
    command = flower_module("flwr.supernode.cli.flower_supernode", ("flower_supernode",)).flower_supernode
    keep_in_step()
    _keep_log(site)
    sys.argv = ["fedbridge-supernode", *arguments]
    command()


def supernode_arguments(site: Site) -> list[str]:
    """Of `flower-supernode`. Raises `EnrolmentError` and `ServiceError`."""
    coordinator = read_coordinator(site.coordinator_path)
    node_key(site)
    secret = executor_secret(site)
    return [
        "--superlink",
        coordinator.address,
        "--root-certificates",
        str(write_ca(site, coordinator)),
        "--auth-supernode-private-key",
        str(site.keys_folder / NODE_KEY),
        # Without it the SuperNode starts Flower's own executor, which runs whatever code it is handed.
        "--isolation",
        "process",
        "--superexec-auth-secret-file",
        str(secret),
        "--host",
        "127.0.0.1",
        "--port",
        str(site.file.deployment.port),
        "--node-config",
        node_config(site),
    ]


def node_config(site: Site) -> str:
    """Flower's notation for `site=<path of the site file>`. Raises `ServiceError` where Flower can't take the path."""
    path = str(site.path)
    if path.isprintable() and "'" not in path:
        return f"site='{path}'"
    if path.isprintable() and '"' not in path and "\\" not in path:
        return f'site="{path}"'
    raise ServiceError(
        f"{path!r}: Flower can't take this path",
        why="it holds quotation marks of both kinds or control characters",
        fix="move the site's folder",
    )


def _keep_log(site: Site) -> None:
    """A copy of what Flower says, for `status`, in a file that stays small."""
    handler = RotatingFileHandler(site.state_folder / SUPERNODE_LOG, maxBytes=_LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.INFO)
    logging.getLogger("flwr").addHandler(handler)

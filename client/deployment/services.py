"""The site's two services without systemd: started, watched and ended by `bridge.services`."""

from __future__ import annotations

import os
import socket

from bridge import services
from bridge.errors import ServiceError
from bridge.installation import check_installation
from bridge.services import Service
from client.deployment.executor import pinned_superexec
from client.deployment.places import make_state, own_command, service_environment
from client.deployment.supernode import supernode_arguments
from client.site import Site

SUPERNODE, EXECUTOR = "supernode", "executor"


def start_site(site: Site) -> None:
    """Start SuperNode and executor, detached.

    Raises `CodeError`, `EnrolmentError` and `ServiceError` where what they need isn't there or is taken: better here
    than in the log of a service that ends again and again.
    """
    check_installation()
    supernode_arguments(site)
    pinned_superexec()
    if not any(each.process for each in services.running(site.state_folder)):
        _require_free_port(site)
    services.start(make_state(site), [str(own_command()), "serve", str(site.path)])


def serve_site(site: Site) -> None:
    """Keep SuperNode and executor running until ended. Raises `ServiceError`."""
    check_installation()
    services.supervise(make_state(site), site_services(site))


def site_services(site: Site) -> list[Service]:
    """The two services, as they are started."""
    environment = service_environment(site)
    return [
        Service(
            name,
            (str(own_command()), name, str(site.path)),
            environment | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            site.state_folder / f"{name}.out",
        )
        for name in (SUPERNODE, EXECUTOR)
    ]


def _require_free_port(site: Site) -> None:
    port = site.file.deployment.port
    with socket.socket() as probe:
        # As the SuperNode's server does: a port that only lingers after its last owner counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServiceError(
                f"port {port} on 127.0.0.1 is taken",
                why="by another site of this machine, a systemd unit of this one, or another program",
                fix="give each site its own deployment.port in site.yaml, and run the services only once",
            ) from error

"""Which site this process is: the same answer in simulation and in deployment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from bridge.errors import FedbridgeError
from client.errors import SiteFileError

SITE_KEY = "site"
"""Node config: path of the site file or its folder, set by the hospital when it starts its SuperNode."""

SIMULATION_KEY = "simulation-folder"
"""Run config: folder of pretend sites. It comes from the coordinator, so a node with an own site ignores it."""


@dataclass(frozen=True)
class SitePaths:
    """Where a site writes about itself; `audit` is None where its site file can't be read."""

    log: Path
    audit: Path | None


def locate_site(context: Context) -> Path:
    """The path of the site file or folder: `node_config["site"]`, else `site-<partition-id>` of the simulation's
    folder.

    Raises `SiteFileError` where neither is given or nothing is there.
    """
    named = context.node_config.get(SITE_KEY)
    if named is not None:
        return _existing(Path(str(named)), f"the node config's '{SITE_KEY}'")
    folder, partition = context.run_config.get(SIMULATION_KEY), context.node_config.get("partition-id")
    if not isinstance(folder, str) or not folder or isinstance(partition, bool) or not isinstance(partition, int):
        raise SiteFileError(
            "this node does not know its site",
            why=f"the node config has no '{SITE_KEY}', and this is no simulation",
            fix="start the SuperNode with --node-config 'site=\"/path/to/site.yaml\"'",
        )
    return _existing(Path(folder) / f"site-{partition}", f"the run config's '{SIMULATION_KEY}'")


def is_simulated(context: Context) -> bool:
    """Whether the node is one of a simulation's pretend sites: it has no site of its own."""
    return SITE_KEY not in context.node_config


def site_paths(context: Context) -> SitePaths | None:
    """Where the node's site logs, as far as it can be found; None where there is no such folder."""
    from client.site import open_site

    try:
        path = locate_site(context)
    except SiteFileError:
        return None
    try:
        site = open_site(path)
    except FedbridgeError:
        folder = path if path.is_dir() else path.parent
        return SitePaths(log=folder / "site.log", audit=None)
    return SitePaths(log=site.log_path, audit=site.audit_path)


def _existing(path: Path, named_by: str) -> Path:
    if not path.exists():
        raise SiteFileError(f"{path}: there is no such site", why=f"{named_by} names it", fix="correct the path")
    return path

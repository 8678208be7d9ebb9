"""systemd units of a site: SuperNode and executor, as an own user that may write the site's folder alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bridge.errors import ServiceError
from bridge.templates import fill
from client.deployment.keys import NODE_KEY
from client.deployment.places import own_command
from client.site import Site

USER = "fedbridge"
_TEMPLATES = Path(__file__).parent
_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))


def unit_name(service: str, site: str) -> str:
    """Of `supernode` or `executor`."""
    return f"fedbridge-{service}-{site}.service"


def unit_texts(site: Site) -> dict[str, str]:
    """The text of each unit, by its file's name. Raises `ServiceError` for a path that systemd can't take."""
    program = own_command()
    in_home = any(path.is_relative_to(home) for path in (site.folder, program) for home in _HOMES)
    values = {
        "site": site.name,
        "user": USER,
        "homes": "read-only" if in_home else "yes",
        "program": quoted(program),
        "folder": quoted(site.path),
        "state": quoted(site.state_folder),
        "node_key": quoted(site.keys_folder / NODE_KEY, "-"),
        "told": [quoted(path, "-") for path in _told(site)],
        "writable": " ".join(map(quoted, _writable(site))),
        "not_for_supernode": [quoted(path, "-") for path in _not_for_supernode(site)],
        "supernode_unit": unit_name("supernode", site.name),
        "gpu": site.file.compute.device != "cpu",
    }
    return {
        unit_name(name, site.name): fill(_TEMPLATES, f"{name}.service.j2", values) for name in ("supernode", "executor")
    }


def quoted(path: Path, prefix: str = "") -> str:
    """A path as one word of a unit file. Raises `ServiceError` for characters that systemd reads as something else."""
    text = str(path)
    if not text.isprintable() or set(text) & set("\\\"'$;"):
        raise ServiceError(
            f"{text!r}: systemd can't take this path",
            why="it holds quotation marks, backslashes, '$', ';' or control characters",
            fix="use a folder without them",
        )
    word = prefix + text.replace("%", "%%")
    return f'"{word}"' if " " in word else word


def _writable(site: Site) -> list[Path]:
    """The site's folder, and what the site file puts elsewhere on purpose."""
    places = (site.cache_folder, site.audit_path.parent, site.ledger_path.parent, site.log_path.parent)
    others = [*places, site.studies_folder, site.state_folder]
    return [site.folder, *_distinct(path for path in others if not path.is_relative_to(site.folder))]


def _not_for_supernode(site: Site) -> list[Path]:
    """What the SuperNode has no use for; never a folder that holds what it needs."""
    needed = (site.path, site.coordinator_path, site.keys_folder, site.state_folder)
    hidden = (site.resolve(site.file.folder), site.cache_folder, site.ledger_path, site.key_path)
    return [path for path in _distinct(hidden) if not any(each.is_relative_to(path) for each in needed)]


def _told(site: Site) -> list[Path]:
    """What says what the site has, permits and trusts."""
    policy = [] if site.policy_path is None else [site.policy_path]
    return _distinct([site.path, *policy, site.coordinator_path, site.keys_folder])


def _distinct(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))

"""`fedbridge-site init`: everything that a site's folder needs, each file unless it is there already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path

from bridge.enrolment import CoordinatorFile
from bridge.errors import EnrolmentError
from bridge.files import cause, write_whole
from bridge.messages import SITE_NAME
from client.deployment import keys, units
from client.deployment.places import FLOWER_HOME, read_coordinator
from client.errors import OutputError, SiteFileError
from client.policy import template as policy_template
from client.site import SITE_FILE, Site, open_site

SYSTEMD = "systemd"


@dataclass
class Initialised:
    """What `initialise` did; paths are relative to the folder."""

    site: Site
    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    coordinator: CoordinatorFile | None = None

    def put(self, path: Path, write: Callable[[], None], *, anew: bool = False) -> None:
        """Let `write` make a file where there is none, or where `anew`."""
        folder = self.site.folder
        name = str(path.relative_to(folder) if path.is_relative_to(folder) else path)
        if path.exists() and not anew:
            self.kept.append(name)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
        self.written.append(name)


def site_template(name: str, port: int) -> str:
    """A site file with every key explained."""
    text = resources.files("client").joinpath("site_template.yaml").read_text(encoding="utf-8")
    return text.replace("@site@", name).replace("@port@", str(port))


def initialise(
    folder: Path,
    *,
    name: str = "",
    port: int | None = None,
    coordinator: Path | None = None,
    force: bool = False,
    new_keys: bool = False,
) -> Initialised:
    """Make a site's folder, or what is missing of it. An interrupted call is completed by the next one.

    The site file and the policy are the hospital's own and never written over. `force` writes anew what follows from
    them (the systemd units) and lets `coordinator` replace another one; `new_keys` makes new keys, and the site must be
    enrolled again. Raises `SiteFileError`, `EnrolmentError`, `ServiceError`, and `OutputError` where the folder can't
    be written.
    """
    offered = None if coordinator is None else read_coordinator(coordinator)
    folder = folder.absolute()
    units.quoted(folder)
    try:
        done = _with_site_file(folder, name, port)
        _write_policy(done)
        _write_coordinator(done, coordinator, offered, force)
        _write_keys(done, new_keys)
        _write_folders(done.site)
        _write_units(done, force)
    except OSError as error:
        raise OutputError(
            f"{folder}: the site's folder can't be written",
            why=f"{cause(error)}: {error.filename}" if error.filename else cause(error),
            fix="correct the permissions or free space, then call init again",
        ) from error
    return done


def _with_site_file(folder: Path, name: str, port: int | None) -> Initialised:
    path = folder / SITE_FILE
    if path.exists():
        done = Initialised(open_site(path), kept=[SITE_FILE])
        _refuse_other(done.site, name, port)
        return done
    name = name or folder.name
    if not SITE_NAME.match(name):
        raise SiteFileError(
            f"'{name}' can't be a site's name",
            why="letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit",
            fix="give the agreed name with --name",
        )
    if not folder.exists():
        folder.mkdir(parents=True)
        folder.chmod(0o700)
    write_whole(path, site_template(name, port or 9094))
    return Initialised(open_site(path), written=[SITE_FILE])


def _refuse_other(site: Site, name: str, port: int | None) -> None:
    for key, asked, there in (("site", name, site.name), ("deployment.port", port, site.file.deployment.port)):
        if asked and asked != there:
            raise SiteFileError(
                f"{site.path}: says {key}: {there}, not {asked}",
                why="the site file is yours and never written over",
                fix="edit the file, or leave the option out",
            )


def _write_policy(done: Initialised) -> None:
    path = done.site.policy_path
    if path is not None:
        done.put(path, lambda: write_whole(path, policy_template(done.site.name)))


def _write_coordinator(done: Initialised, source: Path | None, offered: CoordinatorFile | None, force: bool) -> None:
    path = done.site.coordinator_path
    if offered is not None and source is not None:
        content = source.read_bytes()
        replace = path.exists() and path.read_bytes() != content
        if replace and not force:
            raise EnrolmentError(
                f"{path}: is another coordinator's file, or an older one",
                why=f"it is not that of {source}",
                fix="if the coordinator read you the new fingerprint, use --force",
            )
        done.put(path, lambda: write_whole(path, content), anew=replace)
    elif path.exists():
        done.kept.append(path.name)
    done.coordinator = read_coordinator(path) if path.exists() else None


def _write_keys(done: Initialised, anew: bool) -> None:
    folder = done.site.keys_folder
    if not folder.exists():
        folder.mkdir(parents=True)
        folder.chmod(0o700)
    done.put(folder / keys.NODE_KEY, lambda: keys.new_node_key(folder), anew=anew)
    key = keys.read_node_key(folder)
    public = folder / keys.NODE_PUBLIC
    stale = public.exists() and public.read_text(encoding="utf-8", errors="replace").strip() != keys.public_line(key)
    done.put(public, lambda: keys.write_public(folder, key), anew=anew or stale)
    done.put(folder / keys.EXECUTOR_SECRET, lambda: keys.new_executor_secret(folder), anew=anew)
    keys.executor_secret(done.site)


def _write_folders(site: Site) -> None:
    for each in (site.studies_folder, site.state_folder / FLOWER_HOME, site.folder / "models"):
        each.mkdir(parents=True, exist_ok=True)


def _write_units(done: Initialised, anew: bool) -> None:
    for name, text in units.unit_texts(done.site).items():
        path = done.site.folder / SYSTEMD / name
        done.put(path, partial(write_whole, path, text), anew=anew)

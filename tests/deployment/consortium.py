"""A consortium on loopback: nginx, SuperLink and hospitals, each from its own folder, driven by the commands alone.

Every process carries a mark in its environment, so that all of them end with the test whatever happened.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from simulations.flower_engine import MARK, end_processes
from tests.end_to_end.commands import SMOKE, command, environment
from tests.waiting import free_port

NAMES = ("hospital-1", "hospital-2", "hospital-3")


def lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a file that may not be there yet; a line that is being written is left out."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line]


@dataclass
class Consortium:
    """`place/coordinator` and `place/<site>`, on free ports."""

    place: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(16))
    port: int = field(default_factory=free_port)
    superlink_port: int = field(default_factory=free_port)
    sites: dict[str, Path] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        return self.place / "coordinator"

    @property
    def prepared(self) -> Path:
        return self.place / "prepared"

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return environment({MARK: self.mark, **(extra or {})})

    def call(self, name: str, *arguments: str | Path, code: int = 0, timeout: float = 300) -> str:
        """What a command printed, which must end with this code."""
        found, text = self.attempt(name, *arguments, timeout=timeout)
        assert found == code, f"{name} {' '.join(map(str, arguments))} ended with {found}:\n{text}"
        return text

    def attempt(self, name: str, *arguments: str | Path, timeout: float = 300) -> tuple[int, str]:
        done = subprocess.run(
            [command(name), *map(str, arguments)],
            cwd=self.place,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    def start(self, name: str, *arguments: str | Path) -> subprocess.Popen[str]:
        """A command in the background, its output in a file of its own."""
        log = self.place / f"{name}-{secrets.token_hex(4)}.log"
        with log.open("w") as file:
            return subprocess.Popen(
                [command(name), *map(str, arguments)],
                cwd=self.place,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def prepare(self, config: Path = SMOKE, *settings: str) -> None:
        """Hospitals of a made-up cohort, each in a folder of its own as if it had been carried away."""
        options = [part for each in settings for part in ("--set", each)]
        self.call("fedbridge-sim", "prepare", config, "--standalone", "--out", self.prepared, "--quiet", *options)
        for folder in sorted((self.prepared / "sites").iterdir()):
            name = yaml.safe_load((folder / "site.yaml").read_text(encoding="utf-8"))["site"]
            self.sites[name] = self.place / name
            shutil.copytree(folder, self.sites[name])
            self.edit_site(name, lambda content: content["deployment"].update(port=free_port()))

    def edit_site(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.sites[name] / "site.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content.setdefault("deployment", {})
        change(content)
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    def init_coordinator(self) -> None:
        ports = ("--port", str(self.port), "--superlink-port", str(self.superlink_port))
        self.call("fedbridge-server", "init", self.coordinator, "--name", "consortium", "--host", "127.0.0.1", *ports)

    def enrol(self, name: str) -> None:
        """A site's folder, its request, and the coordinator's yes."""
        site, request = self.sites[name], self.place / f"{name}.request"
        self.call("fedbridge-site", "init", site, "--coordinator", self.coordinator / "coordinator.yaml")
        self.call("fedbridge-site", "request", site, "--out", request)
        self.call("fedbridge-server", "enrol", request, "--dir", self.coordinator, "--yes")

    def edit_study(self, **keys: Any) -> None:
        """Other values for keys of the prepared study."""
        path = self.prepared / "study.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8")) | keys
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    def build(self, study: str = "study.zip", config: Path | None = None) -> Path:
        path = self.place / study
        config = config or self.prepared / "study.yaml"
        self.call("fedbridge-server", "study", "build", config, "--out", path, "--dir", self.coordinator)
        return path

    def accept(self, study: Path, names: Sequence[str] = ()) -> None:
        for name in names or self.sites:
            self.call("fedbridge-site", "accept", study, "--site", self.sites[name], "--yes", "--who", "test")

    def up(self, names: Sequence[str] = ()) -> None:
        """Start the coordinator's services and the sites'."""
        self.call("fedbridge-server", "start", self.coordinator)
        for name in names or self.sites:
            self.call("fedbridge-site", "start", self.sites[name])

    def run(self, study: Path, *arguments: str, timeout: float = 400) -> tuple[int, str]:
        return self.attempt("fedbridge-server", "run", study, "--dir", self.coordinator, *arguments, timeout=timeout)

    def run_folder(self, study: Path) -> Path:
        """The folder of the study's only run."""
        found = [path for path in (self.coordinator / "runs").iterdir() if path.is_dir()]
        assert len(found) == 1, found
        return found[0]

    def close(self) -> None:
        """End everything, by the commands where they still work, by the mark in any case."""
        end_processes(self.mark)

    def processes(self, part: str, site: str = "") -> list[int]:
        """Ids of the consortium's processes with `part` in their command line, of one site where it is named."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                marks = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            mine = f"{MARK}={self.mark}".encode() in marks
            where = (
                not site or str(self.sites[site]) in words or any(str(self.sites[site]).encode() in m for m in marks)
            )
            if mine and where and part in words:
                found.append(int(entry.name))
        return sorted(found)


def whole(place: Path, config: Path = SMOKE, *settings: str) -> Consortium:
    """A consortium whose sites are enrolled and have accepted nothing yet; nothing runs yet."""
    place.mkdir(parents=True, exist_ok=True)
    consortium = Consortium(place)
    consortium.prepare(config, *settings)
    consortium.init_coordinator()
    for name in consortium.sites:
        consortium.enrol(name)
    return consortium

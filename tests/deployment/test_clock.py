"""A hospital whose clock is wrong: the coordinator refuses its signatures, and its status says why."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deployment.consortium import Consortium
from tests.end_to_end.commands import SMOKE, command
from tests.waiting import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed (apt install faketime)"),
]

SITE = "hospital-1"


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    found = Consortium(tmp_path_factory.mktemp("clock"))
    try:
        found.prepare(SMOKE)
        found.init_coordinator()
        found.enrol(SITE)
        found.call("fedbridge-server", "start", found.coordinator)
        yield found
    finally:
        found.close()


def at_another_time(consortium: Consortium, offset: str, *arguments: str) -> list[str]:
    return ["faketime", "-f", offset, command("fedbridge-site"), *arguments, str(consortium.sites[SITE])]


def status(consortium: Consortium, offset: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*at_another_time(consortium, offset, "status"), "--json"],
        env=consortium.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


def online(consortium: Consortium) -> bool:
    told = json.loads(consortium.attempt("fedbridge-server", "status", consortium.coordinator, "--json")[1])
    return any(site["online"] for site in told["sites"] if site["name"] == SITE)


@pytest.mark.parametrize(("offset", "seconds"), [("+1h", 3600), ("-1h", -3600)])
def test_an_hour_off_is_refused_and_told(consortium: Consortium, offset: str, seconds: int) -> None:
    log = consortium.place / "supernode.out"
    with log.open("w") as file:
        node = subprocess.Popen(
            at_another_time(consortium, offset, "supernode"),
            env=consortium.environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    access = consortium.coordinator / "nginx" / "access.log"
    try:
        until(lambda: access.exists() and " 401 " in access.read_text(), 90, "a refused call")
        assert not online(consortium)
        code, told = status(consortium, offset)
    finally:
        node.terminate()
        node.wait(timeout=60)
    access.write_text("")
    assert code == 1
    assert abs(told["connection"]["clock_seconds"] - seconds) < 60


def test_a_right_clock_is_let_in(consortium: Consortium) -> None:
    """The control, with the same program around it."""
    node = subprocess.Popen(
        at_another_time(consortium, "+0", "supernode"),
        env=consortium.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(lambda: online(consortium), 120, "the site online")
    finally:
        node.terminate()
        node.wait(timeout=60)

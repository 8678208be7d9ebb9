"""Who gets in with a real SuperNode, and what is left after kills, restarts and an expired certificate."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.processes import ProcessId, is_alive, process_id
from server.coordinator import certificates, nginx, registry, superlink
from server.coordinator.folder import CoordinatorFolder
from tests.server.coordinator.conftest import Running
from tests.server.coordinator.places import SuperNode, made, write_request
from tests.waiting import until

pytestmark = pytest.mark.slow

Make = Callable[[], Running]


def nodes(folder: CoordinatorFolder) -> dict[str, superlink.Node]:
    with superlink.control(folder) as control:
        return {each.name: each for each in control.nodes()}


def online(running: Running, name: str, node: SuperNode) -> None:
    until(lambda: running.site(name)["online"], 40, f"{name} online: {node.said}")


def heard_again(running: Running, name: str, node: SuperNode) -> None:
    """The same process as before beats its heart from now on (every 30 s)."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    until(lambda: running.site(name)["last_seen"] > now, 90, f"{name} is heard again: {node.said}")
    assert node.process.poll() is None


def process(pid: int) -> ProcessId:
    found = process_id(pid)
    assert found is not None
    return found


def test_a_site_is_let_in_by_enrolment_and_cut_off_by_revocation(coordinator: Make) -> None:
    running = coordinator()
    early = running.enrol("early")  # before anything runs
    running.call("start", running.folder.path)
    first = running.node(early)
    online(running, "early", first)

    stranger = running.node(running.keys("stranger"))
    said = stranger.ended()
    assert "could not establish a connection" in said
    assert not stranger.connected()

    late = running.enrol("late")  # while all runs
    second = running.node(late)
    online(running, "late", second)
    assert {name: node.status for name, node in nodes(running.folder).items()} == {"early": "online", "late": "online"}

    before = len(running.heard())
    assert "revoked and shut out" in running.call("revoke", "early", "--dir", running.folder.path)
    first.ended()
    cut = running.heard()[before:]
    after = cut.partition("ControlServicer.UnregisterNode")[2]
    assert '" 401' in after
    assert nodes(running.folder)["early"].status == "unregistered"
    again = running.node(early)
    assert "could not establish a connection" in again.ended()
    assert not again.connected()
    told = running.site("early")
    assert (told["state"], told["online"], told["node"]) == ("revoked", False, "unregistered")
    assert datetime.now(UTC) - datetime.fromisoformat(told["last_seen"]) < timedelta(minutes=2)
    assert second.process.poll() is None
    assert running.site("late")["online"]

    # The name with a new key, the old key never.
    request = write_request(running.place / "again.request", "early", early)
    code, output = running.attempt("enrol", request, "--dir", running.folder.path, "--yes")
    assert code == 5
    assert "was revoked" in output
    third = running.node(running.enrol("early"))
    until(lambda: any(each["online"] and each["name"] == "early" for each in running.status()["sites"]), 40, third.said)


def test_a_killed_superlink_comes_back_with_its_registrations(coordinator: Make) -> None:
    running = coordinator()
    running.enrol("north")
    running.call("start", running.folder.path)
    node = running.node(running.enrol("east"))
    online(running, "east", node)
    before = nodes(running.folder)
    pid, door = running.pid("superlink"), running.pid("nginx")
    os.kill(pid, signal.SIGKILL)
    until(lambda: superlink.answers(running.folder) and running.pid("superlink") != pid, 60, "SuperLink is back")
    assert running.pid("nginx") == door
    assert [each["restarts"] for each in running.status()["services"] if each["name"] == "superlink"] == [1]
    after = nodes(running.folder)
    assert {name: each.id for name, each in after.items()} == {name: each.id for name, each in before.items()}
    heard_again(running, "east", node)


def test_who_is_revoked_while_the_superlink_is_down_does_not_come_back(coordinator: Make) -> None:
    running = coordinator()
    keys = running.enrol("north")
    running.call("start", running.folder.path)
    node = running.node(keys)
    online(running, "north", node)
    os.kill(running.pid("superlink"), signal.SIGKILL)
    # The door is open: the command waits until the SuperLink can be told.
    assert "revoked and shut out" in running.call("revoke", "north", "--dir", running.folder.path)
    assert nodes(running.folder)["north"].status == "unregistered"
    node.ended(90)

    # With all services stopped, it is told before the door opens.
    other = running.enrol("east")
    running.call("stop", running.folder.path)
    assert "nobody can connect" in running.call("revoke", "east", "--dir", running.folder.path)
    running.call("start", running.folder.path)
    assert nodes(running.folder)["east"].status == "unregistered"
    assert "could not establish a connection" in running.node(other).ended()


def test_the_registry_is_the_truth_for_the_superlink(coordinator: Make) -> None:
    running = coordinator()
    running.enrol("north")
    running.call("start", running.folder.path)
    # Registered behind the registry's back, and under another name: both go.
    stranger, south = running.keys("stranger"), running.keys("south")
    entry = registry.Entry(site="south", public_key=south.public, state="enrolled", enrolled="")
    with superlink.control(running.folder) as control:
        control.register(
            "stranger", registry.Entry(site="s", public_key=stranger.public, state="enrolled", enrolled="").pem
        )
        control.register("other", entry.pem)
    found = registry.sync(running.folder)
    assert (found.registered, set(found.unregistered)) == ((), {"stranger", "other"})
    assert registry.sync(running.folder) == registry.Synced((), (), ())
    # Such a key can't be enrolled any more, and that is said before anything is written.
    request = write_request(running.place / "south.request", "south", south)
    code, output = running.attempt("enrol", request, "--dir", running.folder.path, "--yes")
    assert code == 5
    assert "the SuperLink shut it out" in output
    assert [each.site for each in registry.read_registry(running.folder).sites] == ["north"]
    # A lost database: everybody who is enrolled is let in again.
    running.call("stop", running.folder.path)
    for path in running.folder.path.glob("superlink.sqlite*"):
        path.unlink()
    running.call("start", running.folder.path)
    assert {name: node.status for name, node in nodes(running.folder).items()} == {"north": "registered"}


def test_a_killed_nginx_comes_back_without_the_workers_it_left(coordinator: Make) -> None:
    running = coordinator()
    keys = running.enrol("north")
    running.call("start", running.folder.path)
    node = running.node(keys)
    online(running, "north", node)
    before = nginx.processes(running.folder)
    master = running.pid("nginx")
    assert len(before) == 2
    os.kill(master, signal.SIGKILL)
    until(lambda: (running.status()["door"] == "") and running.pid("nginx") != master, 60, "nginx is back")
    assert not any(is_alive(each) for each in before)
    assert len(nginx.processes(running.folder)) == 2
    heard_again(running, "north", node)


def test_stop_ends_all_and_start_begins_anew_also_after_a_killed_supervisor(coordinator: Make) -> None:
    running = coordinator()
    running.call("start", running.folder.path)
    code, output = running.attempt("start", running.folder.path)
    assert code == 1
    assert "running already" in output
    services = [process(running.pid("superlink")), *nginx.processes(running.folder)]
    parent = process(services[0].parent)
    os.kill(parent.pid, signal.SIGKILL)
    until(lambda: not is_alive(parent), 10, "the supervisor is gone")
    assert all(is_alive(each) for each in services)
    assert running.call("stop", running.folder.path) == "ended: superlink, executor, nginx\n"
    assert not any(is_alive(each) for each in services)
    assert running.status()["services"] == []
    running.call("start", running.folder.path)
    # And after both were killed, with the workers left.
    os.kill(process(running.pid("superlink")).parent, signal.SIGKILL)
    os.kill(running.pid("nginx"), signal.SIGKILL)
    running.call("stop", running.folder.path)
    assert nginx.processes(running.folder) == []
    running.call("start", running.folder.path)
    assert running.status()["door"] == ""


def test_an_expired_certificate_is_refused_by_the_site_and_renew_mends_it(coordinator: Make) -> None:
    running = coordinator()
    folder, keys = running.folder, running.enrol("north")
    running.call("start", folder.path)
    good = folder.server_certificate.read_bytes()
    folder.server_certificate.write_bytes(
        certificates.new_certificate(
            folder.server_key.read_bytes(),
            ["localhost"],
            folder.ca_key.read_bytes(),
            folder.ca_certificate.read_bytes(),
            begins=datetime.now(UTC) - timedelta(days=400),
        )
    )
    assert nginx.reload(folder)
    until(lambda: running.status()["door"] == "its certificate is refused: certificate has expired", 20, "expired")
    told = running.call("status", folder.path)
    assert "sites can not connect: its certificate is refused: certificate has expired" in told
    assert "warning: renew the certificate now" in told
    assert running.status()["certificate_days"] < -2
    refused = running.node(keys)
    assert "certificate" in refused.ended().lower()
    assert not refused.connected()
    # Nothing but the sites' leg is touched: the SuperLink is the same process, and answers throughout.
    before = running.pid("superlink")
    assert running.status()["superlink"]
    assert "nginx reads it now" in running.call("renew", folder.path)
    until(lambda: running.status()["door"] == "", 20, "renewed")
    assert folder.server_certificate.read_bytes() != good
    online(running, "north", running.node(keys))
    assert running.pid("superlink") == before


def test_what_keeps_them_from_starting_is_told_and_leaves_nothing_running(coordinator: Make) -> None:
    running = coordinator()
    folder = running.folder
    for port, words in ((folder.settings.port, "0.0.0.0"), (folder.settings.superlink_port, "127.0.0.1")):
        with socket.socket() as taken:
            taken.bind(("0.0.0.0", port))
            taken.listen()
            code, output = running.attempt("start", folder.path)
            assert code == 1
            assert f"port {port} on {words} can't be used" in output
    text = folder.nginx_configuration.read_text()
    folder.nginx_configuration.write_text("nonsense;")
    code, output = running.attempt("start", folder.path)
    assert code == 1
    assert "nginx refuses" in output
    folder.nginx_configuration.write_text(text)
    folder.database.mkdir()
    code, output = running.attempt("start", folder.path)
    assert code == 1
    assert "did not come up" in output
    assert running.status()["services"] == []
    folder.database.rmdir()
    folder.enrolled.write_text("{")
    code, output = running.attempt("start", folder.path)
    assert code == 1
    assert "enrolled.json: is damaged" in output
    assert nginx.processes(folder) == []
    folder.enrolled.unlink()
    running.call("start", folder.path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_it_runs_as_a_user_without_rights() -> None:
    if nginx.program() is None:
        pytest.skip("nginx is not installed")
    # Outside pytest's own folder, which is closed to other users.
    place = Path(tempfile.mkdtemp(prefix="coordinator-", dir="/tmp"))
    place.chmod(0o755)
    running = Running(made(place / "c"), place)
    program = Path(sys.executable).with_name("fedbridge-server")
    try:
        subprocess.run(["chown", "-R", "nobody:", str(running.folder.path)], check=True)
        started = _as_nobody(running, program, "start", running.folder.path)
        assert started.returncode == 0, started.stderr
        processes = [process(running.pid("superlink")), *nginx.processes(running.folder)]
        assert len(processes) == 3
        assert {Path(f"/proc/{each.pid}").stat().st_uid for each in processes} == {_NOBODY}
        assert running.status()["door"] == ""
        written = [running.folder.database, *running.folder.state.glob("*.log")]
        assert {path: path.stat().st_mode & 0o077 for path in written if path.name != "supervisor.log"} == {
            path: 0 for path in written if path.name != "supervisor.log"
        }
    finally:
        running.close()
        shutil.rmtree(place)


_NOBODY = 65534


def _as_nobody(running: Running, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """As a user who may read this environment, wherever it lies, and writes its own folder alone."""
    user = [f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
    reads = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return subprocess.run(
        ["setpriv", *user, *reads, *map(str, words)],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **running.mark},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

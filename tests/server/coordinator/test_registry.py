"""Enrolment and revocation without a SuperLink: who gets in, what is refused, and what survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bridge.console import run_app
from bridge.errors import EnrolmentError
from server.cli import app
from server.coordinator import registry
from server.coordinator.folder import CoordinatorFolder
from tests.conftest import ROOT
from tests.server.coordinator.places import Keys, made, new_keys, write_request

Ended = tuple[int, str, str]
Command = Callable[..., Ended]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str | Path) -> Ended:
        with pytest.raises(SystemExit) as ended:
            run_app(app, [str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> CoordinatorFolder:
    return made(tmp_path / "c")


@pytest.fixture(scope="module")
def north(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("north") / "node.key")


@pytest.fixture(scope="module")
def east(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("east") / "node.key")


def written(folder: CoordinatorFolder) -> list[tuple[str, str, str]]:
    content = json.loads(folder.enrolled.read_text())
    assert content["schema"] == "fedbridge.enrolled/1"
    return [(each["site"], each["public_key"], each["state"]) for each in content["sites"]]


def test_a_request_is_enrolled_once_its_fingerprint_was_confirmed(
    command: Command, folder: CoordinatorFolder, north: Keys, tmp_path: Path
) -> None:
    request = write_request(tmp_path / "north.request", "north", north)
    code, out, err = command("enrol", request, "--dir", folder.path, "--yes")
    assert (code, err) == (0, "")
    signed = json.dumps(["fedbridge.request/1", "north", north.public], separators=(",", ":")).encode()
    digits = hashlib.sha256(signed).hexdigest()[:40]
    assert "fingerprint: " + " ".join(re.findall("....", digits)) in out
    assert written(folder) == [("north", north.public, "enrolled")]
    code, out, _ = command("sites", folder.path)
    assert code == 0
    assert re.search(r"^north +enrolled +unknown +never +" + " ".join(re.findall("....", digits)), out, re.M)


def test_nobody_is_let_in_where_nobody_can_be_asked(
    command: Command, folder: CoordinatorFolder, north: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = write_request(tmp_path / "north.request", "north", north)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    code, _, err = command("enrol", request, "--dir", folder.path)
    assert code == 5
    assert "give --yes" in err
    assert not folder.enrolled.exists()


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 5), ("\n", 5)])
def test_the_terminal_is_asked(folder: CoordinatorFolder, north: Keys, tmp_path: Path, answer: str, code: int) -> None:
    import pty

    request = write_request(tmp_path / "north.request", "north", north)
    master, slave = pty.openpty()
    program = Path(sys.executable).with_name("fedbridge-server")
    child = subprocess.Popen(
        [program, "enrol", request, "--dir", folder.path], stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    os.write(master, answer.encode())
    _, err = child.communicate(timeout=60)
    os.close(master)
    os.close(slave)
    assert child.returncode == code, err
    assert folder.enrolled.exists() == (code == 0)


def _swap_name(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", north, site="south")


def _swap_key(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", north, public_key=east.public)


def _no_signature(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", north, signature="")


def _no_base64(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", north, signature="no base64!")


def _other_schema(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", north, schema="fedbridge.request/2")


def _more_keys(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", north, admin="yes")


def _strange_name(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north; rm -rf", north)


def _comment(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", Keys(north.secret, north.public + " engineer@north"))


def _two_lines(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", Keys(north.secret, north.public + "\n" + east.public))


def _no_key(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", Keys(north.secret, "ecdsa-sha2-nistp384 AAAA"))


def _other_curve(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", new_keys(path.with_name("p256"), bits=256))


def _rsa(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", new_keys(path.with_name("rsa"), kind="rsa", bits=2048))


def _truncated(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", north)
    path.write_bytes(path.read_bytes()[:150])


def _empty(path: Path, north: Keys, east: Keys) -> None:
    path.write_bytes(b"")


def _binary(path: Path, north: Keys, east: Keys) -> None:
    path.write_bytes(os.urandom(500))


def _long(path: Path, north: Keys, east: Keys) -> None:
    write_request(path, "north", north)
    path.write_bytes(path.read_bytes() + b"#" * 20_000)


def _absent(path: Path, north: Keys, east: Keys) -> None:
    path.unlink(missing_ok=True)


def _folder(path: Path, north: Keys, east: Keys) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_swap_name, "forged or damaged"),
        (_swap_key, "forged or damaged"),
        (_no_signature, "forged or damaged"),
        (_no_base64, "forged or damaged"),
        (_other_schema, "schema"),
        (_more_keys, "unknown key 'admin'"),
        (_strange_name, "key 'site'"),
        (_comment, "without a comment"),
        (_two_lines, "key can't be used"),
        (_no_key, "key can't be used"),
        (_other_curve, "ECDSA P-384"),
        (_rsa, "ECDSA P-384"),
        (_truncated, "is no enrolment request"),
        (_empty, "is no enrolment request"),
        (_binary, "is no enrolment request"),
        (_long, "far too long"),
        (_absent, "can't be read"),
        (_folder, "is no enrolment request"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_request_that_is_none_is_refused(
    command: Command,
    folder: CoordinatorFolder,
    north: Keys,
    east: Keys,
    tmp_path: Path,
    make: Callable[[Path, Keys, Keys], None],
    words: str,
) -> None:
    path = tmp_path / "a.request"
    make(path, north, east)
    code, _, err = command("enrol", path, "--dir", folder.path, "--yes")
    assert code == 5
    assert words in err
    assert "What to do: " in err
    assert not folder.enrolled.exists()


def test_a_name_or_key_that_is_there_is_refused(
    command: Command, folder: CoordinatorFolder, north: Keys, east: Keys, tmp_path: Path
) -> None:
    def enrol(site: str, keys: Keys) -> Ended:
        return command("enrol", write_request(tmp_path / "a.request", site, keys), "--dir", folder.path, "--yes")

    assert enrol("north", north)[0] == 0
    before = folder.enrolled.read_bytes()
    for site, keys, words in (
        ("north", north, "the key of 'north' is enrolled already"),
        ("south", north, "the key of 'south' is enrolled already"),
        ("north", east, "a site 'north' is enrolled already"),
        ("North", east, "a site 'north' is enrolled already"),
    ):
        code, _, err = enrol(site, keys)
        assert code == 5
        assert words in err
        assert folder.enrolled.read_bytes() == before
    assert enrol("east", east)[0] == 0
    assert written(folder) == [("north", north.public, "enrolled"), ("east", east.public, "enrolled")]


def test_a_revoked_key_never_comes_back_and_its_name_does_with_another(
    command: Command, folder: CoordinatorFolder, north: Keys, east: Keys, tmp_path: Path
) -> None:
    def enrol(site: str, keys: Keys) -> Ended:
        return command("enrol", write_request(tmp_path / "a.request", site, keys), "--dir", folder.path, "--yes")

    enrol("north", north)
    code, out, _ = command("revoke", "north", "--dir", folder.path)
    assert code == 0
    assert "nobody can connect until the services are started" in out
    assert written(folder) == [("north", north.public, "revoked")]
    for site in ("north", "south"):
        code, _, err = enrol(site, north)
        assert code == 5
        assert "was revoked" in err
    assert enrol("north", east)[0] == 0
    assert written(folder) == [("north", north.public, "revoked"), ("north", east.public, "enrolled")]
    code, _, err = command("revoke", "south", "--dir", folder.path)
    assert code == 5
    assert "no site 'south' is enrolled" in err
    assert command("revoke", "north", "--dir", folder.path)[0] == 0
    assert command("revoke", "north", "--dir", folder.path)[0] == 5


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"schema": "fedbridge.enrolled/2"}',
        b'{"schema": "fedbridge.enrolled/1", "sites": [{"site": "north"}]}',
        b'{"schema": "fedbridge.enrolled/1", "sites": [], "more": 1}',
        bytes(range(128, 178)),
    ],
)
def test_a_damaged_registry_lets_nobody_in(
    command: Command, folder: CoordinatorFolder, north: Keys, tmp_path: Path, content: bytes
) -> None:
    folder.enrolled.write_bytes(content)
    request = write_request(tmp_path / "a.request", "north", north)
    for arguments in (
        ("enrol", request, "--dir", folder.path, "--yes"),
        ("sites", folder.path),
        ("status", folder.path),
    ):
        code, _, err = command(*arguments)
        assert code == 5
        assert "enrolled.json: is damaged" in err
    with pytest.raises(EnrolmentError):
        registry.revoke(folder, "north")
    assert folder.enrolled.read_bytes() == content


ENROL_MANY = """
import sys
from pathlib import Path
from bridge.enrolment import EnrolmentRequest
from server.coordinator import registry
from server.coordinator.folder import CoordinatorFolder
folder = CoordinatorFolder.open(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    name = f"{sys.argv[2]}-{number}"
    request = EnrolmentRequest(site=name, public_key=f"key of {name}", signature="checked before")
    print(registry.enrol(folder, request).site, flush=True)
"""


def _enrolling(folder: CoordinatorFolder, prefix: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ENROL_MANY, str(folder.path), prefix, str(count)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_a_kill_loses_nobody_who_was_told_yes(folder: CoordinatorFolder) -> None:
    told: list[str] = []
    for attempt in range(4):
        child = _enrolling(folder, f"kill{attempt}", 100_000)
        assert child.stdout is not None
        told += [child.stdout.readline().strip() for _ in range(5 + attempt)]
        time.sleep(0.003 * attempt)
        child.send_signal(signal.SIGKILL)
        told += child.stdout.read().split()
        child.wait(timeout=20)
        there = [site for site, _, _ in written(folder)]
        assert len(set(there)) == len(there)
        # At most one more than was told, of each attempt: written, and killed before it could say so.
        assert set(told) <= set(there)
        assert len(there) <= len(told) + attempt + 1


def test_two_commands_at_once_lose_nobody(folder: CoordinatorFolder) -> None:
    children = [_enrolling(folder, prefix, 20) for prefix in ("a", "b")]
    for child in children:
        child.communicate(timeout=60)
        assert child.returncode == 0
    assert {site for site, _, _ in written(folder)} == {f"{each}-{number}" for each in "ab" for number in range(20)}


def test_status_of_a_folder_where_nothing_runs(command: Command, folder: CoordinatorFolder) -> None:
    code, out, _ = command("status", folder.path, "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["name"], told["address"]) == ("heart", folder.settings.address)
    assert (told["services"], told["superlink"], told["sites"], told["runs"]) == ([], False, [], [])
    assert told["door"]
    assert 396 < told["certificate_days"] <= 397
    code, out, _ = command("status", folder.path)
    assert code == 0
    assert "SuperLink: does not answer" in out
    assert "sites can not connect" in out
    assert "warning" not in out
    assert yaml.safe_load(folder.coordinator_path.read_text())["address"] in out
    code, out, _ = command("stop", folder.path)
    assert (code, out) == (0, "nothing was running\n")
    folder.ca_certificate.unlink()
    assert command("status", folder.path)[0] == 0
    folder.server_certificate.unlink()
    code, _, err = command("status", folder.path)
    assert code == 5
    assert "server.pem: can't be read" in err

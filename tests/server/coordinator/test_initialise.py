"""`fedbridge-server init` and `renew`: which files there are, who may read them, what is kept and what is refused."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bridge.config import load_model
from bridge.console import run_app
from bridge.enrolment import CoordinatorFile
from bridge.errors import ConfigError, EnrolmentError
from server.cli import app
from server.coordinator import certificates
from server.coordinator.folder import CoordinatorFolder, ServerFile
from server.coordinator.initialise import initialise, renew
from tests.server.coordinator.places import made

Ended = tuple[int, str, str]

SECRETS = {"keys/signing.key", "keys/ca.key", "keys/server.key", "keys/superlink.key", "keys/executor.secret"}
PUBLIC = {
    "server.yaml",
    "coordinator.yaml",
    "OPEN-THIS-PORT.md",
    "keys/ca.pem",
    "keys/server.pem",
    "keys/superlink.pem",
    "nginx/nginx.conf",
    "systemd/fedbridge-superlink.service",
    "systemd/fedbridge-executor.service",
    "systemd/fedbridge-nginx.service",
    "flower/config.toml",
}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def run(*arguments: str | Path) -> Ended:
        with pytest.raises(SystemExit) as ended:
            run_app(app, [str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def openssl(*arguments: str | Path) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout


def test_init_writes_these_files_and_its_owner_alone_reads_the_secret_ones(
    command: Callable[..., Ended], tmp_path: Path
) -> None:
    before = os.umask(0o002)
    try:
        code, out, err = command("init", tmp_path / "c", "--name", "heart", "--host", "fl.example.org")
    finally:
        os.umask(before)
    assert (code, err) == (0, "")
    assert set(contents(tmp_path / "c")) == SECRETS | PUBLIC
    assert {name for name in out.split() if name in SECRETS | PUBLIC} == SECRETS | PUBLIC
    for name in SECRETS:
        assert (tmp_path / "c" / name).stat().st_mode & 0o777 == 0o600, name
    assert (tmp_path / "c" / "keys").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700
    for name in ("studies", "runs", "state", "systemd", "nginx"):
        assert (tmp_path / "c" / name).is_dir()
    file = load_model(tmp_path / "c" / "coordinator.yaml", CoordinatorFile)
    assert (file.name, file.address) == ("heart", "fl.example.org:8443")
    assert f"  {file.fingerprint}\n" in out
    folder = CoordinatorFolder.open(tmp_path / "c")
    assert folder.settings == ServerFile(name="heart", host="fl.example.org", port=8443, superlink_port=8000)
    # What is handed out and what stays: no secret's text is in a file that others may read.
    secret = [(tmp_path / "c" / name).read_bytes().splitlines()[-1] for name in SECRETS]
    assert not any(
        each in content for name, content in contents(tmp_path / "c").items() for each in secret if name in PUBLIC
    )


def test_the_signing_key_belongs_to_what_the_sites_get(tmp_path: Path) -> None:
    folder = made(tmp_path / "c")
    secret = base64.b64decode(folder.signing_key.read_text())
    assert len(secret) == 32
    public = Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    content = yaml.safe_load(folder.coordinator_path.read_text())
    assert content["signing_key"] == base64.b64encode(public).decode()
    assert content["ca_certificate"] == folder.ca_certificate.read_text()
    assert folder.signing_secret() == secret


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.chmod(0o640), "others may read"),
        (lambda path: path.write_text("AAAA\n"), "is damaged"),
        (lambda path: path.write_text("no base64!\n"), "is damaged"),
        (lambda path: path.write_bytes(b"\xff" * 32), "can't be read"),
        (lambda path: path.unlink(), "can't be read"),
        (lambda path: path.write_text(base64.b64encode(bytes(32)).decode()), "is not the key that the sites know"),
    ],
)
def test_a_signing_key_that_cannot_be_used_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    folder = made(tmp_path / "c")
    damage(folder.signing_key)
    with pytest.raises(EnrolmentError, match=words):
        folder.signing_secret()


def test_openssl_finds_both_certificates_good_for_their_names_and_times(tmp_path: Path) -> None:
    folder = made(tmp_path / "c", host="fl.example.org")
    for certificate, names in (
        (folder.server_certificate, ("fl.example.org", "localhost")),
        (folder.inner_certificate, ("localhost",)),
    ):
        for name in names:
            strict = ("-x509_strict", "-purpose", "sslserver", "-verify_hostname", name)
            assert "OK" in openssl("verify", "-CAfile", folder.ca_certificate, *strict, certificate)
        assert "OK" in openssl("verify", "-CAfile", folder.ca_certificate, "-verify_ip", "127.0.0.1", certificate)
        with pytest.raises(subprocess.CalledProcessError):
            openssl("verify", "-CAfile", folder.ca_certificate, "-verify_hostname", "evil.example.org", certificate)
    assert _days(folder.server_certificate) == 397 + 1
    assert _days(folder.ca_certificate) == 3653 + 1
    # Ten years from now; as a whole day is counted, never beyond the authority's.
    assert _days(folder.inner_certificate) in (3653, 3654)
    text = openssl("x509", "-in", folder.ca_certificate, "-noout", "-text")
    assert re.search(r"Basic Constraints: critical\n +CA:TRUE, pathlen:0", text)
    assert "CA:FALSE" in openssl("x509", "-in", folder.server_certificate, "-noout", "-text")


def _days(path: Path) -> int:
    words = openssl("x509", "-in", path, "-noout", "-startdate", "-enddate")
    first, last = (datetime.strptime(each, "%b %d %H:%M:%S %Y GMT") for each in re.findall(r"=(.*)", words))
    return round((last - first) / timedelta(days=1))


@pytest.mark.parametrize(
    ("host", "address", "flag"),
    [("10.1.2.3", "10.1.2.3:9443", "10.1.2.3"), ("2001:db8::7", "[2001:db8::7]:9443", "2001:db8::7")],
)
def test_a_host_may_be_an_address(tmp_path: Path, host: str, address: str, flag: str) -> None:
    folder = made(tmp_path / "c", host=host, port=9443)
    assert folder.coordinator().address == address
    assert "OK" in openssl("verify", "-CAfile", folder.ca_certificate, "-verify_ip", flag, folder.server_certificate)


def test_a_second_init_keeps_every_file(command: Callable[..., Ended], tmp_path: Path) -> None:
    arguments = ("init", tmp_path / "c", "--name", "heart", "--host", "localhost")
    assert command(*arguments)[0] == 0
    before = contents(tmp_path / "c")
    code, out, _ = command(*arguments)
    assert code == 0
    assert contents(tmp_path / "c") == before
    assert "written" not in out
    assert len(re.findall(r"^kept ", out, re.M)) == len(before) - 1  # the authority's key is not looked for


def test_force_writes_texts_anew_and_never_a_key(command: Callable[..., Ended], tmp_path: Path) -> None:
    arguments = ("init", tmp_path / "c", "--name", "heart", "--host", "localhost")
    command(*arguments)
    before = contents(tmp_path / "c")
    (tmp_path / "c" / "nginx" / "nginx.conf").write_text("# edited\n")
    code, out, _ = command(*arguments)
    assert code == 0
    assert "note: nginx/nginx.conf differs" in out
    assert (tmp_path / "c" / "nginx" / "nginx.conf").read_text() == "# edited\n"
    assert command(*arguments, "--force")[0] == 0
    assert contents(tmp_path / "c") == before


def test_new_keys_replaces_them_all_and_what_follows_from_them(tmp_path: Path) -> None:
    settings = made(tmp_path / "c").settings
    before = contents(tmp_path / "c")
    initialise(tmp_path / "c", settings, new_keys=True)
    after = contents(tmp_path / "c")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == SECRETS | {"keys/ca.pem", "keys/server.pem", "keys/superlink.pem", "coordinator.yaml"}
    folder = CoordinatorFolder.open(tmp_path / "c")
    assert "OK" in openssl("verify", "-CAfile", folder.ca_certificate, folder.server_certificate)
    folder.signing_secret()


def test_other_settings_are_refused_without_force(command: Callable[..., Ended], tmp_path: Path) -> None:
    command("init", tmp_path / "c", "--name", "heart", "--host", "localhost")
    before = contents(tmp_path / "c")
    code, _, err = command("init", tmp_path / "c", "--name", "heart", "--host", "fl.example.org", "--port", "9443")
    assert code == 2
    assert "host 'localhost', port 8443" in err
    assert contents(tmp_path / "c") == before
    forced = ("init", tmp_path / "c", "--name", "heart", "--host", "fl.example.org", "--port", "9443", "--force")
    assert command(*forced)[0] == 0
    folder = CoordinatorFolder.open(tmp_path / "c")
    assert folder.coordinator().address == "fl.example.org:9443"
    # The same authority, a certificate for the new name.
    assert contents(tmp_path / "c")["keys/ca.pem"] == before["keys/ca.pem"]
    named = ("-verify_hostname", "fl.example.org")
    assert "OK" in openssl("verify", "-CAfile", folder.ca_certificate, *named, folder.server_certificate)


def test_settings_that_no_option_names_are_kept(command: Callable[..., Ended], tmp_path: Path) -> None:
    code, _, err = command("init", tmp_path / "c", "--name", "heart")
    assert code == 2
    assert "give --name and --host" in err
    assert not (tmp_path / "c").exists()
    command("init", tmp_path / "c", "--name", 'the "heart": study #1', "--host", "localhost", "--port", "9443")
    path = tmp_path / "c" / "server.yaml"
    first = contents(tmp_path / "c")
    values = yaml.safe_load(path.read_text())
    assert values == {
        "schema": "fedbridge.server/1",
        "name": 'the "heart": study #1',
        "host": "localhost",
        "port": 9443,
        "listen": ["0.0.0.0"],
        "superlink_port": 8000,
        "body_megabytes": 16,
    }
    path.write_text(path.read_text().replace("body_megabytes: 16", "body_megabytes: 64"))
    edited = path.read_text()
    code, out, _ = command("init", tmp_path / "c")
    assert code == 0
    assert "note: nginx/nginx.conf differs" in out
    assert contents(tmp_path / "c") == first | {"server.yaml": edited.encode()}
    assert command("init", tmp_path / "c", "--force")[0] == 0
    after = contents(tmp_path / "c")
    assert {name for name in first if first[name] != after[name]} == {
        "server.yaml",
        "nginx/nginx.conf",
        "OPEN-THIS-PORT.md",
    }
    assert after["server.yaml"] == edited.encode()
    assert b"client_max_body_size 64m;" in after["nginx/nginx.conf"]
    # One option changes one setting.
    assert command("init", tmp_path / "c", "--port", "9444")[0] == 2
    assert command("init", tmp_path / "c", "--port", "9444", "--force")[0] == 0
    assert yaml.safe_load(path.read_text()) == values | {"port": 9444, "body_megabytes": 64}


@pytest.mark.parametrize("left", range(1, len(SECRETS | PUBLIC)))
def test_an_interrupted_init_is_completed(tmp_path: Path, left: int) -> None:
    folder = made(tmp_path / "c")
    before = contents(tmp_path / "c")
    order = sorted(before, key=lambda name: (tmp_path / "c" / name).stat().st_mtime_ns)
    for name in order[left:]:
        (tmp_path / "c" / name).unlink()
    initialise(tmp_path / "c", folder.settings)
    after = contents(tmp_path / "c")
    assert set(after) == set(before)
    assert {name: after[name] for name in order[:left]} == {name: before[name] for name in order[:left]}
    folder = CoordinatorFolder.open(tmp_path / "c")
    folder.signing_secret()
    for certificate in (folder.server_certificate, folder.inner_certificate):
        assert "OK" in openssl("verify", "-CAfile", folder.ca_certificate, certificate)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "https://fl.example.org"), "host name or an IP address"),
        (("--host", "fl.example.org:8443"), "host name or an IP address"),
        (("--host", "-x"), "host name or an IP address"),
        (("--host", "a b"), "host name or an IP address"),
        (("--host", "localhost", "--port", "0"), "port"),
        (("--host", "localhost", "--port", "65536"), "port"),
        (("--host", "localhost", "--port", "8000"), "must differ"),
        (("--host", "localhost", "--name", "n" * 65), "name"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_nothing_is_written(
    command: Callable[..., Ended], tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    name = () if "--name" in options else ("--name", "heart")
    code, _, err = command("init", tmp_path / "c", *name, *options)
    assert code == 2
    assert words in err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["with space", "semi;colon", 'quo"te', "dollar$host", "per%cent", "new\nline"])
def test_a_path_that_a_configuration_would_misread_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="path can't be used"):
        made(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused(command: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = command("init", tmp_path / "file", "--name", "heart", "--host", "localhost")
    assert code == 2
    assert "can't be written" in err
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "keys").write_text("")
    assert command("init", tmp_path / "c", "--name", "heart", "--host", "localhost")[0] == 2


def test_a_folder_that_is_none_is_refused(command: Callable[..., Ended], tmp_path: Path) -> None:
    for verb in ("status", "start", "stop", "sites", "renew", "superlink", "proxy", "serve"):
        code, _, err = command(verb, tmp_path)
        assert code == 2, verb
        assert "is not a coordinator's folder" in err
    (tmp_path / "server.yaml").write_text("schema: fedbridge.server/1\nname: heart\nhots: localhost\n")
    code, _, err = command("status", tmp_path)
    assert code == 2
    assert "unknown key 'hots', did you mean 'host'?" in err


def test_renew_keeps_key_and_authority(command: Callable[..., Ended], tmp_path: Path) -> None:
    folder = made(tmp_path / "c")
    expired = certificates.new_certificate(
        folder.server_key.read_bytes(),
        ["localhost"],
        folder.ca_key.read_bytes(),
        folder.ca_certificate.read_bytes(),
        begins=datetime.now(UTC) - timedelta(days=400),
    )
    folder.server_certificate.write_bytes(expired)
    with pytest.raises(subprocess.CalledProcessError):
        openssl("verify", "-CAfile", folder.ca_certificate, folder.server_certificate)
    before = contents(tmp_path / "c")
    code, out, _ = command("renew", tmp_path / "c")
    assert code == 0
    assert "valid until" in out
    assert "nginx" not in out.partition("valid until")[2]
    after = contents(tmp_path / "c")
    assert {name for name in before if before[name] != after[name]} == {"keys/server.pem"}
    assert "OK" in openssl("verify", "-CAfile", folder.ca_certificate, folder.server_certificate)


def test_renew_needs_the_authority_and_says_so(tmp_path: Path) -> None:
    folder = made(tmp_path / "c")
    before, key = folder.server_certificate.read_bytes(), folder.ca_key.read_bytes()
    folder.ca_key.unlink()
    with pytest.raises(EnrolmentError, match="can't be renewed") as refused:
        renew(folder)
    assert str(folder.ca_key) in refused.value.fix
    folder.ca_key.write_bytes(key[:-20])
    with pytest.raises(EnrolmentError, match="damaged"):
        renew(folder)
    folder.ca_key.write_bytes(certificates.new_key())
    with pytest.raises(EnrolmentError, match="does not belong"):
        renew(folder)
    assert folder.server_certificate.read_bytes() == before


def test_the_authoritys_key_may_be_kept_elsewhere(tmp_path: Path) -> None:
    folder = made(tmp_path / "c")
    folder.ca_key.unlink()
    initialise(tmp_path / "c", folder.settings)
    assert not folder.ca_key.exists()


def test_the_page_names_the_ports_and_the_calls(tmp_path: Path) -> None:
    folder = made(tmp_path / "c", host="fl.example.org", port=9443, superlink_port=8123)
    page = (tmp_path / "c" / "OPEN-THIS-PORT.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| 9443 ") or line.startswith("| 8123 ")]
    assert ["**open**" in row for row in rows] == [True, False]
    assert "fl.example.org:9443" in page
    assert page.count("`POST /v1/fleet/") == 10
    assert str(folder.path) in page

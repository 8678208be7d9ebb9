from __future__ import annotations

import base64
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel

from bridge.config import load_model
from bridge.enrolment import EnrolmentRequest
from bridge.errors import EnrolmentError, ServiceError
from client.deployment import units
from client.deployment.init import initialise, site_template
from client.deployment.keys import executor_secret, node_key
from client.deployment.request import make_request, request_text
from client.errors import OutputError, SiteFileError
from client.policy import Policy, load_policy
from client.site import open_site
from client.site_file import SiteFile
from tests.client.deployment.coordinator import Coordinator
from tests.client.sites import build_site

FILES = {
    "site.yaml",
    "policy.yaml",
    "keys/node.key",
    "keys/node.pub",
    "keys/executor.secret",
    "systemd/fedbridge-supernode-north.service",
    "systemd/fedbridge-executor-north.service",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def coordinator(tmp_path: Path) -> Path:
    """A coordinator's file."""
    return Coordinator(tmp_path / "there").write_file(tmp_path / "coordinator-sent.yaml")


def test_a_new_folder_has_all_that_is_needed(tmp_path: Path, coordinator: Path) -> None:
    folder = tmp_path / "north"
    done = initialise(folder, coordinator=coordinator)
    assert set(done.written) == {*FILES, "coordinator.yaml"}
    assert done.kept == []
    assert set(contents(folder)) == set(done.written)
    assert done.coordinator is not None
    assert re.fullmatch(r"([0-9a-f]{4} ){9}[0-9a-f]{4}", done.coordinator.fingerprint)
    assert (folder / "coordinator.yaml").read_bytes() == coordinator.read_bytes()
    assert done.site.name == "north"
    assert load_policy(done.site.policy_path) == Policy(site="north")
    assert {each.name for each in folder.iterdir() if each.is_dir()} == {
        "keys",
        "models",
        "state",
        "studies",
        "systemd",
    }
    for path in ("keys/node.key", "keys/executor.secret"):
        assert mode(folder / path) == 0o600
    assert (mode(folder), mode(folder / "keys")) == (0o700, 0o700)


def test_twice_changes_nothing(tmp_path: Path, coordinator: Path) -> None:
    folder = tmp_path / "north"
    initialise(folder, coordinator=coordinator)
    before = contents(folder)
    for offered in (None, coordinator):
        done = initialise(folder, coordinator=offered)
        assert done.written == []
        assert set(done.kept) == {*FILES, "coordinator.yaml"}
        assert contents(folder) == before


@pytest.mark.parametrize("missing", sorted(FILES))
def test_an_interrupted_call_is_completed(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "north"
    initialise(folder)
    before = contents(folder)
    (folder / missing).unlink()
    done = initialise(folder)
    # Another key has another public half.
    assert set(done.written) == ({missing, "keys/node.pub"} if missing == "keys/node.key" else {missing})
    after = contents(folder)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == set(done.written) & {
        "keys/node.key",
        "keys/node.pub",
        "keys/executor.secret",
    } - ({"keys/node.pub"} if missing == "keys/node.pub" else set())


def test_force_writes_units_anew_and_nothing_of_the_hospitals(tmp_path: Path) -> None:
    folder = tmp_path / "north"
    initialise(folder)
    unit = folder / "systemd" / "fedbridge-executor-north.service"
    original = unit.read_bytes()
    for path in (unit, folder / "policy.yaml", folder / "site.yaml"):
        with path.open("a") as file:
            file.write("# edited\n")
    before = contents(folder)
    done = initialise(folder, force=True)
    assert set(done.written) == {name for name in FILES if name.startswith("systemd/")}
    assert contents(folder) == {**before, str(unit.relative_to(folder)): original}


def test_new_keys_alone_replaces_the_keys(tmp_path: Path) -> None:
    folder = tmp_path / "north"
    initialise(folder)
    before = contents(folder)
    done = initialise(folder, new_keys=True)
    assert set(done.written) == {"keys/node.key", "keys/node.pub", "keys/executor.secret"}
    after = contents(folder)
    assert {name for name in before if before[name] != after[name]} == set(done.written)
    assert mode(folder / "keys/node.key") == mode(folder / "keys/executor.secret") == 0o600


def test_another_coordinator_only_by_force(tmp_path: Path, coordinator: Path) -> None:
    folder = tmp_path / "north"
    initialise(folder, coordinator=coordinator)
    before = contents(folder)
    other = Coordinator(tmp_path / "elsewhere").write_file(tmp_path / "other.yaml")
    with pytest.raises(EnrolmentError, match="is another coordinator's file") as raised:
        initialise(folder, coordinator=other)
    assert "--force" in raised.value.fix
    assert contents(folder) == before
    initialise(folder, coordinator=other, force=True)
    assert (folder / "coordinator.yaml").read_bytes() == other.read_bytes()
    assert (folder / "keys/node.key").read_bytes() == before["keys/node.key"]


@pytest.mark.parametrize("content", ["", "schema: fedbridge.site/1\n", "\x00\xff", "a: [", None])
def test_a_coordinator_file_that_is_none_writes_nothing(tmp_path: Path, content: str | None) -> None:
    sent = tmp_path / "sent.yaml"
    if content is not None:
        sent.write_text(content)
    with pytest.raises(EnrolmentError, match=r"sent\.yaml"):
        initialise(tmp_path / "north", coordinator=sent)
    assert not (tmp_path / "north").exists()


def test_a_site_file_that_is_there_is_kept_and_names_the_site(tmp_path: Path) -> None:
    folder = build_site(tmp_path / "folder", "alpha", models=tmp_path / "models", patients=4)
    before = contents(folder)
    done = initialise(folder)
    assert done.site.name == "alpha"
    assert {"site.yaml", "policy.yaml"} <= set(done.kept)
    assert {name: contents(folder)[name] for name in before} == before
    assert (folder / "systemd" / "fedbridge-executor-alpha.service").exists()
    with pytest.raises(SiteFileError, match="says site: alpha, not beta"):
        initialise(folder, name="beta")
    with pytest.raises(SiteFileError, match=r"says deployment\.port: 9094, not 9095"):
        initialise(folder, port=9095)


@pytest.mark.parametrize(("folder", "name"), [("no rth", ""), ("north", "no/rth"), ("north", "x" * 64)])
def test_a_name_that_is_no_plain_word(tmp_path: Path, folder: str, name: str) -> None:
    with pytest.raises(SiteFileError, match="can't be a site's name"):
        initialise(tmp_path / folder, name=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a'b", 'a"b', "a\\b", "a\nb", "a$b"])
def test_a_folder_that_a_unit_file_cannot_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ServiceError, match="can't take this path"):
        initialise(tmp_path / name, name="north")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a folder read-only for root too, by its attributes")
def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "north"
    folder.mkdir()
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(place)], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        with pytest.raises(OutputError, match="the site's folder can't be written") as raised:
            initialise(place, name="north")
        assert raised.value.exit_code == 7
        assert "Read-only file system" in raised.value.why
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "north").write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        initialise(tmp_path / "north")
    with pytest.raises(OutputError, match="can't be written"):
        initialise(tmp_path / "north" / "below")


def test_the_template_is_a_site_file_of_defaults_with_every_key(tmp_path: Path) -> None:
    text = site_template("north", 9200)
    path = tmp_path / "site.yaml"
    path.write_text(text)
    site = load_model(path, SiteFile)
    assert (site.site, site.deployment.port) == ("north", 9200)
    assert keys_of(SiteFile) - keys_in(yaml.safe_load(text)) == {"labels.path"}
    assert "# path: labels.csv" in text
    plain = SiteFile(
        site="north",
        folder=Path("recordings"),
        reader=site.reader,
        old=site.old,
        new=site.new,
        window=site.window,
        splits=site.splits,
        models=site.models,
        policy=site.policy,
        deployment=site.deployment,
    )
    assert site == plain


def keys_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        kinds = [each for each in (kind, *getattr(kind, "__args__", ())) if isinstance(each, type)]
        inner = [each for each in kinds if issubclass(each, BaseModel)]
        key = prefix + (field.alias or name)
        found |= keys_of(inner[0], key + ".") if inner else {key}
    return found


def keys_in(value: Any, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, inner in value.items():
        if isinstance(inner, dict) and prefix + key != "reader.options":
            found |= keys_in(inner, f"{prefix}{key}.")
        else:
            found.add(prefix + key)
    return found


def test_the_request_is_signed_by_the_key(tmp_path: Path) -> None:
    site = initialise(tmp_path / "north").site
    request = make_request(site)
    again = EnrolmentRequest.model_validate(yaml.safe_load(request_text(request)))
    assert again == request
    public_text = (site.keys_folder / "node.pub").read_text()
    assert public_text == request.public_key + "\n"
    public = serialization.load_ssh_public_key(public_text.encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public.curve.name == "secp384r1"
    signature = base64.b64decode(request.signature)
    content = b'["fedbridge.request/1","north","' + request.public_key.encode() + b'"]'
    public.verify(signature, content, ec.ECDSA(hashes.SHA384()))
    with pytest.raises(InvalidSignature):
        public.verify(signature, content.replace(b"north", b"south"), ec.ECDSA(hashes.SHA384()))


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no OpenSSH here")
def test_openssh_reads_the_key(tmp_path: Path) -> None:
    site = initialise(tmp_path / "north").site
    done = subprocess.run(
        ["ssh-keygen", "-y", "-f", site.keys_folder / "node.key"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[:2] == (site.keys_folder / "node.pub").read_text().split()


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o666, 0o610])
@pytest.mark.parametrize("name", ["node.key", "executor.secret"])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, name: str, bits: int) -> None:
    site = initialise(tmp_path / "north").site
    (site.keys_folder / name).chmod(bits)
    read = node_key if name == "node.key" else executor_secret
    with pytest.raises(EnrolmentError, match=f"others may read or change it \\(mode {bits:o}\\)") as raised:
        read(site)
    assert raised.value.exit_code == 5
    with pytest.raises(EnrolmentError, match="others may read"):
        initialise(site.folder)
    initialise(site.folder, new_keys=True)
    read(site)


def test_a_keys_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    site = initialise(tmp_path / "north").site
    site.keys_folder.chmod(0o777)
    for read in (node_key, executor_secret):
        with pytest.raises(EnrolmentError, match="others may replace the keys"):
            read(site)


def test_a_secret_that_is_none(tmp_path: Path) -> None:
    site = initialise(tmp_path / "north").site
    key = site.keys_folder / "node.key"
    whole = key.read_bytes()
    for content in (b"", whole[:-80], b"\x00" * 100, rsa_key(), p256_key()):
        key.write_bytes(content)
        with pytest.raises(EnrolmentError, match="is not a node's key"):
            node_key(site)
    key.unlink()
    with pytest.raises(EnrolmentError, match="can't be read"):
        node_key(site)
    secret = site.keys_folder / "executor.secret"
    secret.write_bytes(secret.read_bytes()[:40])
    with pytest.raises(EnrolmentError, match="is not an executor's secret"):
        executor_secret(site)


def rsa_key() -> bytes:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return openssh(rsa.generate_private_key(65537, 2048))


def p256_key() -> bytes:
    return openssh(ec.generate_private_key(ec.SECP256R1()))


def openssh(key: Any) -> bytes:
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    assert isinstance(content, bytes)
    return content


@pytest.fixture
def unit_folder(tmp_path: Path) -> Path:
    """Of a site whose paths hold a blank and a per cent sign, with its cache elsewhere."""
    folder = tmp_path / "a clinic 100%" / "north"
    initialise(folder)
    text = (folder / "site.yaml").read_text()
    (folder / "site.yaml").write_text(text.replace("folder: cache", f"folder: {tmp_path / 'fast disk'}"))
    initialise(folder, force=True)
    return folder / "systemd"


def test_units_say_what_each_may(unit_folder: Path) -> None:
    executor, supernode = (path.read_text().splitlines() for path in sorted(unit_folder.iterdir()))
    folder = str(unit_folder.parent).replace("%", "%%")
    cache = unit_folder.parents[2] / "fast disk"
    assert f'ReadWritePaths="{folder}" "{cache}"' in executor
    assert f'ReadWritePaths="{folder}/state"' in supernode
    assert {"IPAddressDeny=any", "IPAddressAllow=localhost"} <= set(executor)
    assert f'InaccessiblePaths="-{folder}/keys/node.key"' in executor
    assert f'ReadOnlyPaths="-{folder}/policy.yaml"' in executor
    hidden = {line for line in supernode if line.startswith("InaccessiblePaths")}
    assert f'InaccessiblePaths="-{folder}/recordings"' in hidden
    assert f'InaccessiblePaths="-{cache}"' in hidden
    for lines in (executor, supernode):
        assert {"User=fedbridge", "ProtectSystem=strict", "NoNewPrivileges=yes", "PrivateTmp=yes"} <= set(lines)
        assert {"Restart=always", "RestartSec=15", "LimitCORE=0"} <= set(lines)
        assert not any(line.startswith("ExecStart=") and "sh -c" in line for line in lines)
    (command,) = (line for line in supernode if line.startswith("ExecStart="))
    assert command.endswith(f'/fedbridge-site supernode "{folder}/site.yaml"')


def test_a_graphics_processor_is_seen_where_the_site_file_asks_for_it_by_the_executor_alone(tmp_path: Path) -> None:
    initialise(tmp_path / "north")
    path = tmp_path / "north" / "site.yaml"
    for device, seen in (("cpu", False), ("auto", True), ("cuda", True)):
        path.write_text(re.sub("device: [a-z]+", f"device: {device}", path.read_text()))
        initialise(tmp_path / "north", force=True)
        executor, supernode = (each.read_text().splitlines() for each in sorted((path.parent / "systemd").iterdir()))
        # Of a setting given twice the last one holds.
        assert ([line for line in executor if line.startswith("PrivateDevices=")][-1] == "PrivateDevices=no") is seen
        assert ({"DevicePolicy=closed", "DeviceAllow=char-nvidia* rw"} <= set(executor)) is seen
        assert "PrivateDevices=no" not in supernode
    if shutil.which("systemd-analyze") is not None:
        units_ = sorted((path.parent / "systemd").iterdir())
        done = subprocess.run(["systemd-analyze", "verify", *units_], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_folder_that_the_supernode_needs_is_not_hidden_from_it(tmp_path: Path) -> None:
    initialise(tmp_path / "north")
    path = tmp_path / "north" / "site.yaml"
    path.write_text(path.read_text().replace("folder: recordings", "folder: ."))
    text = units.unit_texts(open_site(path))["fedbridge-supernode-north.service"]
    assert f"InaccessiblePaths=-{path.parent}\n" not in text
    assert f"InaccessiblePaths=-{path.parent}/ledger.sqlite\n" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_the_units_and_finds_little_exposed(unit_folder: Path) -> None:
    paths = sorted(unit_folder.iterdir())
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for path in paths:
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", path],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout
        assert re.search(r"Overall exposure level for .*: [01]\.\d OK", done.stdout)

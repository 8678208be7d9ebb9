"""The door's configuration and the units, judged by the programs that will read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    FLWR_COMPONENT_NAME_METADATA_KEY,
    FLWR_PACKAGE_NAME_METADATA_KEY,
    FLWR_PACKAGE_VERSION_METADATA_KEY,
)

from bridge.errors import ServiceError
from server.coordinator import nginx, units
from tests.server.coordinator.places import made

needs_nginx = pytest.mark.skipif(nginx.program() is None, reason="nginx is not installed")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


@needs_nginx
@pytest.mark.parametrize("settings", [{}, {"listen": ("127.0.0.1", "::1")}, {"body_megabytes": 64, "name": "a; b\n{"}])
def test_nginx_takes_the_configuration(tmp_path: Path, settings: dict[str, object]) -> None:
    folder = made(tmp_path / "c", **settings)
    nginx.check_configuration(folder)
    assert not (folder.nginx / "nginx.pid").exists() or not (folder.nginx / "nginx.pid").read_text().strip()


@needs_nginx
@pytest.mark.parametrize(
    ("path", "content"), [("nginx/nginx.conf", "events {"), ("nginx/nginx.conf", None), ("keys/server.pem", "no PEM")]
)
def test_what_nginx_refuses_is_told_with_its_words(tmp_path: Path, path: str, content: str | None) -> None:
    folder = made(tmp_path / "c")
    if content is None:
        (folder.path / path).unlink()
    else:
        (folder.path / path).write_text(content)
    with pytest.raises(ServiceError, match="nginx refuses") as refused:
        nginx.check_configuration(folder)
    assert path.rpartition("/")[2] in refused.value.why


def test_without_nginx_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "c")
    monkeypatch.setattr(nginx, "program", lambda: None)
    with pytest.raises(ServiceError, match="nginx is not installed"):
        nginx.check_configuration(folder)


def test_the_calls_are_flowers_own_but_for_the_two_that_enrol_by_themselves() -> None:
    from flwr.supernode import fleet_http_client

    text = Path(fleet_http_client.__file__).read_text(encoding="utf-8")
    theirs = re.findall(r'path="/v1/fleet/([a-z-]+)"', text)
    assert sorted({*nginx.FLEET_CALLS, "register-node", "unregister-node"}) == sorted(theirs)


def test_every_header_that_flower_reads_goes_through() -> None:
    read = (
        FLEET_HTTP_PUBLIC_KEY_HEADER,
        FLEET_HTTP_SIGNATURE_HEADER,
        TIMESTAMP_HEADER,
        FLWR_PACKAGE_NAME_METADATA_KEY,
        FLWR_PACKAGE_VERSION_METADATA_KEY,
        FLWR_COMPONENT_NAME_METADATA_KEY,
    )
    assert set(read) <= set(nginx.HEADERS)


def test_nothing_outside_the_folder_is_written_by_nginx(tmp_path: Path) -> None:
    folder = made(tmp_path / "c")
    text = re.sub(r"#.*", "", folder.nginx_configuration.read_text())
    written = re.findall(r"(?:^|\s)(?:pid|error_log|access_log|\w+_temp_path) (\S+)", text)
    assert len(written) == 9
    assert {each.rstrip(";") for each in written if not each.startswith(str(folder.nginx))} == {"off"}


@needs_systemd
def test_systemd_takes_the_units_and_finds_them_hardened(tmp_path: Path) -> None:
    folder = made(tmp_path / "c")
    for path in sorted(folder.systemd.iterdir()):
        verified = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
        # Whether the user exists is for the machine that it is installed on.
        assert (verified.returncode, verified.stderr.strip()) == (0, ""), path
        judged = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=20", path],
            capture_output=True,
            text=True,
            check=False,
        )
        assert judged.returncode == 0, judged.stdout


def directives(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_units_run_as_an_own_user_that_writes_its_folder_alone(tmp_path: Path) -> None:
    folder = made(tmp_path / "c")
    for name in (units.SUPERLINK_UNIT, units.EXECUTOR_UNIT, units.NGINX_UNIT):
        unit = directives((folder.systemd / name).read_text())
        assert unit["User"] == unit["Group"] == ["fedbridge"]
        assert unit["ProtectSystem"] == ["strict"]
        assert unit["ReadWritePaths"] == [str(folder.path)]
        assert unit["NoNewPrivileges"] == unit["PrivateTmp"] == ["yes"]
        assert unit["CapabilityBoundingSet"] == [""]
        assert unit["Restart"] == ["always"]
        assert unit["ExecStart"][0].split()[0].endswith("/fedbridge-server")
        assert Path(unit["ExecStart"][0].split()[0]).exists()
    superlink = directives((folder.systemd / units.SUPERLINK_UNIT).read_text())
    assert (superlink["IPAddressDeny"], superlink["IPAddressAllow"]) == (["any"], ["localhost"])


def test_a_low_port_and_a_folder_at_home_get_what_they_need_and_no_more(tmp_path: Path) -> None:
    folder = made(tmp_path / "c", port=443)
    unit = directives((folder.systemd / units.NGINX_UNIT).read_text())
    assert unit["CapabilityBoundingSet"] == unit["AmbientCapabilities"] == ["CAP_NET_BIND_SERVICE"]
    assert directives((folder.systemd / units.SUPERLINK_UNIT).read_text())["CapabilityBoundingSet"] == [""]
    moved = units.unit_texts(type(folder)(Path("/home/someone/coordinator"), folder.settings))
    assert all(directives(text)["ProtectHome"] == ["read-only"] for text in moved.values())

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import yaml

from bridge.errors import EnrolmentError, ServiceError
from client.cli import main
from client.deployment import services, supernode
from client.deployment.init import initialise
from client.deployment.services import start_site
from client.deployment.status import ServiceLine, parse_systemctl, site_status, status_lines
from client.effort import Effort, record_effort
from client.site import Site
from tests.client.deployment.coordinator import Coordinator
from tests.client.deployment.deployed import accept_code
from tests.waiting import free_port


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `fedbridge-site WORDS`."""
    monkeypatch.setattr(sys, "argv", ["fedbridge-site", *map(str, words)])
    try:
        main()
        code: object = 0
    except SystemExit as exit_:
        code = exit_.code or 0
    out, err = capsys.readouterr()
    assert isinstance(code, int)
    return code, out, err


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    """One that does not run."""
    return Coordinator(tmp_path / "there")


@pytest.fixture
def site(tmp_path: Path, coordinator: Coordinator) -> Site:
    sent = coordinator.write_file(tmp_path / "sent.yaml")
    return initialise(tmp_path / "north", coordinator=sent, port=free_port()).site


def test_a_site_that_was_never_started(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, monkeypatch, "status", site.folder)
    assert (code, err) == (1, "")
    assert out.splitlines()[:3] == ["site 'north'", "  supernode   does not run", "  executor    does not run"]
    assert "PROBLEM the connection is refused" in out
    assert "no study was accepted yet" in out
    assert "no message was answered yet" in out
    monkeypatch.chdir(site.folder)
    code, out, err = run(capsys, monkeypatch, "status", "--json")
    told = json.loads(out)
    assert code == 1
    assert (told["well"], told["site"], told["studies"], told["messages"]) == (False, "north", [], [])


def test_studies_and_messages_are_told(site: Site, coordinator: Coordinator) -> None:
    accept_code(site, coordinator.secret, "ab" * 32)
    for round_ in range(1, 15):
        effort = Effort("2025-01-01T10:00:00+00:00", "7", "train", round_, 2.5, 300_000_000, "OK")
        record_effort(site.state_folder / "messages.jsonl", effort)
    status = site_status(site)
    (study,) = status.studies
    assert (study.state, study.who) == ("accepted", "a test")
    assert [each.round for each in status.messages] == list(range(5, 15))
    lines = status_lines(status)
    assert any(line.split()[1:] == ["train", "round", "14", "OK", "2.5", "s,", "300", "MB"] for line in lines)
    (folder,) = (each for each in site.studies_folder.iterdir() if each.is_dir())
    (folder / "job.yaml").write_text("another")
    broken = site_status(site)
    assert broken.studies == ()
    assert "job.yaml" in broken.studies_problem
    assert not broken.well


def test_what_systemd_says() -> None:
    text = (
        "MainPID=71\nNRestarts=3\nActiveState=active\nActiveEnterTimestamp=Mon 2025-01-06 10:00:00 UTC\n\n"
        "MainPID=0\nNRestarts=9\nActiveState=activating\nActiveEnterTimestamp=\n"
    )
    assert parse_systemctl(text, ("supernode", "executor")) == [
        ServiceLine("supernode", 71, 3, "Mon 2025-01-06 10:00:00 UTC", "systemd"),
        ServiceLine("executor", None, 9, "", "systemd"),
    ]
    unknown = "MainPID=0\nNRestarts=0\nActiveState=inactive\n\nMainPID=0\nActiveState=inactive\n"
    assert parse_systemctl(unknown, ("supernode", "executor")) == []


def test_a_port_that_is_taken(site: Site) -> None:
    """As by the other site of the machine."""
    port = site.file.deployment.port
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ServiceError, match=f"port {port} on 127.0.0.1 is taken") as raised:
            start_site(site)
    assert "its own deployment.port" in raised.value.fix


@pytest.mark.parametrize("missing", ["coordinator.yaml", "keys/node.key", "keys/executor.secret"])
def test_start_refuses_what_is_incomplete(site: Site, missing: str) -> None:
    (site.folder / missing).unlink()
    with pytest.raises(EnrolmentError, match=Path(missing).name):
        start_site(site)
    assert not (site.state_folder / "services.json").exists()


def test_start_refuses_a_key_that_others_may_read(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.keys_folder / "node.key").chmod(0o644)
    code, out, err = run(capsys, monkeypatch, "start", site.folder)
    assert (code, out) == (5, "")
    assert "node.key: others may read or change it (mode 644)" in err


def test_a_state_folder_that_is_a_file(site: Site) -> None:
    (site.state_folder / "flower").rmdir()
    site.state_folder.rmdir()
    site.state_folder.write_text("")
    with pytest.raises(ServiceError, match="can't be written"):
        start_site(site)


def test_stop_without_start(site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(capsys, monkeypatch, "stop", site.folder) == (0, "nothing was running\n", "")


def test_request_by_command(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, monkeypatch, "request", site.folder)
    assert code == 0
    assert yaml.safe_load(out)["site"] == "north"
    assert "fingerprint, to read to the coordinator by telephone" in err
    code, out, _ = run(capsys, monkeypatch, "request", site.folder, "--out", tmp_path / "north.yaml")
    assert (code, out) == (0, "")
    assert yaml.safe_load((tmp_path / "north.yaml").read_text())["site"] == "north"
    code, _, err = run(capsys, monkeypatch, "request", site.folder, "--out", tmp_path / "no" / "north.yaml")
    assert code == 7
    assert "can't be written" in err
    code, _, err = run(capsys, monkeypatch, "request", tmp_path)
    assert code == 2
    assert "Traceback" not in err


def test_init_by_command(
    tmp_path: Path, coordinator: Coordinator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = coordinator.write_file(tmp_path / "sent.yaml")
    code, out, _ = run(capsys, monkeypatch, "init", tmp_path / "west", "--coordinator", sent)
    assert code == 0
    assert coordinator.file().fingerprint in out
    assert "fedbridge-site check" in out
    assert "fedbridge-site rehearse STUDY.zip" in out
    code, out, _ = run(capsys, monkeypatch, "init", tmp_path / "west")
    assert "  written" not in out
    assert "  kept  keys/node.key" in out


def test_what_flower_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.common.config import parse_config_args

    words = supernode.supernode_arguments(site)
    told = dict(zip(words[::2], words[1::2], strict=True))
    assert told["--isolation"] == "process"
    assert (told["--host"], told["--port"]) == ("127.0.0.1", str(site.file.deployment.port))
    assert told["--auth-supernode-private-key"] == str(site.keys_folder / "node.key")
    assert "BEGIN CERTIFICATE" in Path(told["--root-certificates"]).read_text()
    assert not any("insecure" in word or "allow-runtime" in word for word in words)
    assert parse_config_args([told["--node-config"]]) == {"site": str(site.path)}
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    for service in services.site_services(site):
        assert "PYTHONPATH" not in service.environment
        assert service.environment["PYTHONSAFEPATH"] == "1"
        assert service.environment["FLWR_HOME"] == str(site.state_folder / "flower")


@pytest.mark.parametrize("name", ["plain", "with blank", "it's", 'a "b"', "back\\slash", "ü=1.toml"])
def test_flower_reads_the_path_of_the_site(tmp_path: Path, name: str) -> None:
    from flwr.common.config import parse_config_args

    from client.site import open_site
    from tests.client.deployment.deployed import plain_site

    site = plain_site(tmp_path / name, 9094)
    assert parse_config_args([supernode.node_config(open_site(site.folder))]) == {"site": str(site.path)}


def test_a_path_that_flower_can_not_take(tmp_path: Path) -> None:
    from tests.client.deployment.deployed import plain_site

    with pytest.raises(ServiceError, match="Flower can't take this path"):
        supernode.node_config(plain_site(tmp_path / 'it\'s "so"', 9094))

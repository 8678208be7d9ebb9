"""The real executor process against Flower's real SuperNode API, with tasks of every type waiting there."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from flwr.supercore.constant import TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResultStatus
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from bridge.processes import ProcessId, descendants, end, process_id
from client.deployment.clientapp import SITE_VARIABLE
from client.deployment.executor import PinnedExecutor
from client.site import Site
from tests.client.deployment.coordinator import BIN, FLOWER, process, wait_for
from tests.client.deployment.deployed import plain_site
from tests.waiting import free_port

pytestmark = pytest.mark.slow

OTHERS = frozenset(TaskType) - {TaskType.CLIENT_APP}


@dataclass
class Node:
    """A SuperNode's own API on the site's port, without a coordinator behind it."""

    site: Site
    state: NodeState
    folder: Path

    def statuses(self) -> dict[str, str]:
        """Of the task of each type."""
        return {task.type: task.status.status for task in self.state.get_tasks()}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    site = plain_site(tmp_path / "north", free_port())
    secret = (site.keys_folder / "executor.secret").read_bytes()
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    state = factory.state()
    state.set_node_id(5)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(state_factory=factory, superexec_auth_secret=secret),
            host="127.0.0.1",
            port=site.file.deployment.port,
            log_level="warning",
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    for task_type in TaskType:
        assert state.create_task(task_type=task_type, run_id=7) is not None
    yield Node(site, state, tmp_path)
    server.should_exit = True
    thread.join()


@contextmanager
def executor(node: Node) -> Iterator[subprocess.Popen[bytes]]:
    command = (BIN / "fedbridge-site", "executor", node.site.folder)
    with process(*command, log=node.folder / "executor.out", cwd=node.folder) as started:
        yield started


def test_client_app_tasks_alone_are_taken(node: Node) -> None:
    before = node.statuses()
    assert set(before) == {str(each) for each in TaskType}
    assert set(before.values()) == {"pending"}
    with executor(node):
        wait_for(lambda: node.statuses()[TaskType.CLIENT_APP] != "pending")
        time.sleep(3)
    assert {name: status for name, status in node.statuses().items() if status == "pending"} == {
        str(each): "pending" for each in OTHERS
    }


def test_flowers_own_executor_would_take_them_all(node: Node) -> None:
    """The control: what the test above sees depends on our executor, not on the tasks."""
    command = [BIN / "flower-superexec", "--insecure", "--superexec-auth-secret-file"]
    command += [node.site.keys_folder / "executor.secret"]
    command += ["--runtime-api-address", f"127.0.0.1:{node.site.file.deployment.port}"]
    with process(*command, log=node.folder / "stock.out", cwd=node.folder, environment={"PATH": str(BIN)}):
        wait_for(lambda: "pending" not in node.statuses().values())


def test_nothing_is_handed_over_without_the_secret(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """Neither to our executor with another secret nor to Flower's without one; both end by themselves."""
    secret = node.site.keys_folder / "executor.secret"
    secret.write_text("00" * 32)
    with executor(node) as started:
        started.wait(60)
    assert caplog.text.count("SuperExec authentication failed") == 1
    stock = [str(BIN / "flower-superexec"), "--insecure", "--runtime-api-address"]
    stock += [f"127.0.0.1:{node.site.file.deployment.port}"]
    subprocess.run(stock, env=FLOWER | {"PATH": str(BIN)}, capture_output=True, timeout=60, check=False)
    assert caplog.text.count("SuperExec authentication failed") == 2
    assert set(node.statuses().values()) == {"pending"}


def test_a_secret_that_is_missing_starts_nothing(node: Node) -> None:
    (node.site.keys_folder / "executor.secret").unlink()
    with executor(node) as started:
        assert started.wait(60) == 5
    assert "executor.secret: can't be read" in (node.folder / "executor.out").read_text()


def spec(task_type: TaskType, token: str) -> ExecutionSpec:
    return ExecutionSpec(
        task_type=task_type,
        runtime_api_address=f"127.0.0.1:{free_port()}",
        token=token,
        insecure=True,
        root_certificates_path=None,
        runtime_dependency_install=False,
        parent_pid=os.getpid(),
        suppress_output=False,
        task_id=1,
    )


@pytest.mark.parametrize("task_type", sorted(OTHERS))
def test_a_task_of_another_type_would_not_be_started(task_type: TaskType) -> None:
    before = children()
    assert PinnedExecutor().launch(spec(task_type, "token")).status == LaunchResultStatus.FAILED
    assert PinnedExecutor().get_eligible_capacity(set(TaskType)) == ({TaskType.CLIENT_APP}, set())
    assert children() == before


def test_the_token_is_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other users of the machine see command lines; whoever has the token can fetch the message and answer it."""
    monkeypatch.setenv(SITE_VARIABLE, str(plain_site(tmp_path / "north", 9094).path))
    before = children()
    assert PinnedExecutor().launch(spec(TaskType.CLIENT_APP, "a-secret-token")).status == LaunchResultStatus.ACCEPTED
    (started,) = children() - before
    try:
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            words = Path(f"/proc/{started.pid}/cmdline").read_bytes()
            assert b"a-secret-token" not in words
            time.sleep(0.1)
        assert b"client.deployment.clientapp" in words
        # Only the user that runs it sees the environment.
        assert b"a-secret-token" in Path(f"/proc/{started.pid}/environ").read_bytes()
        assert Path(f"/proc/{started.pid}/environ").stat().st_mode & 0o077 == 0
    finally:
        end([started])


def children() -> set[ProcessId]:
    me = process_id(os.getpid())
    assert me is not None
    return {each for each in descendants(me) if each.parent == me.pid}

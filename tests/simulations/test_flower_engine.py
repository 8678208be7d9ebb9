"""Flower's own simulation driven from outside, with a small app: success, failure, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
import uuid
from pathlib import Path

import pytest

from bridge.bundle import build_app
from bridge.hashing import sha256_json
from bridge.run_config import APP_COMPONENTS, RUN_CONFIG_DEFAULTS, toml_text
from simulations.errors import EngineError
from simulations.federation import federation_config
from simulations.flower_engine import MARK, end_processes, marked_processes, run_flower

ROOT = Path(__file__).resolve().parents[2]
OWN = "TEST_OF_THE_ENGINE"

APP = """
import os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

app = ServerApp()
site = ClientApp()


@site.query("name")
def name(message, context):
    told = {"partition": context.node_config["partition-id"], "folder": os.getcwd(), "file": __file__}
    return Message(RecordDict({"c": ConfigRecord(told)}), reply_to=message)


@app.main()
def main(grid, context):
    deadline = time.monotonic() + 60
    while len(list(grid.get_node_ids())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    with open(context.run_config["out"], "a") as file:
        for node in grid.get_node_ids():
            (reply,) = grid.send_and_receive([Message(RecordDict(), node, "query.name")], timeout=60)
            file.write("{partition} {folder} {file}\\n".format(**reply.content["c"]))
    if context.run_config["mode"] == "raise":
        raise ValueError("the coordinator stumbled")
    if context.run_config["mode"] == "hang":
        open(context.run_config["out"] + ".hangs", "w").close()
        time.sleep(600)
"""

PYPROJECT = """
[project]
name = "tiny"
version = "0.1.0"
description = "a tiny app"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedbridge"
[tool.flwr.app.components]
serverapp = "tiny:app"
clientapp = "tiny:site"
[tool.flwr.app.config]
mode = "ok"
out = ""
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "tiny.py").write_text(APP)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "run").mkdir()
    return tmp_path


def run(folder: Path, **config: str) -> None:
    values = {"out": str(folder / "out.txt"), **config}
    run_flower(folder / "app", values, federation_config(2, 2), folder / "run")


def mark_of(folder: Path) -> str:
    return sha256_json(str((folder / "run").resolve()))[:32]


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word in the environment of all that a test starts: other tests run Flower beside it."""
    monkeypatch.setenv(OWN, uuid.uuid4().hex)


def ray_processes() -> set[int]:
    """This test's processes of Flower and Ray, found without the engine's mark."""
    own = f"{OWN}={os.environ[OWN]}".encode()
    names = (b"raylet", b"gcs_server", b"flower-superlink", b"flower-superexec", b"flwr-simulation", b"ray::")
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            mine = entry.name.isdigit() and own in (entry / "environ").read_bytes().split(b"\0")
            if mine and any(name in (entry / "cmdline").read_bytes() for name in names):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_run_completes_in_a_neutral_folder_and_leaves_nothing(tiny: Path) -> None:
    run(tiny)
    lines = [line.split() for line in (tiny / "out.txt").read_text().splitlines()]
    assert sorted(line[0] for line in lines) == ["0", "1"]
    for _, folder, file in lines:
        assert not Path(folder).is_relative_to(ROOT)  # the SuperLink did not start where the sources lie
        assert "/apps/" in file  # and what ran is the bundle's copy
        assert not Path(file).exists()  # of a home that is gone
    assert ray_processes() == set()
    assert marked_processes(mark_of(tiny)) == []


@pytest.mark.slow
def test_a_failing_run_says_so_keeps_the_log_and_leaves_nothing(tiny: Path) -> None:
    with pytest.raises(EngineError, match="the run on Flower failed") as caught:
        run(tiny, mode="raise")
    assert "the coordinator stumbled" in caught.value.why
    assert "the coordinator stumbled" in (tiny / "run" / "flower.log").read_text()
    assert ray_processes() == set()


@pytest.mark.slow
def test_an_unknown_key_is_told_in_flowers_words(tiny: Path) -> None:
    with pytest.raises(EngineError, match="did not start") as caught:
        run(tiny, nonsense="1")
    assert "Invalid run configuration" in caught.value.why
    assert marked_processes(mark_of(tiny)) == []


@pytest.mark.slow
def test_control_c_ends_everything(tiny: Path) -> None:
    # What a shell has put into the background ignores SIGINT, and so would the child.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pathlib import Path; from tests.simulations.test_flower_engine import run; "
        f"run(Path({str(tiny)!r}), mode='hang')"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (tiny / "out.txt.hangs").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (tiny / "out.txt.hangs").exists()
    assert len(ray_processes()) >= 3
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=60)
    assert child.returncode != 0
    assert "KeyboardInterrupt" in told
    assert ray_processes() == set()


@pytest.mark.slow
def test_what_a_killed_run_left_is_ended_by_the_next_on_that_folder(tiny: Path) -> None:
    environment = os.environ | {MARK: mark_of(tiny)}
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment)
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env=os.environ | {MARK: "another run's"}
    )
    try:
        time.sleep(0.3)
        assert marked_processes(mark_of(tiny)) == [left.pid]
        end_processes(mark_of(tiny))
        assert left.wait(5) == -signal.SIGTERM
        assert other.poll() is None
    finally:
        left.kill()
        other.kill()
        left.wait()
        other.wait()


def test_the_app_holds_the_three_packages_and_the_repositorys_run_config(tmp_path: Path) -> None:
    app = build_app(tmp_path / "app")
    written = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert written["config"] == own["config"] == dict(RUN_CONFIG_DEFAULTS)
    assert written["components"] == own["components"] == dict(APP_COMPONENTS)
    shipped = {path.relative_to(app).as_posix() for path in app.rglob("*.py")}
    expected = {
        path.relative_to(ROOT).as_posix()
        for name in ("bridge", "client", "server")
        for path in (ROOT / name).rglob("*.py")
    }
    assert shipped == expected
    assert "bridge/messages.py" in shipped


@pytest.mark.parametrize(
    "text",
    ["", "one line", 'quotes " and \\ and #', "a: 1\nb: 'x'\n", '"""\ntriple\n"""', "tab\tend\n\n", "Ümläut\x7f"],
)
def test_toml_gives_every_text_back(text: str) -> None:
    values = {"job": text, "flag": True, "off": False, "n": 3, "x": 0.1}
    assert tomllib.loads(toml_text(values)) == values

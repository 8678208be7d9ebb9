"""Real interpreters on small installations: a wheel's, with the hashes that an installer writes down."""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from bridge.errors import CodeError
from bridge.flower_names import flower_module, replace_names
from bridge.installation import check_installation
from client.deployment.clientapp import pinned_clientapp
from client.deployment.executor import pinned_superexec
from tests.client.deployment.coordinator import BIN
from tests.client.deployment.deployed import plain_site
from tests.conftest import ROOT

CHECK = "from bridge.installation import check_installation; check_installation(); print('sound')"


def install(place: Path) -> Path:
    """The packages as a wheel leaves them."""
    info = place / "fedbridge-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fedbridge\nVersion: 0.1.0\n")
    rows = ["fedbridge-0.1.0.dist-info/METADATA,,"]
    for name in ("bridge", "client", "server"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in sorted((place / name).rglob("*.*")):
            if path.is_file():
                digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
                rows.append(f"{path.relative_to(place)},sha256={digest},{path.stat().st_size}")
    (info / "RECORD").write_text("\n".join(rows) + "\n")
    return place


def python(*places: Path, code: str = CHECK, cwd: Path | None = None) -> tuple[str, str]:
    """What a fresh interpreter prints and says with these folders first on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=cwd, capture_output=True, text=True, timeout=60
    )
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("installed"))


def copy(installed: Path, place: Path) -> Path:
    return shutil.copytree(installed, place)


def test_this_installation_and_a_wheels_are_sound(installed: Path) -> None:
    check_installation()
    assert python(installed) == ("sound\n", "")


@pytest.mark.parametrize("name", ["bridge", "client", "server"])
def test_another_package_of_that_name_in_the_way(installed: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(installed / name, tmp_path / name)
    error = python(tmp_path, installed)[1]
    assert f"bridge.errors.CodeError: the package '{name}' is not fedbridge's own" in error
    assert str(tmp_path / name) in error


def test_another_distribution_that_brought_a_package_of_that_name(installed: Path, tmp_path: Path) -> None:
    place = copy(installed, tmp_path / "mixed")
    (place / "client" / "__init__.py").write_text("'''another client'''\n")
    assert "CodeError: 1 file(s) of fedbridge are not as they were installed" in python(place)[1]
    assert "client/__init__.py" in python(place)[1]


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_a_file_that_is_not_as_it_was_installed(installed: Path, tmp_path: Path, change: str) -> None:
    place = copy(installed, tmp_path / "site-packages")
    path = place / "client" / ("app.py" if change != "added" else "extra.py")
    if change == "removed":
        path.unlink()
    else:
        with path.open("a") as file:
            file.write("# one more line\n")
    error = python(place)[1]
    assert f"CodeError: 1 file(s) of fedbridge are not as they were installed, the first is client/{path.name}" in error


@pytest.mark.parametrize("version", ["1.40.9", "1.42.0", "2.41.0"])
def test_another_flower(tmp_path: Path, version: str) -> None:
    info = tmp_path / f"flwr-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flwr\nVersion: {version}\n")
    assert f"CodeError: Flower {version}: not the tested version 1.41" in python(tmp_path)[1]


def test_the_command_refuses_before_anything_of_the_other_package_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    code = "from bridge.entry import site; site()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 5
    assert done.stderr.startswith("error: the package 'client' is not fedbridge's own\n")
    assert "Traceback" not in done.stderr
    assert not mark.exists()


def test_a_folder_in_the_working_directory_does_not_win(tmp_path: Path) -> None:
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "__init__.py").write_text("raise SystemExit('the wrong client')\n")
    done = subprocess.run([BIN / "fedbridge-site", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert python(code=CHECK, cwd=tmp_path) == ("sound\n", "")


@pytest.mark.parametrize("name", ["install_from_fab", "get_load_client_app_fn", "run_clientapp"])
def test_a_flower_without_a_private_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    monkeypatch.delattr(runtime, name)
    with pytest.raises(CodeError, match=f"this Flower has no 'flwr.supernode.runtime.run_clientapp.{name}'") as raised:
        pinned_clientapp(plain_site(tmp_path / "north", 9094))
    assert raised.value.exit_code == 5


def test_a_flower_whose_executor_is_chosen_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = importlib.import_module("flwr.supercore.superexec.run_superexec")
    monkeypatch.delattr(loop, "get_executor")
    with pytest.raises(CodeError, match=r"run_superexec\.get_executor"):
        pinned_superexec()


def test_a_name_that_the_function_does_not_call_is_not_replaced() -> None:
    module = types.ModuleType("another")
    exec("def wanted(): return 1\ndef run(): return 2\n", module.__dict__)  # noqa: S102
    with pytest.raises(CodeError, match=r"another\.wanted"):
        replace_names(module, "run", {"wanted": lambda: 3})
    assert module.wanted() == 1
    exec("def run(): return wanted()\n", module.__dict__)  # noqa: S102
    replace_names(module, "run", {"wanted": lambda: 3})
    assert module.run() == 3


def test_a_module_of_flowers_that_is_not_there() -> None:
    with pytest.raises(CodeError, match=r"this Flower has no 'flwr\.nothing'"):
        flower_module("flwr.nothing", ())

"""Who may import whom: `bridge` is the ground floor, `client` and `server` stand on it apart, `simulations` on top."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "bridge": {"bridge"},
    "client": {"bridge", "client"},
    "server": {"bridge", "server"},
    "simulations": {"bridge", "client", "server", "simulations"},
}
HEAVY = ("torch", "scipy", "sklearn", "matplotlib", "mne", "wfdb", "neurokit2", "ray")


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_no_import_runs_back_up(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 10
    forbidden = (set(ALLOWED) | {"tests", "tools", "benchmarks"}) - ALLOWED[package]
    if package == "bridge":
        forbidden |= {"flwr"}
    wrong = {str(path.relative_to(ROOT)): found for path in files if (found := imported(path) & forbidden)}
    assert wrong == {}


def test_the_walk_sees_lazy_and_nested_imports(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import os.path\ndef f():\n    from flwr.app import Message\n    import client.app as app\n")
    assert imported(path) == {"os", "flwr", "client"}


@pytest.mark.parametrize("module", ["client.app", "server.app", "client.cli", "server.cli", "simulations.cli"])
def test_what_starts_a_process_is_light(module: str) -> None:
    """Deployed, each message may be a fresh process; and a command that prints its help need not wait for torch."""
    heavy = (*HEAVY, "flwr", "numpy", "pydantic") if module.endswith(".cli") else HEAVY
    script = f"import sys, {module}; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"

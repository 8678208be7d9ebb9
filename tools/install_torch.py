"""Install the pinned torch into this Python without pulling CUDA packages by accident.

    python tools/install_torch.py constraints.txt BACKEND

BACKEND is `cpu`, or what `uv pip install --torch-backend` knows for a GPU machine (`auto`, `cu128`, ...). An installed
torch of the pinned version is kept, whatever its build.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path


def pinned(constraints: Path) -> str:
    found = re.search(r"^torch==(\S+)$", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        sys.exit(f"{constraints}: pins no torch")
    return found.group(1)


def installed() -> str | None:
    try:
        return importlib.metadata.version("torch").split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def run(*command: str) -> bool:
    print("+", " ".join(command[1:]), flush=True)
    return subprocess.run(command, check=False).returncode == 0


def main() -> None:
    constraints, backend = Path(sys.argv[1]), sys.argv[2]
    version = pinned(constraints)
    if installed() == version:
        return
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints))
    # A configured package index may offer the CPU build by its tag; macOS wheels are CPU builds without one.
    tagged = f"torch=={version}" if sys.platform == "darwin" else f"torch=={version}+cpu"
    if backend == "cpu" and run(*pip, tagged):
        return
    # uv knows where each build of torch is published.
    uv = (sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend", backend)
    if run(*pip, "uv") and run(*uv, f"torch=={version}"):
        return
    sys.exit(
        f"torch {version} ({backend} build) could not be installed.\n"
        "Why: neither the configured package index nor uv found it (see above).\n"
        "What to do: install it into .venv yourself (see PyTorch's own 'Get started' page), then run make again;\n"
        "on a GPU machine choose a build with `make install TORCH_BACKEND=auto`."
    )


if __name__ == "__main__":
    main()

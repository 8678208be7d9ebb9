"""Where `fedbridge-site` and `fedbridge-server` begin: outside the packages whose place is checked first.

A package of another distribution that is called `client` would not refuse by itself; so its place is looked at before
anything of it is run.
"""

from __future__ import annotations

import sys
from importlib import import_module

from bridge.errors import FedbridgeError
from bridge.installation import check_places


def site() -> None:
    """The console command `fedbridge-site`."""
    _begin("client.cli")


def server() -> None:
    """The console command `fedbridge-server`."""
    _begin("server.cli")


def _begin(module: str) -> None:
    try:
        check_places()
    except FedbridgeError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(int(error.exit_code)) from None
    import_module(module).main()

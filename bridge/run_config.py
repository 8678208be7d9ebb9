"""The flat keys of a Flower run config, and how they are written for `flwr run`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

Value = str | int | float | bool

APP_COMPONENTS: Mapping[str, str] = MappingProxyType({"serverapp": "server.app:app", "clientapp": "client.app:app"})

RUN_CONFIG_DEFAULTS: Mapping[str, Value] = MappingProxyType(
    {
        "job": "",
        "run-folder": "",
        "models-folder": "",
        "simulation-folder": "",
        "run-key": "",
        "engine": "deployment",
        "resume": False,
    }
)
"""Every key of a run config with its default: what `[tool.flwr.app.config]` of the app declares."""


def toml_text(values: Mapping[str, Value]) -> str:
    """Flat values as TOML; a text of several lines becomes a multi-line string, as a job is meant to be read."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if "\n" not in value:
            return _escaped(value)
        lines = "\n".join(_escaped(line)[1:-1] for line in value.split("\n"))
        return f'"""\n{lines}"""'
    return repr(value)


def _escaped(text: str) -> str:
    """A TOML basic string: JSON's escapes are TOML's, but for DEL, which JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

"""What a study file says about itself: `study.json`, whose sha256 names the study and which the coordinator signs.

A study file is a zip of `study.json`, `study.sig` (64 bytes, Ed25519 over the bytes of `study.json`) and exactly the
members that `study.json` lists, each with its sha256 and size:

    job.yaml                                    the one text that every site is asked to do
    page.md                                     what is asked, in plain language
    models/<old_encoder|new_encoder|task_head>/ card.json always; weights.safetensors where they are included
    models/<public files>                       what the server needs beside them, where models are included
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bridge.config import Settings
from bridge.hashing import canonical_json

STUDY_JSON, STUDY_SIG, JOB_YAML, PAGE = "study.json", "study.sig", "job.yaml", "page.md"
MODELS = "models"
MODEL_NAMES: tuple[Literal["old_encoder", "new_encoder", "task_head"], ...] = (
    "old_encoder",
    "new_encoder",
    "task_head",
)


class Member(Settings):
    """One file of a study."""

    sha256: str
    bytes: int = Field(ge=0)


class Code(Settings):
    """The Flower app bundle that the study runs: its sha256, and that of each file in it."""

    sha256: str
    files: dict[str, str]


class ModelEntry(Settings):
    """One frozen model: what names it, and where its weights come from."""

    digest: str
    """The `digest` of its card."""
    weights_sha256: str
    included: bool
    """Whether the study file holds the weights."""
    source: str = ""
    """Where to get them, in words or as an address, where they are not included."""


class Manifest(Settings):
    """`study.json`."""

    schema_: Literal["fedbridge.study/1"] = Field(default="fedbridge.study/1", alias="schema")
    name: str
    """The job's name."""
    coordinator: str
    """Name of the coordinator, as in the job and in its coordinator file."""
    purpose: str = ""
    """What the study is for, in plain words."""
    contact: str = ""
    """Whom to ask."""
    created: str
    """UTC, ISO 8601."""
    attempts: int = Field(ge=1)
    """How often a site answers one and the same question (message and round) over the whole study: a first time, and
    again after interruptions. A site counts, and refuses more."""
    code: Code
    versions: dict[str, str]
    """fedbridge, flwr, python and the packages that compute, as on the coordinator's machine."""
    models: dict[str, ModelEntry]
    """By `MODEL_NAMES`."""
    members: dict[str, Member]
    """Every file of the zip but `study.json` and `study.sig`, by its path."""

    def canonical(self) -> bytes:
        """The bytes of `study.json`: what is hashed and signed."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))


def study_id(name: str, sha256: str) -> str:
    """How a study is called in commands and folders: its name and the first 8 hex digits of its hash."""
    return f"{name}-{sha256[:8]}"

"""A run folder as the pages read it: its record, its rotations' records, its statement, and what a simulator added."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.config import load_yaml
from bridge.errors import ConfigError
from server.audit_record import AuditRecord, read_audit
from server.errors import RunFolderError
from server.record import SIMULATED_EVALUATION, Evaluation, RunRecord, read_evaluation, read_record
from server.report.privacy import released
from server.statement import PRIVACY_JSON, Statement, read_statement
from server.submission.record import Submission, read_submission

SIMULATION_CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunFolder:
    """What a run left. A rotation without a usable record is the sentence that says so."""

    path: Path
    record: RunRecord
    rotations: dict[str, RunRecord | str] = field(default_factory=dict)
    simulation: dict[str, Any] = field(default_factory=dict)
    """What the simulation was asked for, where that is more than the job; empty for a run of real sites."""
    statement: Statement | None = None
    """None where there is no usable `privacy.json`."""
    simulated: Evaluation | None = None
    """What only a simulator can compute under a private mechanism."""
    submission: Submission | None = None
    """Which study a run of real sites belongs to."""
    audit: AuditRecord | None = None
    """What an attack with canary patients has shown."""


def read_folder(path: Path) -> RunFolder:
    """Read a run folder; raises `RunFolderError` where it holds no run record.

    The record of a rotated run gets its rotations' models and the sum of what left the sites, where it has none itself.
    """
    record = released(read_record(path))
    rotations = {name: _rotation(path / name) for name in record.rotations}
    parts = [part for part in rotations.values() if isinstance(part, RunRecord)]
    if parts:
        models = record.models or parts[0].models
        outbox = record.outbox or [row for part in parts for row in part.outbox]
        record = record.model_copy(update={"models": models, "outbox": outbox})
    return RunFolder(
        path,
        record,
        rotations,
        _simulation(path, record),
        _statement(path),
        _simulated(path, record),
        _submission(path),
        None if record.threat_model == "none" else read_audit(path),
    )


def _rotation(path: Path) -> RunRecord | str:
    try:
        return released(read_record(path))
    except RunFolderError as error:
        return f"no record: {error.why or error.what}"


def _simulation(path: Path, record: RunRecord) -> dict[str, Any]:
    try:
        values = load_yaml(path / SIMULATION_CONFIG)
    except ConfigError:
        return {}
    return values if isinstance(values, dict) and values != record.config else {}


def _statement(path: Path) -> Statement | None:
    try:
        return read_statement(path / PRIVACY_JSON)
    except RunFolderError:
        return None


def _submission(path: Path) -> Submission | None:
    try:
        return read_submission(path)
    except RunFolderError:
        return None


def _simulated(path: Path, record: RunRecord) -> Evaluation | None:
    if record.threat_model == "none":
        return None
    try:
        return read_evaluation(path / SIMULATED_EVALUATION)
    except RunFolderError:
        return None

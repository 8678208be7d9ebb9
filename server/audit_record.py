"""`audit.json`: what attacking a private run's mechanisms with canary patients has shown (docs/audit.md).

Written by a simulation, shown by the report beside the claim.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from bridge.config import Settings
from bridge.files import write_whole
from server.errors import RunFolderError

AUDIT_JSON = "audit.json"
CONFIDENCE = 0.95


class Claim(Settings):
    """What the accountant says of what was audited."""

    epsilon: float
    delta: float


class PhaseAudit(Settings):
    """Audit of one phase by itself. The claim holds if `lower_bound` is not above `claim.epsilon`."""

    phase: Literal["training", "closed_form"]
    claim: Claim
    lower_bound: float
    """Of epsilon at `claim.delta`, with the record's confidence."""
    canaries: int
    inserted: int
    guesses: int
    correct: int
    half_noise_bound: float
    """The bound that the same audit gives where half the noise is left out: below the claim, the audit would not have
    noticed that."""
    covers: str

    @property
    def holds(self) -> bool:
        """Whether the audit found nothing against the claim."""
        return self.lower_bound <= self.claim.epsilon


class AuditRecord(Settings):
    """The whole of `audit.json`."""

    schema_: Literal["fedbridge.audit/1"] = Field(default="fedbridge.audit/1", alias="schema")
    name: str
    threat_model: Literal["local", "central"]
    confidence: float = CONFIDENCE
    phases: list[PhaseAudit]
    plan: Claim
    """What the whole plan claims for a paired patient, at the plan's own delta."""
    not_covered: str = (
        "Selection and metrics, whose releases have too few numbers for many canaries; the transport, the ledger and "
        "how a site reads its recordings; floating-point effects and timing. An audit can refute a claim; it can't "
        "prove one."
    )

    @property
    def holds(self) -> bool:
        """Whether no phase's claim is refuted."""
        return all(phase.holds for phase in self.phases)


def write_audit(folder: Path, record: AuditRecord) -> Path:
    """Write `audit.json` into a folder, a run's for example, whose report then shows it. Raises `RunFolderError`."""
    text = json.dumps(record.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False)
    path = folder / AUDIT_JSON
    try:
        write_whole(path, text + "\n")
    except OSError as error:
        raise RunFolderError(
            f"{path}: can't be written", why=error.strerror or "", fix="name a folder that is there"
        ) from error
    return path


def read_audit(folder: Path) -> AuditRecord | None:
    """The audit in a folder; None where there is none that can be used."""
    try:
        return AuditRecord.model_validate_json((folder / AUDIT_JSON).read_bytes())
    except (OSError, ValidationError):
        return None

"""Errors inside a hospital. Only the `ReasonCode` of one ever crosses the door; its text stays in the site's log."""

from __future__ import annotations

from bridge.errors import ExitCode, FedbridgeError
from bridge.messages import ReasonCode


class SiteError(FedbridgeError):
    """Base: an error with the code that the server may learn."""

    reason: ReasonCode = ReasonCode.INTERNAL


class SiteFileError(SiteError):
    """The site file or policy can't be used."""

    exit_code = ExitCode.CONFIG
    reason = ReasonCode.SITE_MISCONFIGURED


class RecordingError(SiteError):
    """A recording can't be read, or is not what the site file says (channels, rate, lengths)."""

    exit_code = ExitCode.DATA
    reason = ReasonCode.DATA_UNUSABLE


class UnsafePickleError(RecordingError):
    """A pickled recording asks for more than arrays and plain containers. Nothing of it was run."""


class NoWindowsError(SiteError):
    """No usable window, or too few patients for what was asked."""

    exit_code = ExitCode.DATA
    reason = ReasonCode.DATA_UNUSABLE


class ModelsError(SiteError):
    """The site's models are missing, damaged, or do not fit its recordings."""

    exit_code = ExitCode.WEIGHTS
    reason = ReasonCode.WEIGHTS_MISSING


class ModelsDifferError(ModelsError):
    """The site's models are sound, but not those of the job."""

    reason = ReasonCode.WEIGHTS_DIFFER


class JobError(SiteError):
    """The run's job text can't be read."""

    exit_code = ExitCode.CONFIG
    reason = ReasonCode.JOB_INVALID


class MessageError(SiteError):
    """A message is not one that a site answers: unknown keys, positions out of range, arrays that do not fit."""

    exit_code = ExitCode.REFUSED
    reason = ReasonCode.MESSAGE_INVALID


class PolicyError(SiteError):
    """The site's policy refuses what was asked."""

    exit_code = ExitCode.REFUSED

    def __init__(self, reason: ReasonCode, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what, why=why, fix=fix)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (_policy_error, (self.reason, self.what, self.why, self.fix))


class NotAcceptedError(SiteError):
    """What a run asks for is not what this site accepted: other code, another job, a withdrawn study, once too often,
    or the record of the acceptance can't be used. Raised before any data is touched."""

    exit_code = ExitCode.REFUSED

    def __init__(self, reason: ReasonCode, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what, why=why, fix=fix)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (_not_accepted_error, (self.reason, self.what, self.why, self.fix))


def _not_accepted_error(reason: ReasonCode, what: str, why: str, fix: str) -> NotAcceptedError:
    return NotAcceptedError(reason, what, why=why, fix=fix)


def _policy_error(reason: ReasonCode, what: str, why: str, fix: str) -> PolicyError:
    return PolicyError(reason, what, why=why, fix=fix)


class OutboxError(SiteError):
    """The outbox refused an item."""

    exit_code = ExitCode.REFUSED
    reason = ReasonCode.ITEM_REFUSED


class AuditError(SiteError):
    """The audit log is damaged or can't be written."""

    exit_code = ExitCode.STORAGE
    reason = ReasonCode.STORAGE


class OutputError(SiteError):
    """A file that a command was asked to write can't be written."""

    exit_code = ExitCode.STORAGE
    reason = ReasonCode.STORAGE


class CacheError(SiteError):
    """The feature cache can't be written (full disk, permissions)."""

    exit_code = ExitCode.STORAGE
    reason = ReasonCode.STORAGE


class LedgerError(SiteError):
    """The privacy ledger or its key is missing, damaged, tampered with, an old copy, or can't be written."""

    exit_code = ExitCode.STORAGE
    reason = ReasonCode.LEDGER_UNUSABLE


class BudgetError(SiteError):
    """A plan would cost a patient more than the site's policy gives, or a message has no plan that pays for it."""

    exit_code = ExitCode.REFUSED
    reason = ReasonCode.BUDGET_SPENT


class ReplayError(SiteError):
    """A message was asked before: in another form, its first answer never came to be, or its plan is used up."""

    exit_code = ExitCode.REFUSED
    reason = ReasonCode.ASKED_AGAIN

"""Errors of the coordinator."""

from __future__ import annotations

from bridge.errors import ExitCode, FedbridgeError


class RunError(FedbridgeError):
    """The run can't go on: too few sites, no permitted criterion, inconsistent answers. A checkpoint is kept."""

    exit_code = ExitCode.RUN_FAILED


class RunFolderError(FedbridgeError):
    """The run folder can't be read or written, or belongs to another run."""

    exit_code = ExitCode.STORAGE


class ResumeError(FedbridgeError):
    """A resume was asked for with another configuration, or where there is nothing to resume."""

    exit_code = ExitCode.CONFIG


class ReplyError(FedbridgeError):
    """A reply is not one that the server asked for; costs that site its turn, never the run."""

    exit_code = ExitCode.RUN_FAILED


class StatementError(FedbridgeError):
    """A privacy statement claims what its events do not give, or contradicts itself."""

    exit_code = ExitCode.REFUSED

"""Errors of simulation."""

from __future__ import annotations

from bridge.errors import ExitCode, FedbridgeError


class CohortError(FedbridgeError):
    """A cohort can't be made or read, or can't be divided as asked."""

    exit_code = ExitCode.DATA


class UnwritableError(CohortError):
    """What is made once (cohort, models) can't be written into the cache folder."""

    exit_code = ExitCode.STORAGE


class RehearsalError(FedbridgeError):
    """A study can not be rehearsed at this site, or the site would not take part in it."""

    exit_code = ExitCode.REFUSED


class EngineError(FedbridgeError):
    """An engine could not be started, or its run failed."""

    exit_code = ExitCode.RUN_FAILED


class FixtureError(FedbridgeError):
    """A folder of numeric fixtures has no case, or one of its cases is damaged or of an unknown model."""

    exit_code = ExitCode.CONFIG

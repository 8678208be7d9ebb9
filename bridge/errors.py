"""Errors of the method, and the base class of every error that fedbridge raises on purpose."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the three console commands (docs/reference/errors.md)."""

    OK = 0
    FAILED = 1
    CONFIG = 2
    DATA = 3
    WEIGHTS = 4
    REFUSED = 5
    RUN_FAILED = 6
    STORAGE = 7


class FedbridgeError(Exception):
    """An error with three parts: what happened, why, and what to do.

    The text may name files, keys, bounds and the offending configuration value, never a value of a patient's data.
    It is for the machine on which it is raised: what crosses a site's door is a `ReasonCode` alone.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what = what
        self.why = why
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        if self.why:
            parts.append(f"Why: {self.why}")
        if self.fix:
            parts.append(f"What to do: {self.fix}")
        return "\n".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.why, self.fix))


def _rebuild(kind: type[FedbridgeError], what: str, why: str, fix: str) -> FedbridgeError:
    return kind(what, why=why, fix=fix)


class ConfigError(FedbridgeError):
    """A configuration file can't be read, has an unknown key, or a value out of its bounds."""

    exit_code = ExitCode.CONFIG


class WeightsError(FedbridgeError):
    """Weights or a card are missing, damaged, or not those that were asked for."""

    exit_code = ExitCode.WEIGHTS


class WeightsStorageError(WeightsError):
    """A model folder can't be written: a full disk, permissions."""

    exit_code = ExitCode.STORAGE


class WindowError(FedbridgeError):
    """Windows do not fit the encoder that should read them (channels, rate, samples)."""

    exit_code = ExitCode.DATA


class PositionError(FedbridgeError):
    """A position is not one of the encoder's."""

    exit_code = ExitCode.CONFIG


class SelectionError(FedbridgeError):
    """Positions can't be scored: too few patients, one class, or scores that are not numbers."""

    exit_code = ExitCode.DATA


class ItemError(FedbridgeError):
    """An item of a message is undeclared, of another shape or dtype, not finite, or out of its bound."""

    exit_code = ExitCode.REFUSED


class ExportError(FedbridgeError):
    """An exported bridge folder is incomplete, damaged, or can't be written."""

    exit_code = ExitCode.STORAGE


class CodeError(FedbridgeError):
    """The installed code is not what it must be: a package is missing or another's, Flower is not the tested version,
    or the code is not that of the study."""

    exit_code = ExitCode.REFUSED


class StudyError(FedbridgeError):
    """A study file is damaged, incomplete, signed by nobody or by another key, or not what it was."""

    exit_code = ExitCode.REFUSED


class StudyStorageError(StudyError):
    """A study file can't be written, or can't be taken apart: a full disk, permissions."""

    exit_code = ExitCode.STORAGE


class EnrolmentError(FedbridgeError):
    """A coordinator file, an enrolment request or a key can't be used: unreadable, forged, unknown, revoked, double."""

    exit_code = ExitCode.REFUSED


class ServiceError(FedbridgeError):
    """A long-running process could not be started or ended, or is running already."""

    exit_code = ExitCode.FAILED

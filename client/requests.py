"""What the server asks in one message, checked before any data is touched.

The content of a message (records `config` and `arrays`):

- `query.describe`, `query.probe`: nothing;
- `query.similarity`: `input-position`;
- `query.closed_form`: `input-position`, `output-position`, and the bridge's arrays (float32): the parameters `A`, `B`,
  `P` and the public constants that the job's bridge has;
- `train`: the same and `round`;
- `evaluate`: the same as `train` and `split` (`validation` or `test`), in the rounds in which the job evaluates on that
  split.

Flower's strategies add `server-round` and `proximal-mu`; they must agree with the round and the job.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from numpy.typing import NDArray

from bridge.errors import ConfigError
from bridge.job import EvaluationSplit, Job, parse_job
from bridge.messages import (
    ARRAYS,
    CLOSED_FORM,
    CONFIG,
    DESCRIBE,
    EVALUATE,
    PROBE,
    SIMILARITY,
    TRAIN,
    Dimensions,
)
from bridge.shape import BridgeShape
from client.errors import JobError, MessageError
from client.policy import Policy

_KEYS: dict[str, tuple[str, ...]] = {
    DESCRIBE: (),
    PROBE: (),
    SIMILARITY: ("input-position",),
    CLOSED_FORM: ("input-position", "output-position"),
    TRAIN: ("round", "input-position", "output-position"),
    EVALUATE: ("round", "input-position", "output-position", "split"),
}
_STRATEGY_KEYS = ("server-round", "proximal-mu")
_WITH_BRIDGE = (CLOSED_FORM, TRAIN, EVALUATE)

MAX_JOB_CHARACTERS = 65_536

UserConfig = dict[str, bool | float | int | str]

SPLITS: tuple[EvaluationSplit, ...] = get_args(EvaluationSplit)


@dataclass(frozen=True)
class Request:
    """One checked message. Fields that its type does not have are None or empty."""

    message: str
    run: str
    round: int | None = None
    input_position: int | None = None
    output_position: int | None = None
    split: EvaluationSplit | None = None
    arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    shape: BridgeShape | None = None
    """Sizes of the bridge, of a request that has one."""

    @property
    def positions(self) -> tuple[int, int]:
        """`(m, l)` of a request that has a bridge."""
        assert self.input_position is not None
        assert self.output_position is not None
        return self.input_position, self.output_position

    @property
    def has_bridge(self) -> bool:
        """Whether a message of this type carries a bridge and both its positions."""
        return self.message in _WITH_BRIDGE


def read_job(run_config: UserConfig) -> Job:
    """The job in a run's config. Raises `JobError` where it is absent, far too long or invalid."""
    text = run_config.get("job")
    if not isinstance(text, str) or not text or len(text) > MAX_JOB_CHARACTERS:
        raise JobError(
            "the run has no job that a site reads",
            why=f"the run config's 'job' must be a YAML text of at most {MAX_JOB_CHARACTERS} characters",
            fix="the coordinator must send the text that `fedbridge-sim prepare` writes",
        )
    try:
        return parse_job(text)
    except ConfigError as error:
        raise JobError(error.what, why=error.why, fix=error.fix) from error


def read_config(message: Message) -> dict[str, Any]:
    """The message's `config`: exactly the keys of its type. Raises `MessageError`, also on records beside it."""
    kind = message.metadata.message_type
    wanted = {CONFIG, ARRAYS} if kind in _WITH_BRIDGE else {CONFIG}
    if extra := set(message.content) - wanted:
        raise _invalid(kind, f"it has {len(extra)} record(s) beside {sorted(wanted)}")
    record = message.content[CONFIG] if CONFIG in message.content else ConfigRecord()
    if not isinstance(record, ConfigRecord):
        raise _invalid(kind, f"its record '{CONFIG}' is no ConfigRecord")
    allowed = (*_KEYS[kind], *(_STRATEGY_KEYS if kind in (TRAIN, EVALUATE) else ()))
    if unknown := set(record) - set(allowed):
        raise _invalid(kind, f"it has {len(unknown)} unknown key(s) in '{CONFIG}'; known: {list(allowed)}")
    if missing := set(_KEYS[kind]) - set(record):
        raise _invalid(kind, f"'{CONFIG}' lacks {sorted(missing)}")
    return dict(record)


def read_request(message: Message, job: Job, policy: Policy, dimensions: Dimensions) -> Request:
    """The message as a request, all but its arrays (`read_arrays`: their shapes depend on the positions).

    Raises `MessageError` on an unknown, missing or wrong key or record, a position that the models do not have, a round
    beyond the job's or the policy's, an evaluation that the job does not announce.
    """
    kind = message.metadata.message_type
    config = read_config(message)
    values = {key: config[key] for key in _KEYS[kind]}
    request = Request(
        message=kind,
        run=str(message.metadata.run_id),
        round=_integer(values, "round", kind, int(job.rounds > 0), min(job.rounds, policy.max_rounds)),
        input_position=_integer(values, "input-position", kind, 0, dimensions.positions_new - 1),
        output_position=_integer(values, "output-position", kind, 0, dimensions.positions_old - 1),
        split=_split(values, kind),
    )
    if kind in (PROBE, SIMILARITY) and job.selection.mode == "fixed":
        raise _invalid(kind, "the job fixes the positions")
    if kind == CLOSED_FORM and not job.train.solves:
        raise _invalid(kind, "the job asks for no closed form")
    if kind == TRAIN and not job.rounds:
        raise _invalid(kind, "the job has no rounds of training")
    _check_fixed(request, job)
    _check_evaluation(request, job)
    _check_strategy(config, request, job)
    return request


def read_arrays(message: Message, dimensions: Dimensions) -> dict[str, NDArray[np.float32]]:
    """The bridge's arrays of a message that has one: float32, finite, of the shapes that the job and the cards give.

    Raises `MessageError`.
    """
    kind = message.metadata.message_type
    record = message.content[ARRAYS] if ARRAYS in message.content else None  # noqa: SIM401
    if not isinstance(record, ArrayRecord):
        raise _invalid(kind, f"its record '{ARRAYS}' is missing or no ArrayRecord")
    assert dimensions.bridge is not None
    shapes = dimensions.bridge.arrays()
    if set(record) != set(shapes):
        raise _invalid(kind, f"its arrays must be {list(shapes)}")
    return {name: _array(record, name, shape, kind) for name, shape in shapes.items()}


def _array(record: ArrayRecord, name: str, shape: tuple[int, ...], kind: str) -> NDArray[np.float32]:
    packed = record[name]
    if packed.dtype != "float32" or tuple(packed.shape) != shape:
        raise _invalid(kind, f"array {name} must be float32 {shape}, it claims {packed.dtype} {tuple(packed.shape)}")
    try:
        value = packed.numpy()
    except (ValueError, TypeError, EOFError, OSError, MemoryError) as error:
        raise _invalid(kind, f"array {name} can't be unpacked") from error
    if value.dtype != np.float32 or value.shape != shape:
        raise _invalid(kind, f"array {name} is not what it claims to be")
    if not np.isfinite(value).all():
        raise _invalid(kind, f"array {name} holds NaN or infinity")
    return value


def _integer(values: dict[str, Any], key: str, kind: str, low: int, high: int) -> int | None:
    if key not in values:
        return None
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _invalid(kind, f"'{key}' must be a whole number from {low} to {high}")
    return value


def _split(values: dict[str, Any], kind: str) -> EvaluationSplit | None:
    if "split" not in values:
        return None
    found = next((split for split in SPLITS if split == values["split"]), None)
    if found is None:
        raise _invalid(kind, f"'split' must be one of {list(SPLITS)}")
    return found


def _check_fixed(request: Request, job: Job) -> None:
    """A job of fixed positions is not trained at others."""
    if job.selection.mode != "fixed":
        return
    asked = (request.input_position, request.output_position)
    fixed = (job.selection.input_position, job.selection.output_position)
    if any(a is not None and a != f for a, f in zip(asked, fixed, strict=True)):
        raise _invalid(request.message, f"the job fixes the positions {fixed}")


def _check_evaluation(request: Request, job: Job) -> None:
    """A coordinator that could evaluate at will would learn of the same patients again and again."""
    if request.split is None or request.round is None:
        return
    if not job.evaluates(request.split, request.round):
        raise _invalid(request.message, f"the job does not evaluate round {request.round} on '{request.split}'")


def _check_strategy(config: dict[str, Any], request: Request, job: Job) -> None:
    if "server-round" in config and config["server-round"] != request.round:
        raise _invalid(request.message, "'server-round' differs from 'round'")
    mu = job.strategy.proximal_mu if job.strategy.name == "FedProx" else 0.0
    if "proximal-mu" in config and config["proximal-mu"] != mu:
        raise _invalid(request.message, "'proximal-mu' differs from the job's")


def _invalid(kind: str, why: str) -> MessageError:
    return MessageError(
        f"a message '{kind}' is refused", why=why, fix="the coordinator must send what the job declares"
    )

"""Federated evaluation: confusion sums of the sites that permit them, and the criterion for `keep: best`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bridge.job import EvaluationSplit, Job
from bridge.messages import CONFUSION_ITEMS, EVALUATE, Dimensions
from bridge.metrics import accuracy, balanced_accuracy, f1_macro, f1_weighted
from bridge.prototype import Arrays
from server.errors import RunError
from server.events import EventLog
from server.exchange import Exchange, Question
from server.record import Evaluation, Metric, Metrics, SelectionRecord
from server.replies import Expected

Kind = Literal["bridge", "teacher", "agreement"]

_NO_INTERVAL = "none: the server sees sums of confusion matrices over sites only, so patients can't be resampled"


@dataclass(frozen=True)
class Pooled:
    """Confusion matrices summed over the sites that sent them, by kind; codes of the sites that sent nothing."""

    confusion: dict[Kind, NDArray[np.int64]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


def pooled_confusions(
    exchange: Exchange,
    log: EventLog,
    selection: SelectionRecord,
    dimensions: Dimensions,
    arrays: Arrays,
    round_: int,
    split: EvaluationSplit,
    at_least: int = 0,
) -> Pooled:
    """Ask every site to evaluate the bridge of `round_` on its patients of `split`.

    Sites send what their policies permit; one that permits nothing, or fails, has no part in the sums. Sites are asked
    again, within the job's retries, while fewer than `at_least` answered.
    """
    log.emit("evaluate", state="started", split=split, round=round_, sites=len(exchange.roster))
    config = {
        "round": round_,
        "input-position": selection.input_position,
        "output-position": selection.output_position,
        "split": split,
    }
    expected = Expected((), optional=CONFUSION_ITEMS, dimensions=dimensions)
    phase = f"evaluate {split} {round_}"
    answers = exchange.ask(Question(phase, EVALUATE, expected, config, arrays), at_least)
    confusion: dict[Kind, NDArray[np.int64]] = {}
    sites: dict[Kind, int] = {}
    for kind in ("bridge", "teacher", "agreement"):
        item = f"confusion.{kind}"
        found = [answer.values[item] for answer in answers.good.values() if item in answer.values]
        if found:
            confusion[kind], sites[kind] = np.sum(found, axis=0, dtype=np.int64), len(found)
    log.emit("evaluate", state="done", split=split, round=round_, sites=sites)
    return Pooled(confusion, dict(answers.lost))


def criterion(job: Job, pooled: Pooled) -> float | None:
    """Agreement or balanced accuracy in [0, 1] as the job names it; None where no site sent what it needs."""
    kind: Kind = "agreement" if job.train.criterion == "agreement" else "bridge"
    if kind not in pooled.confusion:
        return None
    figure = accuracy if kind == "agreement" else balanced_accuracy
    value = float(figure(pooled.confusion[kind]))
    return value if np.isfinite(value) else None


def not_permitted(job: Job, round_: int, lost: dict[str, str]) -> RunError:
    """The error of `keep: best` where no site answers with its criterion; `lost` has the codes of those that failed."""
    item = {"train_loss": "train_loss", "agreement": "confusion.agreement", "balanced_accuracy": "confusion.bridge"}
    wanted = item[job.train.criterion]
    codes = ", ".join(f"{site} ({code})" for site, code in sorted(lost.items()))
    return RunError(
        f"round {round_}: keep 'best' can't be judged, no site sends '{wanted}'" + (f": {codes}" if codes else ""),
        why=f"criterion '{job.train.criterion}' needs this opt-in item; no policy permits it, or no site has data",
        fix="keep 'last', name another criterion, or ask the sites to list the item in their policies",
    )


def evaluation_record(pooled: Pooled, classes: tuple[str, ...]) -> Evaluation:
    """The run record's figures; null where the sites permitted no confusion, or had no labels."""
    bridge = pooled.confusion.get("bridge")
    agreement = pooled.confusion.get("agreement")
    return Evaluation(
        bridge=_metrics(bridge, agreement),
        teacher=_metrics(pooled.confusion.get("teacher"), None),
        chance=Metrics(balanced_accuracy=Metric(value=1 / len(classes))),
        confusion={kind: matrix.tolist() for kind, matrix in pooled.confusion.items()},
        classes=list(classes),
        windows=None if agreement is None else int(agreement.sum()),
        interval=_NO_INTERVAL,
    )


def _metrics(labels: NDArray[np.int64] | None, agreement: NDArray[np.int64] | None) -> Metrics | None:
    if labels is None and agreement is None:
        return None
    found: dict[str, Metric | None] = {}
    if labels is not None:
        found = {f.__name__: _metric(f(labels)) for f in (balanced_accuracy, f1_macro, f1_weighted)}
    if agreement is not None:
        found["agreement"] = _metric(accuracy(agreement))
    return Metrics(**found)


def _metric(value: NDArray[np.float64]) -> Metric | None:
    """A figure without an interval; None where no window had a label."""
    return Metric(value=float(value)) if np.isfinite(value) else None

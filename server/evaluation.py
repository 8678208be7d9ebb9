"""Federated evaluation: confusion sums of the sites that permit them, and the criterion for `keep: best`.

Under a private mechanism the sites send sums of their patients' bounded tables (`bridge.privacy.metrics`), and every
figure is one of noised sums: clamped, never refused, with an interval that includes the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bridge.job import EvaluationSplit, Job
from bridge.messages import CONFUSION_ITEMS, EVALUATE, Dimensions
from bridge.metrics import accuracy, balanced_accuracy, f1_macro, f1_weighted
from bridge.privacy.metrics import KINDS, metrics_deviation, noise_interval
from bridge.prototype import Arrays
from server.errors import RunError
from server.events import EventLog
from server.exchange import Exchange, Question
from server.noised import NoisedSum
from server.record import Evaluation, Metric, Metrics, SelectionRecord
from server.releases import Releases
from server.replies import Expected

Kind = Literal["bridge", "teacher", "agreement"]

_NO_INTERVAL = "none: the server sees sums of confusion matrices over sites only, so patients can't be resampled"


_NO_SUMS = "none: no site answered"

_NOISE_INTERVAL = (
    "95 %, from the released sums alone: it includes the mechanism's noise (standard deviation {deviation:.3g} in each "
    "cell of the patients' sums) and the choice of patients, taken as independent, each as one window"
)


@dataclass(frozen=True)
class Pooled:
    """Confusion matrices summed over the sites that sent them, by kind; codes of the sites that sent nothing."""

    confusion: dict[Kind, NDArray[np.int64]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sums:
    """Noised sums of patients' tables over the sites, None where no site answered; codes of the sites that did not."""

    noised: NoisedSum | None = None
    lost: dict[str, str] = field(default_factory=dict)

    def table(self, kind: Kind) -> NDArray[np.float64]:
        """One kind's noised table `(classes, classes)`."""
        assert self.noised is not None
        return np.asarray(self.noised.values[KINDS.index(kind)], dtype=np.float64)


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

    Sites send what their policies permit; one that permits nothing, or fails, has no part in the sums. Sites that were
    lost on the way are asked again, within the job's retries, while fewer than `at_least` answered.
    """
    log.emit("evaluate", state="started", split=split, round=round_, sites=len(exchange.roster))
    expected = Expected((), optional=CONFUSION_ITEMS, dimensions=dimensions)
    answers = exchange.ask(_question(selection, expected, arrays, round_, split), at_least, refusals_stand=True)
    confusion: dict[Kind, NDArray[np.int64]] = {}
    sites: dict[Kind, int] = {}
    for kind in ("bridge", "teacher", "agreement"):
        item = f"confusion.{kind}"
        found = [answer.values[item] for answer in answers.good.values() if item in answer.values]
        if found:
            confusion[kind], sites[kind] = np.sum(found, axis=0, dtype=np.int64), len(found)
    log.emit("evaluate", state="done", split=split, round=round_, sites=sites)
    return Pooled(confusion, dict(answers.lost))


def pooled_sums(
    exchange: Exchange,
    log: EventLog,
    selection: SelectionRecord,
    dimensions: Dimensions,
    arrays: Arrays,
    round_: int,
    split: EvaluationSplit,
    job: Job,
    releases: Releases,
    at_least: int = 0,
) -> Sums:
    """Ask as `pooled_confusions` does, under a private mechanism: the noised sum of the sites' `confusion_sums`.

    A sum that `releases` has stored before is that one, and no site is asked.
    """
    log.emit("evaluate", state="started", split=split, round=round_, sites=len(exchange.roster))
    expected = Expected(("confusion_sums",), dimensions=dimensions)
    lost: dict[str, str] = {}

    def ask() -> dict[str, NDArray[np.float64]]:
        answers = exchange.ask(_question(selection, expected, arrays, round_, split), at_least, refusals_stand=True)
        lost.update(answers.lost)
        if not answers.good:
            raise _NobodyError
        return {site: np.asarray(answer.values["confusion_sums"], np.float64) for site, answer in answers.good.items()}

    try:
        summed = releases.noised(f"{split}-{round_}", metrics_deviation(job.privacy.metrics), ask)
    except _NobodyError:
        summed = None
    log.emit("evaluate", state="done", split=split, round=round_, sites=len(exchange.roster) - len(lost))
    return Sums(summed, lost)


class _NobodyError(Exception):
    """No site answered, so there is no sum."""


def _question(
    selection: SelectionRecord, expected: Expected, arrays: Arrays, round_: int, split: EvaluationSplit
) -> Question:
    config: dict[str, int | str] = {
        "round": round_,
        "input-position": selection.input_position,
        "output-position": selection.output_position,
        "split": split,
    }
    return Question(f"evaluate {split} {round_}", EVALUATE, expected, config, arrays)


def criterion(job: Job, pooled: Pooled) -> float | None:
    """Agreement or balanced accuracy in [0, 1] as the job names it; None where no site sent what it needs."""
    kind: Kind = "agreement" if job.train.criterion == "agreement" else "bridge"
    if kind not in pooled.confusion:
        return None
    figure = accuracy if kind == "agreement" else balanced_accuracy
    value = float(figure(pooled.confusion[kind]))
    return value if np.isfinite(value) else None


def private_criterion(job: Job, sums: Sums) -> float | None:
    """Agreement or balanced accuracy in [0, 1] of noised tables, negative cells taken as zero; 0 where nothing else is
    left of them, None where no site answered."""
    if sums.noised is None:
        return None
    kind: Kind = "agreement" if job.train.criterion == "agreement" else "bridge"
    figure = accuracy if kind == "agreement" else balanced_accuracy
    value = float(figure(sums.table(kind).clip(min=0.0)))
    return value if np.isfinite(value) else 0.0


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


def private_evaluation_record(job: Job, sums: Sums, classes: tuple[str, ...], seed: int) -> Evaluation:
    """The run record's figures under a private mechanism, each with an interval that includes the noise.

    They are the figures of the noised tables, with negative cells taken as zero; null where no site answered, or where
    nothing is left of a table. How many patients or windows there were is not known. `seed` draws the intervals.
    """
    chance = Metrics(balanced_accuracy=Metric(value=1 / len(classes)))
    if sums.noised is None:
        return Evaluation(chance=chance, classes=list(classes), interval=_NO_SUMS)
    labelled = (balanced_accuracy, f1_macro, f1_weighted)
    found = {
        kind: {f.__name__: _noised_metric(sums, kind, f, seed) for f in labelled} for kind in ("bridge", "teacher")
    }
    found["bridge"]["agreement"] = _noised_metric(sums, "agreement", accuracy, seed)
    return Evaluation(
        bridge=Metrics(**found["bridge"]),
        teacher=Metrics(**found["teacher"]),
        chance=chance,
        confusion_sums={kind: sums.table(kind).tolist() for kind in KINDS},
        noise_deviation=sums.noised.deviation,
        classes=list(classes),
        interval=_NOISE_INTERVAL.format(deviation=sums.noised.deviation),
    )


def _noised_metric(
    sums: Sums, kind: Kind, figure: Callable[[NDArray[np.float64]], NDArray[np.float64]], seed: int
) -> Metric | None:
    assert sums.noised is not None
    table = sums.table(kind)
    value = float(figure(table.clip(min=0.0)))
    interval = noise_interval(table, sums.noised.deviation, figure, seed)
    if interval is None or not np.isfinite(value):
        return None
    return Metric(value=value, low=min(interval[0], value), high=max(interval[1], value))


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

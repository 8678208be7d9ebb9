"""Where the bridge goes: the sites' statistics into `(m, l)` by two-stage selection, in one of three modes.

`scores`: each site's score of each position, averaged with the job's public weights. `moments`: additive sums, from
which comes exactly what one machine with all the data would get. `fixed`: the job's positions, and no site is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bridge.cka import scores_from_similarity_moments
from bridge.job import Job
from bridge.messages import PROBE, SIMILARITY, probe_widths
from bridge.privacy.selection import noise_deviation
from bridge.probe import scores_from_moments
from bridge.selection import choose_position
from server.events import Event, EventLog
from server.exchange import Exchange, Question
from server.models import FrozenModels
from server.moments import check_probe_moments, check_similarity_moments
from server.record import PositionScores, SelectionRecord
from server.releases import Releases
from server.replies import Answer, Expected

Scores = NDArray[np.float64]
_Asking = Callable[..., dict[str, Scores]]
"""Asks the sites for an item, with a check of each answer where there is one (`_ask` of one stage)."""


@dataclass(frozen=True)
class _Stage:
    """One of the two scans: the message, the item of each mode and of privacy, and how moments are checked and become
    scores."""

    phase: Event
    message: str
    scores_item: str
    moments_item: str
    private_item: str
    from_moments: Callable[[Scores], Scores]
    check_moments: Callable[[Scores], None]


def select(
    exchange: Exchange, job: Job, models: FrozenModels, log: EventLog, releases: Releases | None = None
) -> SelectionRecord:
    """Choose the input and the output position. `releases` keeps the noised sums of a private run.

    Raises `RunError` where too few sites answer, `SelectionError` where their numbers choose nothing, `PositionError`
    where a fixed position is none of the encoder's.
    """
    if job.selection.mode == "fixed":
        return _fixed(job, models)
    widths, classes = probe_widths(job, models.new_encoder), len(models.task_head.classes)
    folds, ridge = job.selection.folds, job.selection.ridge
    probe = _Stage(
        "probe",
        PROBE,
        "probe_scores",
        "probe_moments",
        "probe_sums",
        lambda sums: scores_from_moments(sums, widths, classes, folds, ridge),
        lambda moments: check_probe_moments(moments, widths, classes, folds),
    )
    similarity = _Stage(
        "similarity",
        SIMILARITY,
        "similarity_scores",
        "similarity_moments",
        "similarity_sums",
        scores_from_similarity_moments,
        check_similarity_moments,
    )
    m, probe_scores = _scan(exchange, job, models, probe, {}, log, releases)
    l, similarity_scores = _scan(exchange, job, models, similarity, {"input-position": m}, log, releases)  # noqa: E741
    return SelectionRecord(
        mode=job.selection.mode,
        input_position=m,
        output_position=l,
        probe_scores=probe_scores,
        similarity_scores=similarity_scores,
    )


def _fixed(job: Job, models: FrozenModels) -> SelectionRecord:
    m, l = job.selection.input_position, job.selection.output_position  # noqa: E741
    assert m is not None  # the job's own validation
    assert l is not None
    models.new_encoder.layout(m, "out")
    models.old_encoder.layout(l, "in")
    return SelectionRecord(mode="fixed", input_position=m, output_position=l)


def _scan(
    exchange: Exchange,
    job: Job,
    models: FrozenModels,
    stage: _Stage,
    config: Mapping[str, int],
    log: EventLog,
    releases: Releases | None,
) -> tuple[int, PositionScores]:
    log.emit(stage.phase, state="started", sites=len(exchange.roster))
    ask = partial(_ask, exchange, job, models, stage, config)
    if job.privacy.private:
        assert releases is not None
        sites, found = len(exchange.roster), _private(job, stage, ask, releases)
    else:
        scan = _moments if job.selection.mode == "moments" else _scores
        sites, found = scan(job, stage, ask)
    position = choose_position(found.aggregate)
    log.emit(stage.phase, state="done", sites=sites, position=position)
    return position, found


def _scores(job: Job, stage: _Stage, ask: _Asking) -> tuple[int, PositionScores]:
    per_site = ask(stage.scores_item)
    aggregate = weighted_mean(per_site, {site: job.sites.weight(site) for site in per_site})
    listed = {site: scores.tolist() for site, scores in per_site.items()}
    return len(per_site), PositionScores(aggregate=aggregate.tolist(), per_site=listed)


def _moments(job: Job, stage: _Stage, ask: _Asking) -> tuple[int, PositionScores]:
    item = stage.moments_item
    per_site = ask(item, lambda answer: stage.check_moments(answer.values[item]))
    aggregate = stage.from_moments(np.sum(list(per_site.values()), axis=0))
    return len(per_site), PositionScores(aggregate=aggregate.tolist())


def _private(job: Job, stage: _Stage, ask: _Asking, releases: Releases) -> PositionScores:
    summed = releases.noised(stage.phase, noise_deviation(job.privacy.selection), lambda: ask(stage.private_item))
    return PositionScores(aggregate=summed.values.tolist(), noise_deviation=summed.deviation)


def _ask(
    exchange: Exchange,
    job: Job,
    models: FrozenModels,
    stage: _Stage,
    config: Mapping[str, int],
    item: str,
    check: Callable[[Answer], None] | None = None,
) -> dict[str, Scores]:
    """The item of every site that answered well, by name."""
    expected = Expected((item,), dimensions=models.dimensions(job))
    answers = exchange.ask_enough(Question(stage.phase, stage.message, expected, config, check=check))
    return {site: np.asarray(answer.values[item], np.float64) for site, answer in answers.good.items()}


def weighted_mean(values: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """Sum of weight times value over the sum of weights, added up in the order of the site names."""
    names = sorted(values)
    total = np.sum([weights[name] * values[name] for name in names], axis=0) / sum(weights[name] for name in names)
    return np.asarray(total, np.float64)

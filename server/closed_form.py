"""The one-shot bridge at the server: one message, the noised sum of the sites' statistics, and its solution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bridge.closed_form import Layout, solve, solved_arrays
from bridge.job import Job
from bridge.messages import CLOSED_FORM
from bridge.prototype import Arrays
from server.events import EventLog
from server.exchange import Exchange, Question
from server.models import FrozenModels
from server.noised import noised_sum
from server.record import SelectionRecord
from server.releases import Releases
from server.replies import Expected


def solved_bridge(
    exchange: Exchange,
    job: Job,
    models: FrozenModels,
    selection: SelectionRecord,
    broadcast: Arrays,
    log: EventLog,
    releases: Releases,
) -> Arrays:
    """All arrays of the bridge that the sites' statistics give, A and B solved, the rest as in `broadcast`.

    `releases` keeps the noised sum. Without a mechanism, and with equal
    weights, this is the ridge regression of one machine with all patients. Raises `RunError` where too few sites
    answer.
    """
    positions = selection.input_position, selection.output_position
    dimensions = models.dimensions(job, positions)
    shape = dimensions.bridge
    assert shape is not None
    asked = job.privacy.closed_form
    config = {"input-position": positions[0], "output-position": positions[1]}
    item = "statistics" if job.privacy.private else "closed_form_moments"
    expected = Expected((item,), dimensions=dimensions)
    log.emit("closed_form", state="started", sites=len(exchange.roster))

    def ask() -> dict[str, NDArray[np.float64]]:
        answers = exchange.ask_enough(Question("closed form", CLOSED_FORM, expected, config, broadcast))
        return {site: np.asarray(answer.values[item], np.float64) for site, answer in answers.good.items()}

    if job.privacy.private:
        released = releases.noised("closed_form", (asked.noise_multiplier or 0.0) * asked.clip, ask)
    else:
        released = noised_sum(ask(), job, 0.0, None)
    a, b = solve(
        released.values,
        Layout(shape.rows, shape.columns, dimensions.gram),
        rank=shape.rank,
        ridge=job.train.ridge,
        deviation=released.deviation,
        drop=asked.drop_below_noise,
    )
    log.emit("closed_form", state="done", sites=len(exchange.roster), numbers=len(released.values))
    return solved_arrays(broadcast, a, b)

"""The one-shot bridge at the server: one message, the noised sum of the sites' statistics, and its solution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge.closed_form import Layout, solve, solved_arrays
from bridge.job import Job
from bridge.messages import CLOSED_FORM
from bridge.prototype import Arrays
from server.events import EventLog
from server.exchange import Exchange, Question
from server.models import FrozenModels
from server.noised import noised_sum
from server.record import SelectionRecord
from server.replies import Expected

if TYPE_CHECKING:
    from bridge.privacy.noise import NoiseSource


def solved_bridge(
    exchange: Exchange,
    job: Job,
    models: FrozenModels,
    selection: SelectionRecord,
    broadcast: Arrays,
    log: EventLog,
    noise: NoiseSource | None = None,
) -> Arrays:
    """All arrays of the bridge that the sites' statistics give, A and B solved, the rest as in `broadcast`.

    `noise` is the server's own, where the mechanism asks for it (`central`). Without a mechanism, and with equal
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
    answers = exchange.ask_enough(Question("closed form", CLOSED_FORM, expected, config, broadcast))
    per_site = {site: answer.values[item] for site, answer in answers.good.items()}
    released = noised_sum(per_site, job, (asked.noise_multiplier or 0.0) * asked.clip, noise)
    a, b = solve(
        released.values,
        Layout(shape.rows, shape.columns, dimensions.gram),
        rank=shape.rank,
        ridge=job.train.ridge,
        deviation=released.deviation if job.privacy.private else 0.0,
        drop=asked.drop_below_noise,
    )
    log.emit("closed_form", state="done", sites=len(per_site), numbers=len(released.values))
    return solved_arrays(broadcast, a, b)

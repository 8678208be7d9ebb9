"""What each way of training costs, as a table: the bridge beside the rivals that train a whole encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from server.record import Cost, RunRecord
from server.report.tables import Table
from server.report.words import PREDICTOR_NAMES, figure_over_interval, in_bytes, in_time, predictors

_WAYS = {
    "bridge": PREDICTOR_NAMES["bridge"],
    "centralised": "Bridge, one machine",
    "kd:centralised": PREDICTOR_NAMES["kd:centralised"],
    "kd_contrast:centralised": PREDICTOR_NAMES["kd_contrast:centralised"],
    "site_alone": "Bridge, hospital alone (mean)",
    "kd:site_alone": PREDICTOR_NAMES["kd:site_alone"],
    "kd_contrast:site_alone": PREDICTOR_NAMES["kd_contrast:site_alone"],
}
_NONE = "–"


def costs_table(record: RunRecord) -> Table:
    """One row a way: balanced accuracy, trained parameters, seconds and memory; no rows where nothing was measured.

    The federated bridge's own time and traffic stand elsewhere; it has the parameters alone here.
    """
    heads = ("Way", "Balanced accuracy", "Trained parameters", "Times the bridge's", "Time", "Peak memory")
    evaluation = record.evaluation
    found = predictors(evaluation)
    bridge = _bridge_parameters(record)
    rows = [
        (
            name,
            figure_over_interval(found[way].balanced_accuracy),
            *_cells(way, costs_of(evaluation.costs, way), bridge),
        )
        for way, name in _WAYS.items()
        if way in found and evaluation.costs
    ]
    numbers = frozenset(range(1, len(heads)))
    return Table(heads, rows, numbers, strong=frozenset({0}) if "bridge" in found else frozenset(), fine=numbers)


def costs_of(costs: Mapping[str, Cost], way: str) -> list[Cost]:
    """The costs of a way: one, or one a hospital."""
    return [cost for name, cost in costs.items() if name == way or name.startswith(f"{way}:")]


def _bridge_parameters(record: RunRecord) -> int | None:
    if record.bridge is not None:
        return record.bridge.parameters
    costs = record.evaluation.costs
    return next((each.parameters for way in ("centralised", "site_alone") for each in costs_of(costs, way)), None)


def _cells(way: str, costs: Sequence[Cost], bridge: int | None) -> tuple[str, ...]:
    parameters = bridge if way == "bridge" else max((each.parameters for each in costs), default=None)
    ratio = f"{parameters / bridge:,.1f} ×" if parameters is not None and bridge else _NONE
    counted = f"{parameters:,}" if parameters is not None else _NONE
    if not costs:
        return counted, ratio, _NONE, _NONE
    passed, computing = fmean(each.seconds for each in costs), fmean(each.cpu_seconds for each in costs)
    time = f"{in_time(passed)}\n{in_time(computing)} of computing"
    added, peak = max(each.added_bytes for each in costs), max(each.peak_bytes for each in costs)
    return counted, ratio, time, f"{in_bytes(added)}\n{in_bytes(peak)} in all"

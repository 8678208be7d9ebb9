"""The result of a run in plain sentences, each computed from the figures and none claiming more than they show."""

from __future__ import annotations

from server.record import Metric, Metrics, RunRecord
from server.report.words import count, figure, figure_with_interval, interval


def modality(record: RunRecord, role: str) -> str:
    """`ECG`, from the card of `old_encoder` or `new_encoder`; `the old modality` where the run kept no card."""
    window = record.models.get(f"{role}_encoder", {}).get("window")
    name = window.get("modality") if isinstance(window, dict) else None
    return str(name) if name else f"the {role} modality"


def headline(record: RunRecord) -> str:
    """One plain sentence: what the federated bridge reached, beside its controls; or why there is no such figure."""
    found = _balanced(record.evaluation.bridge)
    if found is None:
        return no_result(record)
    old, new = modality(record, "old"), modality(record, "new")
    who = _who(record)
    parts = [
        f"{who}the federated bridge reads {new} alone and reaches a balanced accuracy of {figure_with_interval(found)}"
    ]
    controls = [
        (record.evaluation.teacher, f"its teacher, which needs {old}, reaches"),
        (record.evaluation.baselines.get("site_alone"), "a hospital alone reaches on average"),
        (record.evaluation.baselines.get("shuffled_pairs"), "training on shuffled pairs gives"),
        (record.evaluation.chance, "chance is"),
    ]
    parts += [f"{words} {figure(value)}" for row, words in controls if (value := _balanced(row)) is not None]
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def no_result(record: RunRecord) -> str:
    """Why there is no figure of the bridge, as far as the record tells."""
    if record.status == "running":
        return "The run has not ended yet: there is no result to report so far."
    if record.status == "failed":
        return "The run stopped before it had a result; the reason stands above."
    if record.evaluation.bridge is not None and record.evaluation.bridge.agreement is not None:
        agreement = figure_with_interval(record.evaluation.bridge.agreement)
        return (
            f"The federated bridge gives its teacher's answer on {agreement} of the windows; "
            "there were no labels to judge either by."
        )
    return (
        "The run ended and its bridge was kept, but there is no figure of how well it answers: "
        "either the job asked for no evaluation, or no site's policy permits the counts that it needs."
    )


def _who(record: RunRecord) -> str:
    patients, windows = record.evaluation.patients, record.evaluation.windows
    if patients is None:
        return f"on {count(windows, 'test window')}, " if windows is not None else ""
    return f"on {count(patients, 'test patient')}" + (
        f" ({count(windows, 'window')}), " if windows is not None else ", "
    )


def remarks(record: RunRecord) -> list[str]:
    """What the figures say about each other, in points of balanced accuracy, and whether the controls hold."""
    bridge = _balanced(record.evaluation.bridge)
    if bridge is None:
        return []
    baselines = record.evaluation.baselines
    teacher, alone = _balanced(record.evaluation.teacher), _balanced(baselines.get("site_alone"))
    found = [
        _chance(bridge, _balanced(record.evaluation.chance)),
        _distance(
            bridge,
            teacher,
            "its teacher",
            above="giving up the old modality loses nothing here",
            below="what is lost by giving up the old modality",
        ),
        _distance(
            bridge,
            _balanced(baselines.get("centralised")),
            "all data on one machine",
            above="federation costs nothing here",
            below="what federation costs",
        ),
        _distance(
            bridge,
            alone,
            "a hospital alone, on average",
            above="what the hospitals gain by training together",
            below="the hospitals gain nothing by training together here",
        ),
        _shuffled(bridge, _balanced(baselines.get("shuffled_pairs")), _balanced(record.evaluation.chance)),
    ]
    return [sentence for sentence in found if sentence]


def _balanced(metrics: Metrics | None) -> Metric | None:
    return None if metrics is None else metrics.balanced_accuracy


def _distance(bridge: Metric, other: Metric | None, name: str, *, above: str, below: str) -> str:
    if other is None:
        return ""
    points = round(100 * (bridge.value - other.value), 1)
    side = "above" if points > 0 else "below"
    where = f"lies {abs(points)} points {side}" if points else "is level with"
    return f"The bridge {where} {name}: {above if points >= 0 else below}. {_touch(bridge, other)}".strip()


def _touch(one: Metric, other: Metric) -> str:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return ""
    apart = one.low > other.high or other.low > one.high
    return "The two intervals do not touch." if apart else "The two intervals overlap."


def _chance(bridge: Metric, chance: Metric | None) -> str:
    if chance is None or bridge.low is None or bridge.high is None or not bridge.low <= chance.value <= bridge.high:
        return ""
    return (
        f"The bridge's interval ({interval(bridge)}) holds chance ({figure(chance)}): it can't be told from guessing."
    )


def _shuffled(bridge: Metric, shuffled: Metric | None, chance: Metric | None) -> str:
    if shuffled is None or chance is None:
        return ""
    if shuffled.low is None or shuffled.high is None:
        return f"Trained on shuffled pairs it gives {figure(shuffled)}, where chance is {figure(chance)}."
    holds = shuffled.low <= chance.value <= shuffled.high
    where = (
        f"chance lies within its interval ({interval(shuffled)}), as it must"
        if holds
        else f"its interval ({interval(shuffled)}) does not hold chance ({figure(chance)}): doubt the result"
    )
    touches = _touch(bridge, shuffled).replace("The two intervals", "This interval and that of the bridge")
    return f"Trained on shuffled pairs it gives {figure(shuffled)}; {where}. {touches}".strip()

"""Numbers and codes in words a reader of the report understands."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from bridge.messages import SENTENCES, ReasonCode
from server.record import Evaluation, Metric, Metrics

METRIC_NAMES = {
    "balanced_accuracy": "Balanced accuracy",
    "f1_macro": "F1 (macro)",
    "f1_weighted": "F1 (weighted)",
    "agreement": "Agreement with the teacher",
}

PREDICTOR_NAMES = {
    "teacher": "Teacher",
    "centralised": "All data on one machine",
    "linear_student": "Linear student",
    "bridge": "Federated bridge",
    "site_alone": "Hospital alone (mean)",
    "kd:centralised": "KD, one machine",
    "kd_contrast:centralised": "KD-Contrast, one machine",
    "kd:site_alone": "KD, hospital alone (mean)",
    "kd_contrast:site_alone": "KD-Contrast, hospital alone (mean)",
    "shuffled_pairs": "Shuffled pairs",
    "chance": "Chance",
}
"""Every predictor in the order in which a reader compares them."""

PREDICTOR_MEANING = {
    "teacher": "the frozen old encoder and its head on the old modality itself: what the bridge imitates",
    "centralised": "the same bridge trained with every hospital's pairs on one machine: what federation costs",
    "linear_student": "logistic regression from the new encoder to the teacher's answers, all data on one machine",
    "bridge": "trained across the hospitals, reads the new modality alone: the result",
    "site_alone": "the same bridge trained by each hospital on its own pairs: what federation gains",
    "kd:centralised": "the whole new encoder, trained to answer as the teacher does, all data on one machine",
    "kd_contrast:centralised": "the same, its features told apart by the teacher's, all data on one machine",
    "kd:site_alone": "the whole new encoder, trained by each hospital on its own pairs",
    "kd_contrast:site_alone": "the same, with features told apart by the teacher's",
    "shuffled_pairs": "the same training on pairs of different windows: must be at chance, or the result means nothing",
    "chance": "an answer that does not look at the signal",
}


def predictors(evaluation: Evaluation) -> dict[str, Metrics]:
    """Figures by predictor, those that are there, in the order of `PREDICTOR_NAMES`."""
    named: dict[str, Metrics | None] = {
        "teacher": evaluation.teacher,
        "bridge": evaluation.bridge,
        "chance": evaluation.chance,
        **{str(name): metrics for name, metrics in evaluation.baselines.items()},
    }
    found = {name: named.get(name) for name in PREDICTOR_NAMES}
    return {name: metrics for name, metrics in found.items() if metrics is not None}


def figure(metric: Metric | None) -> str:
    """`0.76`, or a dash where there is no figure."""
    return "–" if metric is None else f"{metric.value:.2f}"


def interval(metric: Metric | None) -> str:
    """`0.73 to 0.79`; empty where there is no interval."""
    if metric is None or metric.low is None or metric.high is None:
        return ""
    return f"{metric.low:.2f} to {metric.high:.2f}"


def figure_over_interval(metric: Metric | None) -> str:
    """`0.76`, and on a second line `0.73–0.79`: a table's cell."""
    bounds = interval(metric).replace(" to ", "–")
    return f"{figure(metric)}\n{bounds}" if bounds else figure(metric)


def figure_with_interval(metric: Metric | None) -> str:
    """`0.76 (0.73 to 0.79)`."""
    bounds = interval(metric)
    return f"{figure(metric)} ({bounds})" if bounds else figure(metric)


def in_bytes(count: int) -> str:
    """`812 B`, `10.6 kB`, `2.31 MB`: decimal units, three digits."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5 or unit == "GB":
            break
    return f"{size:.{max(0, 3 - len(str(int(size))))}f} {unit}"


def in_time(seconds: float) -> str:
    """`0.4 s`, `48 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def in_date(moment: str) -> str:
    """`2026-03-01 10:15 UTC` of an ISO time; any other text as it is."""
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError:
        return moment
    return f"{parsed:%Y-%m-%d %H:%M} {parsed.tzname() or ''}".strip()


def count(number: int, noun: str) -> str:
    """`1 window`, `2,813 windows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


_SERVER_CODES = {
    "NO_REPLY": "No reply came in time.",
    "OFFLINE": "The site was not online.",
    "BAD_REPLY": "The reply did not pass the server's check and was left out.",
    "NOT_EXPECTED": "The job does not name this site.",
    "SAME_NAME": "Several sites go by this name.",
    "OTHER_NAME": "The site answered another name than the one under which it was enrolled.",
    "UNKNOWN_CODE": "The site gave a code that this version does not know.",
}
"""What the server itself notes of a site (server.replies, server.roster)."""

_FLOWER_CODE = "FLOWER_"


def short(text: str, length: int) -> str:
    """At most so many characters, without some of the middle where it is longer: a label in a picture."""
    ending = length // 3
    return text if len(text) <= length else text[: length - ending - 1].rstrip() + "…" + text[-ending:].lstrip()


def reason_in_words(reason: str) -> str:
    """The fixed sentence of a code's name; any other text as it is."""
    text = reason.strip()
    if text in ReasonCode.__members__:
        return SENTENCES[ReasonCode[text]]
    if text.startswith(_FLOWER_CODE):
        return f"Flower could not deliver the message or its reply (its code {text.removeprefix(_FLOWER_CODE)})."
    return _SERVER_CODES.get(text, text)


def lost_turns_in_words(turns: Sequence[str]) -> list[str]:
    """`round 3: STORAGE`, `round 5: STORAGE` become `rounds 3, 5: The site can't write to its disk.`"""
    grouped: dict[str, list[str]] = {}
    for turn in turns:
        where, separator, why = turn.partition(":")
        grouped.setdefault(reason_in_words(why) if separator else "", []).append(where.strip())
    return [f"{_places(places)}: {why}" if why else _places(places) for why, places in grouped.items()]


def _places(places: Sequence[str]) -> str:
    once = dict.fromkeys(places)  # a repeated exchange can cost a site the same turn again
    numbers = [place.removeprefix("round ") for place in once if place.startswith("round ")]
    others = [place for place in once if not place.startswith("round ")]
    rounds = [("round " if len(numbers) == 1 else "rounds ") + ", ".join(numbers)] if numbers else []
    return ", ".join(others + rounds)

"""The tables of one run's report as plain rows of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge.encoders.published import FORBIDDEN
from bridge.messages import ITEMS
from server.record import Metrics, RunRecord
from server.report.headline import modality
from server.report.words import (
    METRIC_NAMES,
    PREDICTOR_MEANING,
    PREDICTOR_NAMES,
    count,
    figure_over_interval,
    in_bytes,
    in_time,
    lost_turns_in_words,
    predictors,
    reason_in_words,
)


@dataclass(frozen=True)
class Table:
    """Column heads and rows. Columns in `numeric` are set to the right; of those in `fine`, the lines after the first
    are set smaller; rows in `strong` stand out.
    """

    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()
    fine: frozenset[int] = frozenset()


def predictor_labels(record: RunRecord) -> dict[str, str]:
    """Names of the predictors with the modality that each reads."""
    old, new = modality(record, "old"), modality(record, "new")
    reads = {"teacher": old, "chance": ""}
    return {
        name: f"{label}, {text}" if (text := reads.get(name, new)) else label for name, label in PREDICTOR_NAMES.items()
    }


def metrics_table(record: RunRecord) -> Table:
    """Every figure of every predictor."""
    found = predictors(record.evaluation)
    labels = predictor_labels(record)
    columns = [key for key in METRIC_NAMES if any(getattr(row, key) is not None for row in found.values())]
    rows = [
        (
            f"{labels[name]}\n{PREDICTOR_MEANING[name]}",
            *(figure_over_interval(getattr(row, key)) for key in columns),
        )
        for name, row in found.items()
    ]
    strong = frozenset(index for index, name in enumerate(found) if name == "bridge")
    heads = ("Predictor", *(METRIC_NAMES[key] for key in columns))
    columns_of_figures = frozenset(range(1, len(heads)))
    return Table(heads, rows, columns_of_figures, strong, fine=columns_of_figures | {0})


def named_metrics_table(head: str, rows: Mapping[str, Metrics]) -> Table:
    """Figures by name, for example of each hospital alone."""
    columns = [key for key in METRIC_NAMES if any(getattr(row, key) is not None for row in rows.values())]
    body = [(name, *(figure_over_interval(getattr(row, key)) for key in columns)) for name, row in rows.items()]
    of_figures = frozenset(range(1, len(columns) + 1))
    return Table((head, *(METRIC_NAMES[key] for key in columns)), body, of_figures, fine=of_figures)


def groups_table(groups: Mapping[str, Mapping[str, Metrics]]) -> Table:
    """Balanced accuracy by group and predictor."""
    names = [name for name in PREDICTOR_NAMES if any(name in row for row in groups.values())]
    rows = [
        (group, *(figure_over_interval(row[name].balanced_accuracy if name in row else None) for name in names))
        for group, row in groups.items()
    ]
    of_figures = frozenset(range(1, len(names) + 1))
    return Table(("Group", *(PREDICTOR_NAMES[name] for name in names)), rows, of_figures, fine=of_figures)


def sites_table(record: RunRecord) -> Table:
    """Who took part, in how many rounds, and which turns were lost, with the reasons in words."""
    rows = []
    for site in sorted(record.sites, key=lambda each: each.site):
        rounds = sum(site.site in row.sites for row in record.rounds)
        takes_part = "yes" if site.can_take_part else f"no: {reason_in_words(site.reason)}"
        lost = "\n".join(lost_turns_in_words(site.lost_turns)) or "none"
        rows.append((site.site, takes_part, f"{rounds} of {len(record.rounds)}" if record.rounds else "–", lost))
    return Table(("Site", "Takes part", "Rounds counted", "Lost turns"), rows, frozenset({2}))


def outbox_table(record: RunRecord) -> Table:
    """What left the sites: one row an item, with how often, how many bytes, from how many sites, and what for."""
    totals: dict[str, tuple[int, int, set[str], str]] = {}
    for row in record.outbox:
        times, size, sites, _ = totals.get(row.item, (0, 0, set(), ""))
        totals[row.item] = (times + row.count, size + row.bytes, sites | {row.site}, row.purpose)
    rows = [
        (item, purpose, str(len(sites)), f"{times:,}", in_bytes(size))
        for item, (times, size, sites, purpose) in sorted(totals.items(), key=lambda entry: _declared(entry[0]))
    ]
    if rows:
        every = list(totals.values())
        names = {row.site for row in record.outbox}
        total = sum(size for _, size, _, _ in every)
        rows.append(("all items", "", str(len(names)), f"{sum(times for times, *_ in every):,}", in_bytes(total)))
    strong = frozenset({len(rows) - 1}) if rows else frozenset[int]()
    return Table(("Item", "What for", "Sites", "Times", "Bytes"), rows, frozenset({2, 3, 4}), strong)


def _declared(item: str) -> int:
    """Its place in the schema of messages; what is not in there comes last."""
    return list(ITEMS).index(item) if item in ITEMS else len(ITEMS)


def models_table(record: RunRecord) -> Table:
    """The frozen models: what they read, how large they are, where they come from, under which licence."""
    names = {"old_encoder": "Old encoder", "new_encoder": "New encoder", "task_head": "Task head"}
    rows = [
        (names.get(name, name), _reads(card), _size(card), _provenance(card), str(card.get("digest", ""))[:16])
        for name, card in record.models.items()
    ]
    return Table(("Model", "Reads", "Size", "Where it comes from", "Digest"), rows, fine=frozenset({3}))


def licence_limits(record: RunRecord) -> list[str]:
    """A sentence for each model whose card says that its licence forbids commercial use."""
    found = []
    for name, card in record.models.items():
        training = card.get("training") or {}
        if training.get("commercial_use") == FORBIDDEN:
            title, licence = training.get("model", "a published model"), training.get("licence_weights", "see its card")
            found.append(
                f"The licence of the {name.replace('_', ' ')}, {title}, forbids commercial use ({licence}). "
                "The bridge works with this model only, so the limit holds for its use, too."
            )
    return found


def _reads(card: Mapping[str, Any]) -> str:
    window = card.get("window")
    if isinstance(window, dict):
        rate, samples = window.get("rate_hz"), window.get("samples")
        seconds = (
            f"{samples / rate:g} s, " if isinstance(rate, int | float) and isinstance(samples, int) and rate else ""
        )
        channels = window.get("channels") or []
        named = ", ".join(map(str, channels)) if len(channels) <= 3 else f"{len(channels)} channels"
        return (
            f"{window.get('modality', '')}: {seconds}{rate:g} Hz, {named}" if rate else str(window.get("modality", ""))
        )
    classes = card.get("classes") or []
    return f"the old encoder's pooled output; answers {', '.join(map(str, classes))}"


def _size(card: Mapping[str, Any]) -> str:
    if "layouts_in" in card:
        return f"{int(card.get('parameters', 0)):,} parameters, {count(len(card['layouts_in']), 'position')}"
    return f"linear layer from width {card.get('width', '?')}"


def _provenance(card: Mapping[str, Any]) -> str:
    training = card.get("training") or {}
    plain = {key: value for key, value in training.items() if isinstance(value, str | int | float | bool)}
    return "\n".join(f"{key.replace('_', ' ')}: {value}" for key, value in plain.items()) or "not said by its card"


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """The run in numbers: how the federation went."""
    rounds, asked = record.rounds, record.config.get("train")
    wanted = asked.get("rounds") if isinstance(asked, dict) else None
    taking = [site for site in record.sites if site.can_take_part]
    if record.rotations and not record.rounds:
        return [("Rotations", str(len(record.rotations))), *_time(record)]
    found = [
        ("Sites that took part", f"{len(taking)} of {len(record.sites)}"),
        ("Rounds counted", f"{len(rounds)}" + (f" of {wanted}" if isinstance(wanted, int) else "")),
        *_time(record),
        ("Left the sites in rounds, packed", in_bytes(sum(row.bytes_up for row in rounds))),
        ("Sent to the sites in rounds, packed", in_bytes(sum(row.bytes_down for row in rounds))),
    ]
    if record.bridge is not None:
        shape = f"rank {record.bridge.rank}, {count(record.bridge.prototypes, 'prototype')}"
        found.append(("Bridge", f"{record.bridge.parameters:,} parameters ({shape})"))
        found.append(("Kept", f"round {record.bridge.kept_round}"))
    if record.resumed_from_round is not None:
        found.append(("Resumed", f"after round {record.resumed_from_round}"))
    return found


def _time(record: RunRecord) -> list[tuple[str, str]]:
    """How long it took; under a private mechanism that is not released."""
    if record.seconds is None:
        return []
    taken = [row.seconds for row in record.rounds if row.seconds is not None]
    return [("Time", in_time(record.seconds) + (f", {in_time(_mean(taken))} a round" if taken else ""))]


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def rotations_table(rotations: Mapping[str, RunRecord | str]) -> Table:
    """One row a rotation, from its own run record; a rotation without one is said."""
    rows: list[tuple[str, ...]] = []
    for name, part in rotations.items():
        if isinstance(part, str):
            rows.append((name, part, "", "", "", ""))
            continue
        chosen, bridge, teacher = part.selection, part.evaluation.bridge, part.evaluation.teacher
        rows.append(
            (
                name,
                part.status,
                f"{chosen.input_position} → {chosen.output_position}" if chosen else "–",
                f"{part.evaluation.patients}" if part.evaluation.patients is not None else "–",
                figure_over_interval(bridge.balanced_accuracy if bridge else None),
                figure_over_interval(teacher.balanced_accuracy if teacher else None),
            )
        )
    heads = ("Rotation", "Status", "Positions", "Test patients", "Bridge", "Teacher")
    return Table(heads, rows, frozenset({3, 4, 5}), fine=frozenset({4, 5}))

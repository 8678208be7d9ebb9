"""The pictures of one run's report. Each takes plain figures of the run record and gives one inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from server.record import Evaluation, Metric, Metrics, PositionScores, RoundRecord, RunRecord, SelectionRecord
from server.report.drawing import BLUE, COLOURS, FAINT, GREY, INK, MARKERS, MUTED, ORANGE, PAPER, WIDE, as_svg, canvas
from server.report.windows import ExampleWindow
from server.report.words import PREDICTOR_NAMES, figure_with_interval, in_bytes, short


def result_chart(
    rows: Mapping[str, Metrics], labels: Mapping[str, str], per_site: Mapping[str, Metrics], key: str = "result"
) -> Markup | None:
    """Dot and 95 % interval of each predictor; chance a line, each hospital alone a small stroke. None without any.

    `key` tells two such pictures of one page apart.
    """
    figures = {name: found for name, row in rows.items() if (found := row.balanced_accuracy) is not None}
    chance = figures.pop("chance", None)
    if not figures:
        return None
    alone = [found.value for row in per_site.values() if (found := row.balanced_accuracy) is not None]
    with canvas(WIDE, 0.95 + 0.42 * len(figures), key) as fig:
        axes = fig.add_subplot()
        for height, (name, found) in enumerate(reversed(figures.items())):
            if name == "site_alone":
                axes.plot(alone, [height] * len(alone), "|", color=ORANGE, ms=9, mew=1.2, alpha=0.55)
            _dot(axes, found, height, name)
            axes.annotate(
                figure_with_interval(found),
                (1.01, height),
                xycoords=("axes fraction", "data"),
                va="center",
                annotation_clip=False,
                weight="bold" if name == "bridge" else "normal",
            )
        _chance_line(axes, chance)
        names = [labels.get(name, PREDICTOR_NAMES[name]) for name in reversed(figures)]
        axes.set_yticks(range(len(names)), names)
        for tick, name in zip(axes.get_yticklabels(), reversed(figures), strict=True):
            tick.set_weight("bold" if name == "bridge" else "normal")
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlim(*_limits([*figures.values(), *([chance] if chance else [])], alone))
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        bounded = any(found.low is not None for found in figures.values())
        axes.set_xlabel("Balanced accuracy on the test patients" + (", with its 95 % interval" if bounded else ""))
        text = "; ".join(f"{labels.get(n, PREDICTOR_NAMES[n])} {figure_with_interval(m)}" for n, m in figures.items())
        return as_svg(fig, f"Result against its controls: {text}")


def _dot(axes: Any, found: Metric, height: float, name: str, size: float = 8) -> None:
    colour = COLOURS[name]
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [height, height], color=colour, lw=2.2, solid_capstyle="butt", alpha=0.75)
    axes.plot(found.value, height, MARKERS[name], color=colour, ms=size, mec=PAPER, mew=size / 10)


def _chance_line(axes: Any, chance: Metric | None) -> None:
    if chance is not None:
        axes.axvline(chance.value, color=GREY, ls="--", lw=1.2)
        axes.annotate(
            f"chance {chance.value:.2f}",
            (chance.value, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 1),
            textcoords="offset points",
            color=MUTED,
            va="bottom",
        )


def _limits(figures: Sequence[Metric], more: Sequence[float] = ()) -> tuple[float, float]:
    ends = [end for found in figures for end in (found.value, found.low, found.high) if end is not None] + list(more)
    return max(-0.02, min(ends) - 0.05), min(1.02, max(ends) + 0.05)


def scores_chart(selection: SelectionRecord, private: bool = False) -> Markup | None:
    """Scores by position: the probe over the new encoder's, the similarity over the old one's, chosen ones marked."""
    panels = [
        (
            selection.probe_scores,
            selection.input_position,
            "Where the bridge reads (new encoder)",
            _probe_axis(selection, private),
        ),
        (
            selection.similarity_scores,
            selection.output_position,
            "Where it writes (old encoder)",
            "noised similarity" if private else "similarity (linear CKA)",
        ),
    ]
    shown = [panel for panel in panels if panel[0] is not None]
    if not shown:
        return None
    with canvas(WIDE * len(shown) / 2, 3.1, "scores") as fig:
        every = fig.subplots(1, len(shown), squeeze=False)[0]
        for axes, (scores, chosen, title, label) in zip(every, shown, strict=True):
            assert scores is not None
            _scores_panel(axes, scores, chosen)
            axes.set(title=title, ylabel=label, xlabel="position (block)")
        if any(scores is not None and scores.per_site for scores, *_ in shown):
            fig.legend(*every[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=8.5)
        return as_svg(
            fig,
            f"Selection scores by position; the bridge reads position {selection.input_position} of the new encoder "
            f"and writes position {selection.output_position} of the old one",
        )


def _probe_axis(selection: SelectionRecord, private: bool) -> str:
    if private:
        return "noised score of the probe"
    return "held-out explained share" if selection.mode == "moments" else "balanced accuracy of the probe"


def _scores_panel(axes: Any, scores: PositionScores, chosen: int) -> None:
    positions = list(range(len(scores.aggregate)))
    for number, values in enumerate((scores.per_site or {}).values()):
        axes.plot(positions, values, color=GREY, lw=0.9, alpha=0.6, label="each site" if number == 0 else None)
    if scores.noise_deviation:
        reach = 1.96 * scores.noise_deviation
        axes.errorbar(positions, scores.aggregate, reach, fmt="none", ecolor=GREY, lw=1.2, alpha=0.8)
    axes.axvspan(chosen - 0.35, chosen + 0.35, color=BLUE, alpha=0.09, lw=0)
    axes.plot(positions, scores.aggregate, "o-", color=BLUE, lw=2, ms=5, mec=PAPER, label="all sites together")
    if chosen < len(positions):
        best = scores.aggregate[chosen]
        axes.plot(chosen, best, "o", ms=12, mfc="none", mec=BLUE, mew=1.8)
        axes.annotate(
            f"chosen: {chosen}",
            (chosen, best),
            xytext=(0, 11),
            textcoords="offset points",
            ha="center",
            va="bottom",
            weight="bold",
            color=BLUE,
        )
    axes.margins(x=0.12, y=0.22)
    axes.set_xticks(positions if len(positions) <= 16 else positions[:: len(positions) // 12])


def curves_chart(rounds: Sequence[RoundRecord], kept: int | None, criterion: str) -> Markup | None:
    """Training loss and criterion by round, each where it was permitted; None where neither was."""
    panels = [
        ("Training loss", [(row.round, row.loss) for row in rounds if row.loss is not None], INK),
        (criterion, [(row.round, row.criterion) for row in rounds if row.criterion is not None], BLUE),
    ]
    shown = [(name, points, colour) for name, points, colour in panels if points]
    if not shown:
        return None
    with canvas(WIDE if len(shown) == 2 else WIDE * 0.62, 2.6, "curves") as fig:
        for axes, (name, points, colour) in zip(fig.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            numbers, values = zip(*points, strict=True)
            axes.plot(numbers, values, "o-" if len(numbers) <= 40 else "-", color=colour, ms=3.5, lw=1.7)
            if kept is not None:
                axes.axvline(kept, color=BLUE, ls=":", lw=1.3)
                late = kept > (rounds[0].round + rounds[-1].round) / 2
                axes.annotate(
                    "kept",
                    (kept, 1.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(-3 if late else 3, -2),
                    textcoords="offset points",
                    ha="right" if late else "left",
                    va="top",
                    color=BLUE,
                )
            axes.set(title=name, xlabel="round")
            axes.margins(x=0.03, y=0.12)
            axes.xaxis.get_major_locator().set_params(integer=True)
        return as_svg(fig, "Training curves: " + ", ".join(name for name, _, _ in shown) + " by round")


_CONFUSION = {
    "teacher": ("Teacher", "label"),
    "bridge": ("Federated bridge", "label"),
    "agreement": ("Bridge against teacher", "teacher's answer"),
}


def confusion_chart(evaluation: Evaluation) -> Markup | None:
    """Counts and shares of each row as shaded squares, one panel a predictor; None where nothing is permitted."""
    matrices: dict[str, Sequence[Sequence[float]]] = {
        str(name): matrix for name, matrix in (evaluation.confusion or evaluation.confusion_sums).items() if matrix
    }
    shown = [name for name in _CONFUSION if name in matrices]
    if not shown:
        return None
    side = min(4.1, max(2.75, 0.45 * max(len(matrices[name]) for name in shown) + 1.3))
    columns = min(len(shown), int((WIDE + 0.1) / side))
    rows = -(-len(shown) // columns)
    with canvas(side * columns, side * 0.95 * rows, "confusion") as fig:
        every = list(fig.subplots(rows, columns, squeeze=False).flat)
        for axes, name in zip(every, shown, strict=False):
            title, row_name = _CONFUSION[name]
            matrix = matrices[name]
            _confusion_panel(axes, matrix)
            known = len(evaluation.classes) == len(matrix)
            names = [short(text, 14) for text in evaluation.classes] if known else [str(i) for i in range(len(matrix))]
            turned = max(map(len, names)) * len(names) > 22
            axes.set_xticks(range(len(names)), names, rotation=35 if turned else 0, ha="right" if turned else "center")
            axes.set_yticks(range(len(names)), names)
            axes.set(title=title, xlabel="answer", ylabel=row_name)
        for axes in every[len(shown) :]:
            axes.remove()
        return as_svg(fig, "Confusion matrices: " + ", ".join(_CONFUSION[name][0] for name in shown))


def _confusion_panel(axes: Any, matrix: Sequence[Sequence[float]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    # Noised sums may be below zero; nothing is a share of less than nothing.
    rows = [[max(0, value) for value in row] for row in matrix]
    shares = [[value / (sum(row) or 1) for value in row] for row in rows]
    colours = LinearSegmentedColormap.from_list("paper-blue", [PAPER, BLUE])
    places = range(len(matrix))
    axes.pcolormesh(places, places, shares, cmap=colours, vmin=0, vmax=1, edgecolors=FAINT, linewidth=0.5)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.grid(visible=False)
    small = len(matrix) > 4
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            share = shares[row][column]
            number = f"{value:,}" if isinstance(value, int) else f"{value:.1f}"
            text = f"{share:.0%}" if small else f"{share:.0%}\n{number}"
            colour = PAPER if share > 0.55 else INK
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7.5 if small else 8.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def groups_chart(groups: Mapping[str, Mapping[str, Metrics]]) -> Markup | None:
    """Balanced accuracy of each predictor within each public group; None without figures."""
    names = [name for name in PREDICTOR_NAMES if any(name in row for row in groups.values()) and name != "chance"]
    rows = [
        (group, [(name, metrics[name].balanced_accuracy) for name in names if name in metrics])
        for group, metrics in groups.items()
    ]
    every = [found for _, row in rows for _, found in row if found is not None]
    if not every:
        return None
    with canvas(WIDE, 1.2 + (0.2 * len(names) + 0.14) * len(rows), "groups") as fig:
        axes = fig.add_subplot()
        step = 0.72 / max(1, len(names))
        for place, (_, row) in enumerate(reversed(rows)):
            for name, found in row:
                if found is not None:
                    _dot(axes, found, place + ((len(names) - 1) / 2 - names.index(name)) * step, name, size=7)
        for name in names:
            axes.plot([], [], MARKERS[name], color=COLOURS[name], label=PREDICTOR_NAMES[name])
        chance = next((row["chance"].balanced_accuracy for row in groups.values() if "chance" in row), None)
        if chance is not None:
            axes.axvline(chance.value, color=GREY, ls="--", lw=1.2, label=f"chance {chance.value:.2f}")
        axes.set_yticks(range(len(rows)), [short(group, 40) for group, _ in reversed(rows)])
        axes.set_ylim(-0.55, len(rows) - 0.45)
        axes.set_xlim(*_limits(every))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        bounded = any(found.low is not None for found in every)
        axes.set_xlabel("Balanced accuracy within the group" + (", with its 95 % interval" if bounded else ""))
        fig.legend(loc="outside upper left", ncols=4, fontsize=8.5)
        return as_svg(fig, "Balanced accuracy by group")


def bytes_chart(record: RunRecord) -> Markup | None:
    """What left each site, stacked by kind of item; None where nothing is recorded."""
    kinds = {"update": "bridge updates", "scores": "position scores", "confusion": "metrics", "other": "other"}
    colours = dict(zip(kinds, (BLUE, ORANGE, GREY, FAINT), strict=True))
    totals: dict[str, dict[str, int]] = {}
    for row in record.outbox:
        site = totals.setdefault(row.site, dict.fromkeys(kinds, 0))
        site[item_kind(row.item)] += row.bytes
    if not totals:
        return None
    sites = sorted(totals)
    with canvas(WIDE, 0.95 + 0.34 * len(sites), "bytes") as fig:
        axes = fig.add_subplot()
        left = [0] * len(sites)
        for kind, label in kinds.items():
            widths = [totals[site][kind] for site in sites]
            if any(widths):
                axes.barh(sites, widths, left=left, color=colours[kind], height=0.62, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for height, total in enumerate(left):
            axes.annotate(in_bytes(total), (total, height), xytext=(4, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.xaxis.set_major_formatter(lambda value, _: in_bytes(round(value)))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        fig.legend(loc="outside upper left", ncols=4, fontsize=8.5)
        return as_svg(
            fig,
            "Bytes that left each site: " + ", ".join(f"{s} {in_bytes(t)}" for s, t in zip(sites, left, strict=True)),
        )


def item_kind(item: str) -> str:
    """Which of the few kinds a reader tells apart an item is of."""
    if item.startswith("update."):
        return "update"
    if item.startswith("confusion"):
        return "confusion"
    return "scores" if item.endswith(("_scores", "_moments", "_sums")) else "other"


def windows_chart(title: str, windows: Sequence[ExampleWindow], name: str) -> Markup:
    """One moment seen in several modalities, one above the other on one time axis."""
    ordered = sorted(windows, key=lambda window: window.role != "old")
    with canvas(WIDE, 0.55 + 1.05 * len(ordered), name) as fig:
        every = fig.subplots(len(ordered), 1, sharex=True, squeeze=False)[:, 0]
        for axes, window in zip(every, ordered, strict=True):
            seconds = [sample / window.rate_hz for sample in range(len(window.values))]
            axes.plot(seconds, window.values, color=GREEN_OR_BLUE[window.role], lw=1)
            name = "\n".join(dict.fromkeys((window.modality, window.channel)))
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
            axes.set_yticks([])
            axes.margins(x=0.005, y=0.1)
            axes.spines["left"].set_visible(False)
        every[0].set_title(title)
        every[-1].set_xlabel("seconds")
        return as_svg(fig, f"{title}: " + ", ".join(f"{window.modality} {window.channel}" for window in ordered))


GREEN_OR_BLUE = {"old": COLOURS["teacher"], "new": COLOURS["bridge"]}


def comparison_chart(labels: Sequence[str], rows: Sequence[Mapping[str, Metric | None]]) -> Markup | None:
    """Balanced accuracy of each predictor, one line a run: the bridge with its interval, the others as marks."""
    names = [name for name in PREDICTOR_NAMES if name != "chance" and any(row.get(name) for row in rows)]
    every = [found for row in rows for found in row.values() if found is not None]
    if not every:
        return None
    with canvas(WIDE, 1.25 + 0.38 * len(rows), "comparison") as fig:
        axes = fig.add_subplot()
        for height, row in enumerate(rows):
            for name in sorted(names, key="bridge".__eq__):
                found = row.get(name)
                if found is not None:
                    shown = found if name == "bridge" else Metric(value=found.value)
                    _dot(axes, shown, height, name, size=9 if name == "bridge" else 7)
        for name in names:
            axes.plot([], [], MARKERS[name], color=COLOURS[name], label=PREDICTOR_NAMES[name])
        chances = {found.value for row in rows if (found := row.get("chance")) is not None}
        for value in sorted(chances):
            axes.axvline(value, color=GREY, ls="--", lw=1.2, label=f"chance {value:.2f}")
        axes.set_yticks(range(len(labels)), [short(label, 40) for label in labels])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(*_limits(every))
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("Balanced accuracy on the test patients; the bridge with its 95 % interval")
        fig.legend(loc="outside upper left", ncols=4, fontsize=8.5)
        return as_svg(fig, "Balanced accuracy of the runs, side by side")

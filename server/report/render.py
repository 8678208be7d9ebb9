"""From a run folder alone to one self-contained `report.html`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from server.errors import RunFolderError
from server.record import Evaluation, RunRecord
from server.report import charts, tables
from server.report.costs import costs_table
from server.report.folder import RunFolder, read_folder
from server.report.headline import headline, modality, remarks
from server.report.page import fill, write_file
from server.report.privacy import audit_part, privacy_part, simulated_on_whom
from server.report.windows import ExampleWindow, read_example_windows
from server.report.words import count, figure, in_date, in_time, interval, predictors

REPORT_HTML = "report.html"


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Render the report of a run folder into `out` (default: `report.html` in the folder) and give its path.

    The reports of a rotated run's own rotations are rendered too, each in its folder. Raises `RunFolderError` where the
    folder holds no run record or the file can't be written.
    """
    run = read_folder(folder)
    for name, part in run.rotations.items():
        if isinstance(part, RunRecord):
            write_report(folder / name)
    target = out if out is not None else folder / REPORT_HTML
    write_file(target, fill("report.html.j2", report_page(run, target)))
    return target


def report_page(run: RunFolder, target: Path) -> dict[str, Any]:
    """Everything that the template shows. A part that is missing is an empty value here and a sentence there."""
    record = run.record
    evaluation, private = record.evaluation, record.threat_model != "none"
    rows = predictors(evaluation)
    labels = tables.predictor_labels(record)
    selection = record.selection
    windows, windows_problem = _windows(run.path)
    return {
        "record": record,
        "old": modality(record, "old"),
        "new": modality(record, "new"),
        "headline": headline(record),
        "remarks": remarks(record),
        "tiles": _tiles(record),
        "facts": tables.facts(record),
        "result_chart": charts.result_chart(rows, labels, evaluation.site_alone_per_site),
        "metrics": tables.metrics_table(record),
        "alone": tables.named_metrics_table("Hospital", evaluation.site_alone_per_site),
        "costs": costs_table(record),
        "confusion_chart": charts.confusion_chart(evaluation),
        "groups_chart": charts.groups_chart(evaluation.groups),
        "groups": tables.groups_table(evaluation.groups),
        "scores_chart": charts.scores_chart(selection, private) if selection else None,
        "curves_chart": _curves(record),
        "sites": tables.sites_table(record),
        "bytes_chart": charts.bytes_chart(record),
        "outbox": tables.outbox_table(record),
        "models": tables.models_table(record),
        "licence_limits": tables.licence_limits(record),
        "rotations": tables.rotations_table(run.rotations),
        "links": _rotation_links(run, target),
        "windows": windows,
        "windows_problem": windows_problem,
        "config_text": _yaml(record.config),
        "simulation_text": _yaml(run.simulation),
        "meta": _meta(record),
        "private": private,
        "privacy": privacy_part(record, run.statement),
        "audit": audit_part(run.audit),
        "simulated": _simulated(run),
        "bounded": any(row.balanced_accuracy and row.balanced_accuracy.low is not None for row in rows.values()),
        "intervals": _intervals(evaluation),
        "real": record.engine == "deployment",
        "study": run.submission,
    }


def _intervals(evaluation: Evaluation) -> str:
    """What the intervals are, or why there are none, as a sentence; empty where nothing is said."""
    text = evaluation.interval.rstrip(".").replace(" %", "\u00a0%")
    if not text:
        return ""
    return f"No intervals: {text.removeprefix('none: ')}." if text.startswith("none: ") else f"Intervals: {text}."


def _simulated(run: RunFolder) -> dict[str, Any] | None:
    """The section on what the simulator alone knows; None where it left nothing."""
    found = run.simulated
    if found is None:
        return None
    record = run.record.model_copy(update={"evaluation": found})
    rows = predictors(found)
    return {
        "on_whom": simulated_on_whom(found),
        "headline": headline(record),
        "remarks": remarks(record),
        "chart": charts.result_chart(rows, tables.predictor_labels(record), found.site_alone_per_site, "simulated"),
        "metrics": tables.metrics_table(record),
        "alone": tables.named_metrics_table("Hospital", found.site_alone_per_site),
        "costs": costs_table(record),
        "groups": tables.groups_table(found.groups),
        "intervals": found.interval.rstrip(".").replace(" %", "\u00a0%"),
    }


def _meta(record: RunRecord) -> list[str]:
    """The line below the title."""
    taken = record.models and f"{modality(record, 'new')} takes the place of {modality(record, 'old')}"
    pieces = [
        taken or "",
        count(len(record.sites), "site") if record.sites else "",
        f"engine {record.engine}",
        f"seed {record.seed}",
        f"started {in_date(record.started)}" if record.started else "",
        f"took {in_time(record.seconds)}" if record.seconds else "",
    ]
    return [piece for piece in pieces if piece]


def _tiles(record: RunRecord) -> list[dict[str, str]]:
    """The five figures that a reader takes away."""
    rows = predictors(record.evaluation)
    names = {
        "teacher": f"Teacher, reads {modality(record, 'old')}",
        "bridge": f"Federated bridge, reads {modality(record, 'new')}",
        "site_alone": "A hospital alone, on average",
        "shuffled_pairs": "Shuffled pairs, a control",
        "chance": "Chance",
    }
    found = {name: rows[name].balanced_accuracy for name in names if name in rows}
    return [
        {
            "key": name,
            "label": names[name],
            "figure": figure(metric),
            "interval": "" if name == "chance" else interval(metric),
        }
        for name, metric in found.items()
        if metric is not None
    ]


def _curves(record: RunRecord) -> Markup | None:
    train = record.config.get("train")
    name = train.get("criterion") if isinstance(train, dict) else None
    words = {
        "agreement": "Agreement with the teacher (validation)",
        "balanced_accuracy": "Balanced accuracy (validation)",
        "train_loss": "Criterion: training loss",
    }
    kept = record.bridge.kept_round if record.bridge else None
    return charts.curves_chart(record.rounds, kept, words.get(str(name), "Criterion (validation)"))


def _windows(folder: Path) -> tuple[list[Markup], str]:
    try:
        windows = read_example_windows(folder)
    except RunFolderError as error:
        return [], str(error)
    moments: dict[str, list[ExampleWindow]] = {}
    for window in windows:
        moments.setdefault(window.title, []).append(window)
    return [charts.windows_chart(title, each, f"window-{i}") for i, (title, each) in enumerate(moments.items())], ""


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""


def _rotation_links(run: RunFolder, target: Path) -> list[tuple[str, str]]:
    """Relative links to the rotations' own reports, where they are beside this one."""
    if target.resolve().parent != run.path.resolve():
        return []
    return [(name, f"{name}/{REPORT_HTML}") for name, part in run.rotations.items() if isinstance(part, RunRecord)]

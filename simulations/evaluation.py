"""Every predictor's answer on the same test windows, and what becomes of them: figures, intervals, predictions.csv."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from bridge.files import whole_file, write_whole
from bridge.metrics import confusion_matrix
from client.windowing import WindowTable
from server.errors import RunFolderError
from server.record import BaselineName, Cost, Evaluation, Metrics
from simulations.bootstrap import PatientCounts, count_chance, count_patients, mean_metrics, metrics, resample
from simulations.config import BootstrapConfig
from simulations.rivals import RIVALS, rival_of

PREDICTIONS, PREDICTIONS_CSV = "predictions.npz", "predictions.csv"
ALONE = "site_alone:"
"""Prefix of a bridge that one site trained alone, and of a rival behind the rival's name; the site's name follows."""

CENTRALISED = "centralised"

_BASELINES: tuple[BaselineName, ...] = get_args(BaselineName)
_ALONE = tuple(name for name in _BASELINES if name.endswith(ALONE.removesuffix(":")))

Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """Test windows, one row a window, and each predictor's class for them.

    `predicted` holds `bridge` and the controls by name; the teacher's answers are `pseudo_labels`. `costs` says what
    training some of them cost.
    """

    table: WindowTable
    pseudo_labels: Classes
    predicted: Mapping[str, Classes]
    costs: Mapping[str, Cost] = field(default_factory=dict)

    def take(self, rows: NDArray[np.bool_]) -> Predictions:
        """Some of the windows."""
        predicted = {name: values[rows] for name, values in self.predicted.items()}
        return Predictions(self.table.take(rows), self.pseudo_labels[rows], predicted)

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Several test sets as one: the predictors that all of them have, without their costs."""
        names = [name for name in parts[0].predicted if all(name in part.predicted for part in parts)]
        return cls(
            WindowTable.joined([part.table for part in parts]),
            np.concatenate([part.pseudo_labels for part in parts]),
            {name: np.concatenate([part.predicted[name] for part in parts]) for name in names},
        )

    def save(self, path: Path) -> None:
        """Write them in one atomic rename; raises `RunFolderError`."""
        arrays: dict[str, NDArray[Any]] = {f"table.{name}": values for name, values in vars(self.table).items()}
        arrays |= {f"predicted.{name}": values for name, values in self.predicted.items()}
        try:
            with whole_file(path) as file:
                np.savez(file, allow_pickle=False, pseudo_labels=self.pseudo_labels, **arrays, **self._cost_arrays())
        except OSError as error:
            raise _unwritable(path, error) from error

    def _cost_arrays(self) -> dict[str, NDArray[np.str_]]:
        return {f"cost.{name}": np.array(cost.model_dump_json()) for name, cost in self.costs.items()}

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read what `save` wrote; raises `RunFolderError` where it is something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                stored = dict(file)
            pseudo_labels = stored.pop("pseudo_labels")
            table = {key.removeprefix("table."): stored[key] for key in stored if key.startswith("table.")}
            predicted = {key.removeprefix("predicted."): stored[key] for key in stored if key.startswith("predicted.")}
            costs = {
                key.removeprefix("cost."): Cost.model_validate_json(str(stored[key]))
                for key in stored
                if key.startswith("cost.")
            }
            return cls(WindowTable(**table), pseudo_labels, predicted, costs)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise RunFolderError(
                f"{path}: is damaged", why=str(error), fix="remove it and --resume: it is computed again"
            ) from error

    def write_csv(self, path: Path, classes: Sequence[str]) -> None:
        """One line a test window: patient, recording, start_seconds, label, pseudo_label, bridge, and the rivals by
        name; classes by name."""
        names = [*classes, ""]  # -1, no label, is the last
        shown = ["bridge", *(name for name in self.predicted if rival_of(name))]
        table, text = self.table, io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["patient", "recording", "start_seconds", "label", "pseudo_label", *shown])
        for row in range(len(table)):
            place = table.patients[row], table.recordings[row], float(table.starts[row])
            answers = [table.labels[row], self.pseudo_labels[row], *(self.predicted[name][row] for name in shown)]
            writer.writerow([*place, *(names[each] for each in answers)])
        try:
            write_whole(path, text.getvalue())
        except OSError as error:
            raise _unwritable(path, error) from error


def evaluate(predictions: Predictions, classes: Sequence[str], config: BootstrapConfig, seed: int) -> Evaluation:
    """All figures with their intervals, overall and by group.

    Patients are resampled with replacement, the same draws for every predictor, so differences are paired.
    """
    table, k = predictions.table, len(classes)
    patients = len(np.unique(table.patients))
    found = _figures(predictions, k, config, seed)
    baselines = {name: found.metrics(name) for name in _BASELINES if name in found.counts}
    by_site = {name: found.by_site(name) for name in _ALONE}
    baselines |= {name: mean_metrics(sites, found.draws, config.level) for name, sites in by_site.items() if sites}
    per_site = {
        name: {site: metrics(counts, found.draws, config.level) for site, counts in sites.items()}
        for name, sites in by_site.items()
    }
    names = np.unique(table.groups[table.groups != ""])
    return Evaluation(
        bridge=found.metrics("bridge"),
        teacher=found.metrics("teacher").model_copy(update={"agreement": None}),
        chance=found.metrics("chance"),
        baselines=baselines,
        site_alone_per_site=per_site["site_alone"],
        rivals_per_site={
            rival: per_site[name] for rival in RIVALS for name in _ALONE if rival_of(name) == rival and per_site[name]
        },
        costs=dict(predictions.costs),
        confusion={
            "bridge": confusion_matrix(table.labels, predictions.predicted["bridge"], k).tolist(),
            "teacher": confusion_matrix(table.labels, predictions.pseudo_labels, k).tolist(),
            "agreement": confusion_matrix(predictions.pseudo_labels, predictions.predicted["bridge"], k).tolist(),
        },
        groups={str(name): _group(predictions.take(table.groups == name), k, config, seed) for name in names},
        classes=list(classes),
        patients=patients,
        windows=len(table),
        interval=(
            f"{config.level:.0%} percentile intervals of {config.samples} bootstrap samples of the {patients} test "
            "patients, each patient with all windows"
        ),
    )


@dataclass(frozen=True)
class _Figures:
    counts: Mapping[str, PatientCounts]
    draws: NDArray[np.float64]
    level: float

    def metrics(self, name: str) -> Metrics:
        return metrics(self.counts[name], self.draws, self.level)

    def by_site(self, name: str) -> dict[str, PatientCounts]:
        """The counts of what each site trained alone, by site."""
        prefix = f"{name}:"
        return {each.removeprefix(prefix): counts for each, counts in self.counts.items() if each.startswith(prefix)}


def _figures(predictions: Predictions, classes: int, config: BootstrapConfig, seed: int) -> _Figures:
    table, pseudo = predictions.table, predictions.pseudo_labels
    answers = {"teacher": pseudo, **predictions.predicted}
    counts = {
        name: count_patients(table.patients, table.labels, pseudo, each, classes) for name, each in answers.items()
    }
    counts["chance"] = count_chance(table.patients, table.labels, pseudo, classes)
    draws = resample(len(np.unique(table.patients)), config.samples, seed)
    return _Figures(counts, draws, config.level)


def _group(part: Predictions, classes: int, config: BootstrapConfig, seed: int) -> dict[str, Metrics]:
    found = _figures(part, classes, config, seed)
    return {name: found.metrics(name) for name in found.counts if ALONE not in name}


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path}: can't be written", why=error.strerror or str(error), fix="free space, then --resume"
    )

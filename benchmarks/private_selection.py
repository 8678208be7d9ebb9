"""Private selection against the one without privacy: how often they agree, and what it costs where they don't.

    python -m benchmarks.private_selection

The built-in cohort (configs/demo.yaml) with 8 hospitals of 60 pair patients. Each seed deals the patients to the
hospitals anew; without privacy the highest mean score over hospitals wins (`selection.mode: scores`), with privacy the
highest noised sum over groups (`bridge.privacy.selection`). Epsilon is that of the whole selection, probe and
similarity. Regret is what is lost by the private choice: in the score without privacy that each stage looks at, and in
balanced accuracy on test patients of a bridge trained at the chosen positions on one machine (computed once for each
pair of positions; negative: the private choice happens to be better). `--study` keeps what was prepared, and the
accuracies, for the next time.

The encoders of the cohort know the rhythm at every position, so all choices are nearly as good. `--blur 1 0.75 0.5 0
0.5` adds noise to the new features (so many deviations at each position) and makes one position stand out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.setting import ROOT
from bridge.cka import similarity_scores
from bridge.job_privacy import PrivateSelection
from bridge.metrics import balanced_accuracy, confusion_matrix
from bridge.privacy.accounting import Release
from bridge.privacy.calibration import noise_for
from bridge.privacy.noise import NoiseSource
from bridge.privacy.selection import probe_group_sums, sensitivity, similarity_group_sums
from bridge.probe import probe_scores
from bridge.selection import cap_windows
from client.features import features
from client.networks import inference_chain
from client.requests import Request
from client.site import Site, open_site
from client.statistics import SELECTION_KEY
from server.models import read_models
from simulations.config import load_simulation
from simulations.controls import join_sites, train_alone
from simulations.hospital_files import MODELS
from simulations.prepare import prepare, read_job, site_folders

HOSPITALS, PATIENTS, TEST = 8, 60, 0.3
EPSILONS, DELTA = (0.5, 1.0), 1e-3
FOLDS, WINDOWS = 5, 16
MECHANISMS = ("central", "local")
ROUNDS = 8
"""Of 20 steps each: enough for the bridges to be close to their best."""


@dataclass(frozen=True)
class Pairs:
    """The capped windows of all hospitals: `new` and `old` are `(positions, windows, width)`."""

    new: np.ndarray
    old: np.ndarray
    pseudo_labels: np.ndarray
    patients: np.ndarray
    classes: int

    def take(self, patients: np.ndarray) -> Pairs:
        """The windows of some patients: a hospital."""
        rows = np.isin(self.patients, patients)
        return Pairs(self.new[:, rows], self.old[:, rows], self.pseudo_labels[rows], self.patients[rows], self.classes)


class Deal:
    """One dealing of the patients to hospitals, and every statistic of it, each computed when it is first asked for."""

    def __init__(self, pairs: Pairs, seed: int, plan: PrivateSelection) -> None:
        names = np.random.default_rng(seed).permutation(np.unique(pairs.patients))
        self.hospitals = [pairs.take(part) for part in np.array_split(names, HOSPITALS)]
        self.plan = plan
        self.probe = np.mean([self._probe(h) for h in self.hospitals], axis=0)
        self.probe_sums = np.stack([self._probe_sums(h) for h in self.hospitals])
        self._similarity: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def similarity(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean scores of the old positions `(positions,)`, and the hospitals' sums `(hospitals, positions)`."""
        if m not in self._similarity:
            plan, scores, sums = self.plan, [], []
            for h in self.hospitals:
                scores.append(similarity_scores(h.new[m], list(h.old)))
                sums.append(
                    similarity_group_sums(
                        h.new[m], list(h.old), h.patients, groups=plan.groups, clip=plan.clip, key=SELECTION_KEY
                    )
                )
            self._similarity[m] = np.mean(scores, axis=0), np.stack(sums)
        return self._similarity[m]

    def _probe(self, h: Pairs) -> np.ndarray:
        return probe_scores(list(h.new), h.pseudo_labels, h.patients, h.classes, FOLDS, SELECTION_KEY)

    def _probe_sums(self, h: Pairs) -> np.ndarray:
        return probe_group_sums(
            list(h.new),
            h.pseudo_labels,
            h.patients,
            classes=h.classes,
            folds=FOLDS,
            groups=self.plan.groups,
            clip=self.plan.clip,
            key=SELECTION_KEY,
        )


def noised_choice(
    sums: np.ndarray, multiplier: float, plan: PrivateSelection, mechanism: str, noise: NoiseSource
) -> int:
    """The position with the highest sum over hospitals; `local` has one noise for each of them."""
    releases = len(sums) if mechanism == "local" else 1
    added = noise.normal((releases, sums.shape[1]), multiplier * sensitivity(plan.clip)).sum(axis=0)
    return int((sums.sum(axis=0) + added).argmax())


def outcome(deal: Deal, m: int, l: int, accuracies: np.ndarray) -> list[float]:  # noqa: E741
    """Agreement on m, l and both, and the regret in probe score, similarity and accuracy."""
    best_m = int(deal.probe.argmax())
    best_l = int(deal.similarity(best_m)[0].argmax())
    similarity = deal.similarity(m)[0]
    return [
        m == best_m,
        l == best_l,
        (m, l) == (best_m, best_l),
        float(deal.probe.max() - deal.probe[m]),
        float(similarity.max() - similarity[l]),
        float(accuracies[best_m, best_l] - accuracies[m, l]),
    ]


def study(folder: Path) -> None:
    """Prepare the cohort, its encoders and hospitals, where the folder is not there yet."""
    if folder.exists():
        return
    hospital_patients = round(HOSPITALS * PATIENTS / (1 - TEST))
    changes = {
        "data.builtin.hospital_patients": hospital_patients,
        "split.test": TEST,
        "partition.kind": "equal",
        "partition.hospitals": HOSPITALS,
    }
    prepare(load_simulation(ROOT / "configs/demo.yaml", [f"{key}={value}" for key, value in changes.items()]), folder)


def everything(folder: Path) -> Site:
    """One site of all hospitals' recordings."""
    joined = folder / "controls" / "all-hospitals"
    if not joined.exists():
        join_sites([open_site(path) for path in site_folders(folder)], joined)
    return open_site(joined)


def read_pairs(site: Site) -> Pairs:
    found = features(site, "pair")
    rows = cap_windows(found.table.patients, WINDOWS, SELECTION_KEY)
    return Pairs(
        np.stack([found.new_output(i)[rows] for i in range(site.new_card.positions)]),
        np.stack([found.old_input(i)[rows] for i in range(site.old_card.positions)]),
        found.pseudo_labels[rows],
        found.table.patients[rows],
        len(site.head_card.classes),
    )


def blurred(pairs: Pairs, blur: list[float]) -> Pairs:
    """New features with noise on top, `blur` times their deviation at each position, so that positions differ."""
    rng = np.random.default_rng(0)
    noise = [share * x.std(axis=0) * rng.normal(size=x.shape) for x, share in zip(pairs.new, blur, strict=True)]
    return replace(pairs, new=(pairs.new + np.stack(noise)).astype(np.float32))


def bridge_accuracies(folder: Path, site: Site) -> np.ndarray:
    """Balanced accuracy on the test patients at every pair of positions, `(positions_new, positions_old)`."""
    kept = folder / "accuracies.json"
    if kept.exists():
        return np.array(json.loads(kept.read_text(encoding="utf-8")))
    job, pairs, test = read_job(folder), features(site, "pair"), features(site, "test")
    job = job.model_copy(update={"train": job.train.model_copy(update={"rounds": ROUNDS})})
    models = read_models(folder / MODELS, job)
    found = np.empty((site.new_card.positions, site.old_card.positions))
    for m, l in np.ndindex(*found.shape):  # noqa: E741
        arrays = train_alone(folder, job, (m, l), pairs, site)
        shape = models.bridge_shape(job, (m, l))
        chain = inference_chain(site, Request("evaluate", "benchmark", 1, m, l, arrays=arrays, shape=shape))
        answers = chain.logits_from_features(test.new_output(m)).argmax(dim=-1).numpy()
        found[m, l] = balanced_accuracy(confusion_matrix(test.table.labels, answers, len(site.head_card.classes)))
        print(f"bridge from {m} to {l}: balanced accuracy {found[m, l]:.3f}", flush=True)
    kept.write_text(json.dumps(found.tolist()), encoding="utf-8")
    return found


def report(deals: list[Deal], accuracies: np.ndarray, draws: int, plan: PrivateSelection) -> None:
    print(f"\n{len(deals)} seeds x {draws} draws of noise, {plan.groups} groups a hospital, clip {plan.clip:g}")
    header = ("agree m", "agree l", "both", "regret probe", "regret CKA", "regret accuracy")
    print(f"{'':<24}" + "".join(f"{name:>16}" for name in header))
    rows: dict[str, list[list[float]]] = {}
    for epsilon in EPSILONS:
        multiplier = noise_for(epsilon, DELTA, (), Release("probe", "pair", 1.0, count=2))
        for mechanism in MECHANISMS:
            name = f"{mechanism}, epsilon {epsilon:g}"
            rows[name] = [
                mean_outcome(deal, seed, draws, multiplier, mechanism, accuracies) for seed, deal in enumerate(deals)
            ]
    rows["groups without noise"] = [mean_outcome(deal, 0, 1, 0.0, "central", accuracies) for deal in deals]
    rows["any position"] = [
        list(np.mean([outcome(deal, at[0], at[1], accuracies) for at in np.ndindex(*accuracies.shape)], axis=0))
        for deal in deals
    ]
    for name, found in rows.items():
        mean, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / np.sqrt(len(found))
        print(f"{name:<24}" + "".join(f"{a:>9.3f} +-{b:.3f}" for a, b in zip(mean, error, strict=True)))
    print("+-: standard error over seeds")


def mean_outcome(
    deal: Deal, seed: int, draws: int, multiplier: float, mechanism: str, accuracies: np.ndarray
) -> list[float]:
    """Mean outcome of a deal over draws of the noise."""
    noise = NoiseSource.seeded(seed, mechanism)
    found = []
    for _ in range(draws):
        m = noised_choice(deal.probe_sums, multiplier, deal.plan, mechanism, noise)
        l = noised_choice(deal.similarity(m)[1], multiplier, deal.plan, mechanism, noise)  # noqa: E741
        found.append(outcome(deal, m, l, accuracies))
    return [float(value) for value in np.mean(found, axis=0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--study", type=Path, help="folder of the prepared study, made where it is not there")
    parser.add_argument("--seeds", type=int, default=20, help="dealings of the patients to hospitals (default 20)")
    parser.add_argument("--draws", type=int, default=50, help="draws of the noise for each (default 50)")
    parser.add_argument("--groups", type=int, nargs="+", default=[PrivateSelection().groups], help="groups a hospital")
    parser.add_argument("--clip", type=float, nargs="+", default=[PrivateSelection().clip], help="R")
    parser.add_argument("--blur", type=float, nargs="+", help="noise on each new position, in deviations")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = options.study or Path(name) / "study"
        study(folder)
        site = everything(folder)
        accuracies, pairs = bridge_accuracies(folder, site), read_pairs(site)
    if options.blur:
        pairs = blurred(pairs, options.blur)
        print(f"new features blurred by {options.blur}: the accuracies are those of unblurred ones")
    for groups in options.groups:
        for clip in options.clip:
            plan = PrivateSelection(groups=groups, clip=clip)
            report([Deal(pairs, seed, plan) for seed in range(options.seeds)], accuracies, options.draws, plan)


if __name__ == "__main__":
    main()

"""What a result must be held against, on the same test patients: the controls of a simulated run.

Each uses the run's own positions and first broadcast, the sites' own code (client.features, client.training) and
`rounds * local_steps` steps; `workers` of them run side by side, each in a process of its own:

- `shuffled_pairs`: all data on one machine, each window paired with the wrong old window. Must be at chance;
- `centralised`: all data on one machine, paired as they are. What a federation gives away, it gives away against this;
- `site_alone:<name>`: one hospital with its own pairs. What a hospital would have without the others;
- `linear_student`: logistic regression from the pooled new features at `m` to the pseudo-labels, all data on one
  machine. What the bridge must be worth its while against;
- `kd:...` and `kd_contrast:...`, where `baselines` asks for them: see simulations.rivals. Then each control has a
  process to itself, and what training the bridge and its rivals costs is measured there.
"""

from __future__ import annotations

import csv
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.distil import Rival, RivalSettings
from bridge.files import whole_file, write_whole
from bridge.job import Job
from bridge.job_privacy import PrivacyJob
from bridge.messages import CLOSED_FORM, TRAIN
from bridge.prototype import Arrays
from bridge.shape import BridgeShape
from client.features import FeatureSet, features
from client.requests import Request
from client.session import Deadline
from client.site import Site, open_site
from client.site_file import SplitsSection, write_site_file
from client.training import train_update
from server.initialisation import first_broadcast
from server.models import read_models
from server.record import Cost, read_record
from simulations.config import SimulationConfig
from simulations.cost import Meter
from simulations.evaluation import ALONE, CENTRALISED, Classes, Predictions
from simulations.hospital_files import MODELS
from simulations.prepare import read_job, site_folders
from simulations.progress import Progress
from simulations.rivals import new_windows, rival_of, train_rival

CONTROLS_FOLDER = "controls"
_ALL = "all-hospitals"
_TRIES = 100


@dataclass(frozen=True)
class _Place:
    """Where a control finds everything: a finished run's folder and the chosen positions. With `measured` trainings'
    costs are kept, and each control has a process to itself."""

    folder: Path
    positions: tuple[int, int]
    rivals: RivalSettings
    measured: bool

    @property
    def everything(self) -> Site:
        """One site that holds the recordings of all."""
        return open_site(self.folder / CONTROLS_FOLDER / _ALL)

    def site_of(self, name: str) -> Site:
        """The site on whose pairs a control is trained."""
        _, alone, hospital = name.partition(ALONE)
        if not alone:
            return self.everything
        return next(site for path in site_folders(self.folder) if (site := open_site(path)).name == hospital)


def predict_all(folder: Path, config: SimulationConfig, progress: Progress) -> Predictions:
    """The answers of the run's bridge, its teacher and the configured controls on all test windows.

    `folder` holds a completed run. A control that was computed before a kill is not computed again. Raises what
    reading the sites raises, and `EngineError` never: a control that fails raises its own error.
    """
    from bridge.chain import load_chain

    record = read_record(folder)
    assert record.selection is not None
    positions = record.selection.input_position, record.selection.output_position
    place = _Place(folder, positions, config.rivals, measured=bool(config.baselines))
    _one_thread()
    sites = [open_site(path) for path in site_folders(folder)]
    join_sites(sites, folder / CONTROLS_FOLDER / _ALL)
    test = features(place.everything, "test")
    chain = load_chain(folder / "bridge", place.everything.compute)
    bridge = chain.logits_from_features(test.new_output(chain.m)).argmax(dim=-1).numpy().astype(np.int64)
    found = {"bridge": bridge, **_compute(place, _tasks(config, sites), config.workers, progress)}
    costs = {name: cost for name in found if (cost := _kept_cost(place, name)) is not None}
    return Predictions(test.table, test.pseudo_labels, found, costs)


def join_sites(sites: Sequence[Site], folder: Path) -> None:
    """Make one site folder of several: links to their recordings, their labels, their splits side by side.

    They must have the same reader, signals and models, as simulated ones do. An existing folder is made anew.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "recordings").mkdir(parents=True)
    splits: dict[str, list[str]] = {"pair": [], "validation": [], "test": []}
    for site in sites:
        own = site.resolve(site.file.folder)
        for path in sorted(each for each in own.rglob("*") if each.is_file()):
            place = folder / "recordings" / path.relative_to(own)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())
        for name, patients in splits.items():
            patients += getattr(site.file.splits, name)
    first = sites[0]
    if first.file.labels.source == "csv":
        _join_labels(sites, folder / "labels.csv")
    models = first.file.models
    assert models is not None
    absolute = {name: first.model_folder(name) for name in ("old_encoder", "new_encoder", "task_head")}
    file_ = first.file.model_copy(
        update={
            "site": _ALL,
            "folder": Path("recordings"),
            "splits": SplitsSection(**{name: tuple(patients) for name, patients in splits.items()}),
            "models": type(models)(**absolute),
            "policy": None,
        }
    )
    write_site_file(folder / "site.yaml", file_)


def _join_labels(sites: Sequence[Site], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for number, site in enumerate(sites):
            assert site.file.labels.path is not None
            with site.resolve(site.file.labels.path).open(encoding="utf-8", newline="") as own:
                rows = list(csv.reader(own))
            writer.writerows(rows if number == 0 else rows[1:])


def mispairing(patients: NDArray[np.str_], seed: int) -> NDArray[np.int64]:
    """A permutation of rows `(n,)` that gives no window its own partner, nor one of its own patient.

    Where one patient has more than half of all windows the latter can't be had; then none keeps its own partner.
    """
    n = len(patients)
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    wrong = np.empty(n, dtype=np.int64)
    wrong[order] = np.roll(order, 1)  # one cycle through all windows: none stays
    _, owner = np.unique(patients, return_inverse=True)
    for _ in range(_TRIES):
        bad = np.flatnonzero(owner == owner[wrong])
        if not len(bad):
            break
        for row in bad:
            # A swap is taken where it leaves both rows with another patient's window.
            other = rng.choice(n, size=min(n, 64), replace=False)
            good = other[(owner[wrong[other]] != owner[row]) & (owner[other] != owner[wrong[row]])]
            if len(good):
                wrong[[row, good[0]]] = wrong[[good[0], row]]
    return wrong


@dataclass
class Mispaired(FeatureSet):
    """A feature set whose new features belong to other windows than its old ones."""

    wrong: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, right: FeatureSet, seed: int) -> Mispaired:
        """Mispaired rows of a set."""
        values: dict[str, Any] = {each.name: getattr(right, each.name) for each in fields(FeatureSet)}
        return cls(**values, wrong=mispairing(right.table.patients, seed))

    def new_output(self, m: int) -> NDArray[np.float32]:
        """Pooled outputs of position `m`, each row that of another window."""
        assert self.wrong is not None
        return super().new_output(m)[self.wrong]


def _tasks(config: SimulationConfig, sites: Sequence[Site]) -> list[str]:
    """The controls' names, the longest first."""
    rivals = [f"{rival}:" for rival in dict.fromkeys(config.baselines)]
    names = [f"{rival}{CENTRALISED}" for rival in rivals]
    names += [name for name in ("shuffled_pairs", CENTRALISED) if name in config.controls]
    names += [f"{rival}{ALONE}{site.name}" for rival in rivals for site in sites]
    if "site_alone" in config.controls:
        names += [ALONE + site.name for site in sites]
    return names + [name for name in ("linear_student",) if name in config.controls]


def _compute(place: _Place, tasks: Sequence[str], workers: int, progress: Progress) -> dict[str, Classes]:
    kept = {name: _kept(_file(place.folder / CONTROLS_FOLDER, name)) for name in tasks}
    found = {name: answers for name, answers in kept.items() if answers is not None}
    left = [name for name in tasks if name not in found]
    progress("controls", len(found), len(tasks))
    apart = workers > 1 or place.measured
    for name, answers in _side_by_side(place, left, workers) if apart else _in_turn(place, left):
        found[name] = answers
        progress("controls", len(found), len(tasks))
    return {name: found[name] for name in tasks}


def _in_turn(place: _Place, names: Sequence[str]) -> Iterator[tuple[str, Classes]]:
    for name in names:
        yield name, _control(place, name)


def _side_by_side(place: _Place, names: Sequence[str], workers: int) -> Iterator[tuple[str, Classes]]:
    """Each in a process, as they are done; where they are measured, each in one that has done nothing else."""
    if not names:
        return
    most = min(workers, len(names))
    with ThreadPoolExecutor(most) if place.measured else _processes(most) as pool:
        jobs = {pool.submit(_in_new_process if place.measured else _control, place, name): name for name in names}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _processes(most: int) -> Executor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(most, mp_context=context, initializer=_start_worker)


def _in_new_process(place: _Place, name: str) -> Classes:
    with _processes(1) as pool:
        return pool.submit(_control, place, name).result()


def _control(place: _Place, name: str) -> Classes:
    """One control's answers on all test windows, kept in a file for a run that is resumed."""
    job = read_job(place.folder)
    everything = place.everything
    rival = rival_of(name)
    if name == "linear_student":
        answers = _linear_student(place, everything, job.seed)
    elif rival is not None:
        answers = _rival_answers(place, everything, job, name, rival)
    else:
        answers = _bridge_answers(place, everything, job, name)
    with whole_file(_file(place.folder / CONTROLS_FOLDER, name)) as file:
        np.save(file, answers, allow_pickle=False)
    return answers


def _kept(path: Path) -> Classes | None:
    """Answers that an earlier start computed; None where there are none, or a damaged file."""
    try:
        answers: Classes = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return answers


def _rival_answers(place: _Place, everything: Site, job: Job, name: str, rival: Rival) -> Classes:
    meter = Meter()
    student = train_rival(rival, place.site_of(name), place.rivals, job.seed)
    _keep_cost(place, name, meter.read(student.parameters))
    return student.classes_of(new_windows(everything, "test", features(everything, "test")))


def _bridge_answers(place: _Place, everything: Site, job: Job, name: str) -> Classes:
    shape = read_models(place.folder / MODELS, job).bridge_shape(job, place.positions)
    site = place.site_of(name)
    meter = Meter() if place.measured else None
    pairs = features(site, "pair")
    pairs = Mispaired.of(pairs, job.seed) if name == "shuffled_pairs" else pairs
    arrays = train_alone(place.folder, job, place.positions, pairs, site)
    if meter is not None:
        _keep_cost(place, name, meter.read(shape.parameters))
    return _answers(place, everything, shape, arrays)


def _keep_cost(place: _Place, name: str, cost: Cost) -> None:
    write_whole(_cost_file(place, name), cost.model_dump_json())


def _kept_cost(place: _Place, name: str) -> Cost | None:
    """What a control cost; None where that was not measured."""
    path = _cost_file(place, name)
    return Cost.model_validate_json(path.read_text()) if path.is_file() else None


def train_alone(folder: Path, job: Job, positions: tuple[int, int], pairs: FeatureSet, site: Site) -> Arrays:
    """A bridge trained on one feature set: the run's first broadcast, solved where the job says so, then its rounds at
    one site and no server. Controls are never released, so no mechanism protects them."""
    from client.networks import broadcast_bridge, old_encoder

    job = job.model_copy(update={"privacy": PrivacyJob()})
    models = read_models(folder / MODELS, job)
    shape = models.bridge_shape(job, positions)
    arrays = first_broadcast(job, shape, positions, folder / MODELS)
    if job.train.solves:
        arrays = _solved_alone(job, positions, shape, arrays, pairs)
    encoder = old_encoder(site)
    for number in range(1, job.rounds + 1):
        request = Request(TRAIN, "control", number, positions[0], positions[1], arrays=arrays, shape=shape)
        update = train_update(
            pairs, job, site.name, request, broadcast_bridge(request), encoder, Deadline(np.inf)
        ).update
        arrays = arrays | {key: arrays[key] + change for key, change in update.items()}
    return arrays


def _solved_alone(
    job: Job, positions: tuple[int, int], shape: BridgeShape, arrays: Arrays, pairs: FeatureSet
) -> Arrays:
    from bridge.closed_form import Layout, solve, solved_arrays
    from client.closed_form import closed_form_item
    from client.networks import broadcast_bridge

    request = Request(CLOSED_FORM, "control", None, *positions, arrays=arrays, shape=shape)
    _, moments = closed_form_item(pairs, job, request, broadcast_bridge(request), Deadline(np.inf))
    layout = Layout(shape.rows, shape.columns, job.privacy.gram)
    return solved_arrays(arrays, *solve(moments, layout, rank=shape.rank, ridge=job.train.ridge))


def _answers(place: _Place, everything: Site, shape: BridgeShape, arrays: Arrays) -> Classes:
    from client.networks import inference_chain

    request = Request("evaluate", "control", 1, *place.positions, split="test", arrays=arrays, shape=shape)
    chain = inference_chain(everything, request)
    logits = chain.logits_from_features(features(everything, "test").new_output(chain.m))
    return np.asarray(logits.argmax(dim=-1).numpy(), dtype=np.int64)


def _linear_student(place: _Place, everything: Site, seed: int) -> Classes:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pairs, test, m = features(everything, "pair"), features(everything, "test"), place.positions[0]
    targets = pairs.pseudo_labels
    if len(np.unique(targets)) < 2:
        return np.full(len(test), targets[0], dtype=np.int64)
    student = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed))
    student.fit(pairs.new_output(m), targets)
    return np.asarray(student.predict(test.new_output(m)), dtype=np.int64)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(':', '-')}.npy"


def _cost_file(place: _Place, name: str) -> Path:
    return _file(place.folder / CONTROLS_FOLDER, name).with_suffix(".json")


def _start_worker() -> None:
    """Set up a process of the pool: one thread for torch, and an end when its parent is killed.

    Which files are left out has been told by the parent; a second voice on its terminal would break the bars.
    """
    logging.getLogger("fedbridge.site").setLevel(logging.ERROR)
    threading.Thread(target=_end_with_parent, name="orphaned", daemon=True).start()
    _one_thread()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _one_thread() -> None:
    """One torch thread in this process, as at a site."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)

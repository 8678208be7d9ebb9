"""Compact encoders and a task head from PUBLIC patients, made once and cached by content.

A models folder holds `old_encoder/`, `new_encoder/`, `task_head/` (each a card and safetensors) and
`public_vectors.safetensors`, what public patients lend to a bridge, all float32. For each old position `l`: `in.<l>
(k, width)`, centroids of the tokens at its input, and `tokens.<l> (n, tokens, width)`, such tokens of whole windows.
For each new position `m`: `mean.<m> (width,)` and `covariance.<m> (width, width)` of its pooled outputs.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError

from bridge.config import Settings
from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.encoders.pretrain import PretrainSettings, Progress, SupervisedSettings, fit_teacher, pretrain
from bridge.errors import WeightsError
from bridge.hashing import sha256_array, sha256_json
from bridge.head import save_head
from bridge.windows import Preprocessing, WindowSpec
from simulations.errors import UnwritableError
from simulations.source import SignalSource, cache_root

Vectors = dict[str, NDArray[Any]]
"""Public arrays by their key in the file."""

OLD, NEW, HEAD, PUBLIC_VECTORS = "old_encoder", "new_encoder", "task_head", "public_vectors.safetensors"

_RECIPE = 2
"""Part of the cache key: raised when the training code changes what it makes from the same settings."""

_BATCH = 64

_TOKEN_WINDOWS = 64
"""Public windows whose tokens are kept: of as many patients, where there are so many."""


class NewEncoderConfig(Settings):
    """The new modality's encoder: never sees a label."""

    rate_hz: float | None = Field(default=None, gt=0)
    """Sampling rate that it reads; null: the recordings' own."""
    preprocessing: Preprocessing = Preprocessing()
    """Steps from a recording to its windows, the same in training and at every site."""
    architecture: CompactArchitecture = CompactArchitecture()
    pretrain: PretrainSettings = PretrainSettings()

    def spec(self, signal: SignalSource, seconds: float) -> WindowSpec:
        """The windows that the encoder will read, of a source's signal."""
        rate = self.rate_hz or signal.rate_hz
        return WindowSpec(
            modality=signal.modality, channels=signal.channels, rate_hz=rate, samples=round(seconds * rate)
        )


class OldEncoderConfig(NewEncoderConfig):
    """The old modality's encoder: pretrained without labels, then trained together with the task head."""

    pretrain: PretrainSettings = PretrainSettings(steps=200)
    supervised: SupervisedSettings = SupervisedSettings()


class EncodersConfig(Settings):
    """Both encoders and the head."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    threads: int = Field(default=1, ge=1)
    """Torch threads of each of the two training processes; another number gives other weights in the last digits."""
    public_vectors: int = Field(default=128, ge=1)
    """Centroids kept for each old position."""
    old: OldEncoderConfig = OldEncoderConfig()
    new: NewEncoderConfig = NewEncoderConfig()


@dataclass(frozen=True)
class PublicWindows:
    """Windows of public patients, preprocessed as the encoder reads them.

    `x` float32 `(n, channels, samples)`, `patients (n,)`; `labels (n,)` int64, -1 where there is none (the new
    modality's are never read).
    """

    x: NDArray[np.float32]
    patients: NDArray[np.str_]
    labels: NDArray[np.int64]
    spec: WindowSpec
    preprocessing: Preprocessing

    def key(self) -> list[Any]:
        """What the content is, for the cache."""
        names = np.asarray(self.patients, dtype=np.str_)
        arrays = [sha256_array(self.x), sha256_json(names.tolist()), sha256_array(self.labels)]
        return [*arrays, self.spec.model_dump(mode="json"), self.preprocessing.model_dump(mode="json")]


def train_models(
    old: PublicWindows,
    new: PublicWindows,
    classes: tuple[str, ...],
    config: EncodersConfig,
    out: Path,
    *,
    data: str = "",
    progress: Progress | None = None,
) -> Path:
    """Train both encoders and the head, or take them from the cache, and put the models folder at `out`; return `out`.

    The two encoders are trained side by side in two processes. `data` names the public recordings in the cards.
    Raises `SelectionError` where the public windows do not suffice, `UnwritableError` where the disk
    is full or read-only.
    """
    key = sha256_json([_RECIPE, config.model_dump(mode="json"), list(classes), data, old.key(), new.key()])[:32]
    cached = cache_root() / "models" / key
    if not is_complete(cached):
        _into_place(lambda folder: _train(old, new, classes, config, data, folder, progress), cached)
    if out != cached:
        _into_place(lambda folder: _copy(cached, folder), out)
    return out


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a models folder whose cards, weights and digests fit each other."""
    try:
        encoder = read_card(folder / OLD, EncoderCard)
        read_card(folder / NEW, EncoderCard)
        head = read_card(folder / HEAD, HeadCard)
    except WeightsError:
        return False
    return head.old_encoder == encoder.digest and (folder / PUBLIC_VECTORS).is_file()


def _into_place(make: Callable[[Path], None], target: Path) -> None:
    """Make a folder beside `target`, then rename it: a kill leaves nothing half-made under the final name."""
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        make(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise UnwritableError(
            f"{target}: the models can't be written",
            why=str(error),
            fix="free space, or set FEDBRIDGE_CACHE to a writable folder",
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def _train(
    old: PublicWindows,
    new: PublicWindows,
    classes: tuple[str, ...],
    config: EncodersConfig,
    data: str,
    folder: Path,
    progress: Progress | None,
) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with ProcessPoolExecutor(2, mp_context=context, initializer=_start, initargs=(queue, config.threads)) as pool:
        started = (
            pool.submit(_train_old, old, classes, config, data, folder),
            pool.submit(_train_new, new, config, data, folder),
        )
        jobs = set(started)
        while jobs:
            done, jobs = wait(jobs, timeout=0.2)
            _tell(queue, progress)
            for job in done:
                job.result()
    _save_public(folder, [job.result() for job in started])


def _tell(queue: Any, progress: Progress | None) -> None:
    while not queue.empty():
        message = queue.get()
        if progress is not None:
            progress(*message)


_queue: Any = None


def _start(queue: Any, threads: int) -> None:
    """Set up a training process: its share of the cores, and where it tells its progress."""
    import torch

    global _queue
    _queue = queue
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def _progress_of(role: str) -> Progress:
    return lambda what, done, total: _queue.put((f"{role} encoder: {what}", done, total))


def _fresh(spec: WindowSpec, config: NewEncoderConfig, seed: int) -> CompactEncoder:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CompactEncoder(spec, config.architecture)


def _train_new(new: PublicWindows, config: EncodersConfig, data: str, folder: Path) -> Vectors:
    seed = 4 * config.seed + 2
    encoder = _fresh(new.spec, config.new, seed)
    history = pretrain(encoder, new.x, config.new.pretrain, seed=seed, progress=_progress_of("new"))
    training = _provenance(new, data, config.seed) | {
        "objective": "masked reconstruction and own log power spectrum; no labels",
        "pretrain": config.new.pretrain.model_dump(mode="json"),
        "pretrain_loss": _last(history.loss),
    }
    save_encoder(folder / NEW, encoder.state_dict(), encoder.card(new.preprocessing, training))
    return _pooled_moments(folder, new)


def _train_old(
    old: PublicWindows, classes: tuple[str, ...], config: EncodersConfig, data: str, folder: Path
) -> Vectors:
    seed = 4 * config.seed
    encoder = _fresh(old.spec, config.old, seed)
    progress = _progress_of("old")
    before = pretrain(encoder, old.x, config.old.pretrain, seed=seed, progress=progress)
    rows = np.flatnonzero(old.labels >= 0)
    head, history = fit_teacher(
        encoder,
        old.x[rows],
        old.labels[rows],
        old.patients[rows],
        len(classes),
        config.old.supervised,
        seed=seed + 1,
        progress=progress,
    )
    training = _provenance(old, data, config.seed) | {
        "objective": "masked reconstruction and own log power spectrum, then public labels",
        "pretrain": config.old.pretrain.model_dump(mode="json"),
        "supervised": config.old.supervised.model_dump(mode="json"),
        "pretrain_loss": _last(before.loss),
        "held_back_balanced_accuracy": round(dict(history.validation)[history.kept_step or 0], 4),
        "kept_step": history.kept_step,
    }
    card = save_encoder(folder / OLD, encoder.state_dict(), encoder.card(old.preprocessing, training))
    save_head(folder / HEAD, head, classes=classes, old_encoder=card.digest, training=training)
    return _centroids(folder, old.x[rows], config) | _tokens(folder, old)


def _provenance(windows: PublicWindows, data: str, seed: int) -> dict[str, Any]:
    patients = len(set(windows.patients.tolist()))
    return {"data": data, "public_patients": patients, "windows": len(windows.x), "seed": seed}


def _last(losses: list[float]) -> float | None:
    return round(float(np.mean(losses[-20:])), 5) if losses else None


def _save_public(folder: Path, parts: Sequence[Vectors]) -> None:
    from safetensors.numpy import save_file

    named = {name: np.ascontiguousarray(values, np.float32) for part in parts for name, values in part.items()}
    save_file(named, folder / PUBLIC_VECTORS)


def _pooled_moments(folder: Path, new: PublicWindows) -> Vectors:
    """Mean and covariance of the pooled outputs of each new position, each patient weighing the same."""
    import torch

    from bridge.public_constants import pooled_moments

    encoder = load_encoder(folder / NEW)
    with torch.no_grad():
        parts = (torch.from_numpy(new.x[first : first + _BATCH]) for first in range(0, len(new.x), _BATCH))
        taps = [encoder.taps(part).outputs for part in parts]
    found: Vectors = {}
    for position, outputs in enumerate(zip(*taps, strict=True)):
        mean, covariance = pooled_moments(torch.cat(outputs).numpy(), new.patients)
        found |= {f"mean.{position}": mean, f"covariance.{position}": covariance}
    return found


def _tokens(folder: Path, old: PublicWindows) -> Vectors:
    """Tokens of some windows at each old position's input."""
    import torch

    encoder = load_encoder(folder / OLD)
    rows = spread_rows(old.patients, _TOKEN_WINDOWS)
    with torch.no_grad():
        inputs = encoder.taps(torch.from_numpy(old.x[rows]), lambda h: h).inputs
    return {f"tokens.{position}": tokens.numpy() for position, tokens in enumerate(inputs)}


def spread_rows(patients: NDArray[Any], count: int) -> NDArray[np.int64]:
    """At most `count` rows, ascending, of as many patients as can be: one of each, then a second of each, and so on.

    A patient's rows are taken from all over the recording.
    """
    turns: list[tuple[int, str, int]] = []
    for patient in np.unique(patients):
        own = np.flatnonzero(patients == patient)
        order = np.random.default_rng(len(own)).permutation(own)
        turns += [(turn, str(patient), int(row)) for turn, row in enumerate(order)]
    return np.sort(np.asarray([row for _, _, row in sorted(turns)[:count]], np.int64))


def _centroids(folder: Path, x: NDArray[np.float32], config: EncodersConfig) -> Vectors:
    """K-means centroids of public tokens at each old position's input, the largest cluster first."""
    import torch
    from sklearn.cluster import MiniBatchKMeans

    encoder = load_encoder(folder / OLD)
    rng = np.random.default_rng(config.seed)
    chosen = rng.choice(len(x), min(len(x), 256), replace=False)
    with torch.no_grad():
        inputs = encoder.taps(torch.from_numpy(x[np.sort(chosen)]), lambda h: h).inputs
    vectors: Vectors = {}
    for position, tokens in enumerate(inputs):
        flat = tokens.flatten(0, 1).numpy()
        kmeans = MiniBatchKMeans(min(config.public_vectors, len(flat)), random_state=config.seed, n_init=1, max_iter=30)
        sizes = np.bincount(kmeans.fit_predict(flat), minlength=kmeans.n_clusters)
        order = np.argsort(-sizes, kind="stable")
        vectors[f"in.{position}"] = kmeans.cluster_centers_[order]
    return vectors

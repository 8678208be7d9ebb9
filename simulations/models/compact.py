"""Compact encoders and a task head, trained on public patients and cached by content."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from bridge.encoders.compact import CompactEncoder
from bridge.encoders.loading import save_encoder
from bridge.encoders.pretrain import Progress, fit_teacher, pretrain
from bridge.head import save_head
from bridge.windows import WindowSpec
from simulations.models.config import READY, EncodersConfig, NewEncoderConfig
from simulations.models.places import HEAD, NEW, OLD, are_old, copy, into_place, is_complete, is_new, made_once
from simulations.models.public import Vectors, centroid_vectors, pooled_vectors, save_public, token_vectors
from simulations.models.windows import PublicWindows

_RECIPE = 2
"""Part of the cache key: raised when the training code changes what it makes from the same settings."""


Work = tuple[Callable[..., Vectors], tuple[Any, ...]]
"""A function and its arguments but the last, the folder; it returns what public patients lend."""


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
    key = [_RECIPE, _own_keys(config), list(classes), data, old.key(), new.key()]
    jobs: list[Work] = [(_train_old, (old, classes, config, data)), (_train_new, (new, config, data))]
    cached = made_once(key, lambda folder: _train(jobs, config.threads, folder, progress), is_complete)
    if out != cached:
        into_place(lambda folder: copy(cached, folder), out)
    return out


def train_old(
    old: PublicWindows, classes: tuple[str, ...], config: EncodersConfig, *, data: str, progress: Progress | None
) -> Path:
    """As `train_models`, the old encoder and the head alone; returns their folder in the cache."""
    key = [_RECIPE, "old", _own_keys(config)["old"], config.seed, config.public_vectors, list(classes), data, old.key()]
    jobs: list[Work] = [(_train_old, (old, classes, config, data))]
    return made_once(key, lambda folder: _train(jobs, config.threads, folder, progress), are_old)


def train_new(new: PublicWindows, config: EncodersConfig, *, data: str, progress: Progress | None) -> Path:
    """As `train_models`, the new encoder alone; returns its folder in the cache."""
    key = [_RECIPE, "new", _own_keys(config)["new"], config.seed, data, new.key()]
    jobs: list[Work] = [(_train_new, (new, config, data))]
    return made_once(key, lambda folder: _train(jobs, config.threads, folder, progress), is_new)


def _own_keys(config: EncodersConfig) -> dict[str, Any]:
    """The settings that compact encoders follow from."""
    return config.model_dump(mode="json", exclude={"old": READY, "new": READY})


def _train(jobs: Sequence[Work], threads: int, folder: Path, progress: Progress | None) -> None:
    """Train into `folder`, each job in a process of its own, and write what public patients lend."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with ProcessPoolExecutor(len(jobs), mp_context=context, initializer=_start, initargs=(queue, threads)) as pool:
        started = [pool.submit(work, *given, folder) for work, given in jobs]
        waiting = set(started)
        while waiting:
            done, waiting = wait(waiting, timeout=0.2)
            _tell(queue, progress)
            for each in done:
                each.result()
    save_public(folder, {name: values for each in started for name, values in each.result().items()})


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
    training = provenance(new, data, config.seed) | {
        "objective": "masked reconstruction and own log power spectrum; no labels",
        "pretrain": config.new.pretrain.model_dump(mode="json"),
        "pretrain_loss": _last(history.loss),
    }
    save_encoder(folder / NEW, encoder.state_dict(), encoder.card(new.preprocessing, training))
    return pooled_vectors(folder / NEW, new)


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
    training = provenance(old, data, config.seed) | {
        "objective": "masked reconstruction and own log power spectrum, then public labels",
        "pretrain": config.old.pretrain.model_dump(mode="json"),
        "supervised": config.old.supervised.model_dump(mode="json"),
        "pretrain_loss": _last(before.loss),
        "held_back_balanced_accuracy": round(dict(history.validation)[history.kept_step or 0], 4),
        "kept_step": history.kept_step,
    }
    card = save_encoder(folder / OLD, encoder.state_dict(), encoder.card(old.preprocessing, training))
    save_head(folder / HEAD, head, classes=classes, old_encoder=card.digest, training=training)
    centroids = centroid_vectors(folder / OLD, old.x[rows], count=config.public_vectors, seed=config.seed)
    return centroids | token_vectors(folder / OLD, old)


def provenance(windows: PublicWindows, data: str, seed: int) -> dict[str, Any]:
    """What the cards of all models made from public windows say."""
    patients = len(set(windows.patients.tolist()))
    return {"data": data, "public_patients": patients, "windows": len(windows.x), "seed": seed}


def _last(losses: list[float]) -> float | None:
    return round(float(np.mean(losses[-20:])), 5) if losses else None

"""Fitting a task head to an encoder on labelled windows: the head alone, or the whole encoder with it.

As published: one linear layer on the mean of the final tokens, cross-entropy with class weights, Adam without a
schedule. The head alone is trained on features that are computed once. Batch statistics and dropout stay as in
inference in either case, so that a window's result never depends on the windows beside it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from bridge.chain import BATCH
from bridge.compute import Compute, compute_on
from bridge.config import Settings
from bridge.encoders.placed import PlacedEncoder
from bridge.encoders.pretrain import History, Progress
from bridge.encoders.protocol import Encoder, mean_over_tokens
from bridge.encoders.trainable import TrainableEncoder
from bridge.errors import ConfigError, SelectionError, WindowError
from bridge.head import TaskHead
from bridge.head_files import save_fitted
from bridge.held_back import FEWEST, Judgement, counts_by_patient, held_back, judge
from bridge.metrics import balanced_accuracy

__all__ = ["FittedHead", "HeadSettings", "fit_head", "save_fitted"]


class HeadSettings(Settings):
    """How a task head is fitted."""

    train: Literal["head", "whole"] = "head"
    """`head`: the encoder stays as it is. `whole`: it is trained, too, which makes another encoder of it."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1000)
    """Of Adam, without a schedule."""
    batch: int = Field(default=64, ge=1)
    """Windows in a mini-batch."""
    epochs: int = Field(default=50, ge=1)
    """How often every training window is seen."""
    class_weights: Literal["balanced", "none"] | tuple[PositiveFloat, ...] = "balanced"
    """Weight of a window in the loss. `balanced`: one over the number of training windows of its class. A list: one
    weight a class."""
    validation: float = Field(default=0.25, gt=0, lt=1)
    """Share of the patients that are held back, by keyed hash; they judge the head."""
    keep: Literal["best", "last"] = "best"
    """Which epoch is kept: the best by balanced accuracy of the held-back patients, or the last."""


@dataclass(frozen=True)
class FittedHead:
    """A frozen head, the encoder that it belongs to, and how good they are on patients who were held back."""

    head: TaskHead
    encoder: Encoder
    """The one that was given, or its trained copy where the whole was trained; a copy's digest is still that of the
    original, until it is saved and loaded."""
    settings: HeadSettings
    history: History
    """Losses and held-back balanced accuracies by epoch, from 1; the step kept is an epoch."""
    judgement: Judgement
    patients: int
    """All patients, those held back among them."""
    held_back: int
    windows: int
    windows_by_class: tuple[int, ...]

    @property
    def balanced_accuracy(self) -> float:
        """Over the windows of the held-back patients; each is judged by an epoch that others chose."""
        return self.judgement.balanced_accuracy

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of it, of whole patients resampled; None below five of them."""
        return self.judgement.interval

    @property
    def chance(self) -> float:
        """What a guess that does not look at the window has."""
        return self.judgement.chance

    @property
    def better_than_chance(self) -> bool | None:
        """Whether the whole interval lies above chance; None where the held-back patients are too few to tell."""
        if self.interval is None or self.chance == 1:
            return None
        return self.interval[0] > self.chance

    def sentence(self) -> str:
        """The result in plain words."""
        found = f"balanced accuracy {self.balanced_accuracy:.3f}"
        if self.interval is not None:
            found += f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"
        found += f" on {self.held_back} held-back patient{'s' * (self.held_back != 1)} (chance {self.chance:.3f}): "
        if self.better_than_chance is None and self.chance == 1:
            return found + "all their windows are of one class, which tells nothing about chance"
        if self.better_than_chance is None:
            return found + f"too few patients to tell whether that is better than chance ({FEWEST} are needed)"
        return found + ("better than chance" if self.better_than_chance else "NOT better than chance")


def fit_head(
    encoder: Encoder,
    windows: NDArray[np.float32],
    labels: NDArray[np.int64],
    patients: NDArray[np.str_],
    classes: int,
    settings: HeadSettings,
    *,
    seed: int,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> FittedHead:
    """Fit a task head on labelled windows; `encoder` stays frozen and as it is, whatever is trained.

    `windows (n, channels, samples)`, `labels (n,)` in `0 .. classes - 1`, `patients (n,)`. `compute` says where the
    network runs; the processor where it is left out. The same seed gives the same head.

    Raises `WindowError` where the windows do not fit or are not finite, `ConfigError` where the settings do not fit
    the classes or the encoder can't be trained, and `SelectionError` where labels do not suffice: fewer than two
    patients, no window, a class that no training patient has, or a loss that leaves all bounds.
    """
    x, y = _checked(encoder, windows, labels, patients, classes)
    aside = held_back(patients, settings.validation, seed)
    train, valid = np.flatnonzero(~aside), np.flatnonzero(aside)
    weights = _class_weights(y[train], classes, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = TaskHead(encoder.layout(encoder.positions - 1, "out")[1], classes)
    kind = _HeadAlone if settings.train == "head" else _Whole
    network = kind(encoder, head, x, compute or compute_on(), progress)
    history, counts = _train(network, y, train, _Judges(patients[valid], valid), weights, settings, seed, progress)
    return FittedHead(
        head=head.eval().requires_grad_(False),
        encoder=network.finished(),
        settings=settings,
        history=history,
        judgement=judge(counts, choosing=settings.keep == "best", seed=seed),
        patients=len(set(patients.tolist())),
        held_back=counts.shape[1],
        windows=len(x),
        windows_by_class=tuple(np.bincount(y.numpy(), minlength=classes).tolist()),
    )


@dataclass(frozen=True)
class _Judges:
    """The held-back windows: whose they are, and their rows."""

    patients: NDArray[np.str_]
    rows: NDArray[np.int64]


def _train(
    network: _HeadAlone | _Whole,
    y: Tensor,
    train: NDArray[np.int64],
    judges: _Judges,
    weights: Tensor,
    settings: HeadSettings,
    seed: int,
    progress: Progress | None,
) -> tuple[History, NDArray[np.int64]]:
    """Train all epochs and put the kept one into the network; returns what happened and the counts by epoch."""
    generator = torch.Generator().manual_seed(seed + 1)
    optimiser = torch.optim.Adam(network.parameters(), settings.learning_rate)
    history, counts, best, kept = History(), [], -math.inf, copy.deepcopy(network.state())
    labels = y.numpy()[judges.rows]
    for epoch in range(1, settings.epochs + 1):
        order = torch.from_numpy(train)[torch.randperm(len(train), generator=generator)]
        history.loss.append(_epoch(network, order, y, weights, settings.batch, optimiser))
        logits = network.logits(torch.from_numpy(judges.rows))
        _require_finite(logits)
        counts.append(counts_by_patient(judges.patients, labels, logits.argmax(1).numpy(), len(weights), seed))
        score = float(balanced_accuracy(counts[-1].sum(axis=0)))
        history.validation.append((epoch, score))
        if settings.keep == "last" or score > best:
            best, history.kept_step, kept = score, epoch, copy.deepcopy(network.state())
        if progress is not None:
            progress("task head", epoch, settings.epochs)
    optimiser.zero_grad(set_to_none=True)
    network.restore(kept)
    return history, np.stack(counts)


def _epoch(
    network: _HeadAlone | _Whole,
    order: Tensor,
    y: Tensor,
    weights: Tensor,
    batch: int,
    optimiser: torch.optim.Optimizer,
) -> float:
    """One pass over the training windows in this order; returns the mean loss of the mini-batches."""
    losses = []
    for rows in torch.split(order, batch):
        optimiser.zero_grad(set_to_none=True)
        whole = weights[y[rows]].sum()
        loss = 0.0
        # A mini-batch in parts has the gradient that it has in one: sums of losses over the weight of the whole.
        for part in torch.split(rows, network.at_once(len(rows))):
            share = F.cross_entropy(network.training_logits(part), y[part], weights, reduction="sum") / whole
            share.backward()  # type: ignore[no-untyped-call]
            _require_finite(share.detach())
            loss += float(share.detach())
        optimiser.step()
        losses.append(loss)
    return float(np.mean(losses))


def _require_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise SelectionError(
            "the training left all bounds",
            why="a loss or a logit is not finite: the steps are too large, or the values of the windows",
            fix="set a smaller learning_rate, and check the unit of the recordings",
        )


class _HeadAlone:
    """A head on features that are computed once."""

    def __init__(
        self, encoder: Encoder, head: TaskHead, x: Tensor, compute: Compute, progress: Progress | None
    ) -> None:
        self.encoder, self.head = encoder, head
        placed, parts, done = PlacedEncoder(encoder, compute), [], 0
        with torch.no_grad():
            for part in torch.split(x, BATCH):
                parts.append(mean_over_tokens(placed.prefix(part, encoder.positions - 1)))
                done += len(part)
                if progress is not None:
                    progress("features", done, len(x))
        self.features = torch.cat(parts)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def at_once(self, asked: int) -> int:
        return asked

    def training_logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features[rows])
        return logits

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        return self.training_logits(rows)

    def state(self) -> dict[str, Tensor]:
        return self.head.state_dict()

    def restore(self, state: dict[str, Tensor]) -> None:
        self.head.load_state_dict(state)

    def finished(self) -> Encoder:
        return self.encoder


class _Whole:
    """A head and a copy of the encoder that are trained together, in float32."""

    def __init__(
        self, encoder: Encoder, head: TaskHead, x: Tensor, compute: Compute, progress: Progress | None
    ) -> None:
        self.encoder = TrainableEncoder(encoder, x, compute, what="this encoder", fix="set train: head")
        self.x, self.head = x, head
        self.modules = nn.ModuleList([self.encoder.network, head])
        self.placed = PlacedEncoder(self.encoder.network, self.encoder.compute)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.modules.parameters())

    def at_once(self, asked: int) -> int:
        return self.encoder.at_once(asked)

    def training_logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder.pooled(self.x[rows]).cpu())
        return logits

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        parts = torch.split(rows, BATCH)
        return torch.cat(
            [self.head(mean_over_tokens(self.placed.prefix(self.x[each], self.encoder.last))) for each in parts]
        )

    def state(self) -> dict[str, Tensor]:
        return self.modules.state_dict()

    def restore(self, state: dict[str, Tensor]) -> None:
        self.modules.load_state_dict(state)

    def finished(self) -> Encoder:
        self.encoder.network.requires_grad_(False)
        return self.encoder.network.to(torch.device("cpu"))


def _checked(
    encoder: Encoder,
    windows: NDArray[np.float32],
    labels: NDArray[np.int64],
    patients: NDArray[np.str_],
    classes: int,
) -> tuple[Tensor, Tensor]:
    encoder.window.check(windows.shape)
    y = np.asarray(labels, dtype=np.int64)
    if not len(y) == len(patients) == len(windows):
        raise WindowError(
            "windows, labels and patients differ in number",
            why=f"there are {len(windows)}, {len(y)} and {len(patients)}",
            fix="give one label and one patient a window",
        )
    if len(y) == 0:
        raise SelectionError("no labelled window to fit a task head on", fix="give patients whose windows have labels")
    if classes < 2 or y.min() < 0 or y.max() >= classes:
        raise SelectionError(
            "the labels are not those of the classes",
            why=f"they lie from {y.min()} to {y.max()}, there are {classes} classes, from 0 on",
            fix="leave out windows without a label, and name at least two classes",
        )
    if not np.isfinite(windows).all():
        raise WindowError(
            "some windows hold values that are not finite",
            why=f"{int((~np.isfinite(windows)).any(axis=(1, 2)).sum())} of {len(windows)} do",
            fix="leave them out",
        )
    return torch.from_numpy(np.ascontiguousarray(windows, np.float32)), torch.from_numpy(y)


def _class_weights(y: Tensor, classes: int, settings: HeadSettings) -> Tensor:
    """One weight a class, from the training windows' labels."""
    counts = torch.bincount(y, minlength=classes)
    if not bool((counts > 0).all()):
        raise SelectionError(
            "the training patients lack a class",
            why=f"{int((counts == 0).sum())} of {classes} classes have no window among them",
            fix="give more patients, or a smaller validation share",
        )
    if settings.class_weights == "balanced":
        return 1 / counts.float()
    if settings.class_weights == "none":
        return torch.ones(classes)
    if len(settings.class_weights) != classes:
        raise ConfigError(
            f"class_weights has {len(settings.class_weights)} weights",
            why=f"there are {classes} classes",
            fix="give one weight a class, or 'balanced'",
        )
    return torch.tensor(settings.class_weights)

"""Distillation into a whole encoder: what the bridge's authors hold their bridge against.

The student is a copy of the new encoder with a linear layer on the mean of its final tokens, trained as a whole on what
the teacher, the old encoder with its task head, says of the same moments. KD: to answer as softly as the teacher.
KD-Contrast: beside that, each window's features must be told from those of other windows by the teacher's features of
the same moment. Dropout and batch statistics stay as in inference, so that a window's result does not depend on the
windows beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridge.chain import BATCH
from bridge.compute import Compute, compute_on
from bridge.config import Settings
from bridge.encoders.placed import PlacedEncoder
from bridge.encoders.protocol import Encoder, mean_over_tokens
from bridge.encoders.trainable import TrainableEncoder
from bridge.errors import SelectionError, WindowError
from bridge.head import TaskHead

Rival = Literal["kd", "kd_contrast"]


class RivalSettings(Settings):
    """How the rivals are trained, both in the same way."""

    steps: int = Field(default=100, ge=1)
    """Mini-batches, however many windows there are: shuffled passes over them."""
    batch: int = Field(default=64, ge=2)
    """Windows in a mini-batch; also those that a window's features must be told from."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Of Adam, without a schedule."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits of teacher and student are divided by it before the softmax."""
    contrast_weight: float = Field(default=0.1, gt=0)
    """Of the contrastive loss, beside the distillation loss with the weight 1 (kd_contrast)."""
    contrast_temperature: float = Field(default=0.1, gt=0)
    """Cosines are divided by it (kd_contrast)."""
    projection: int = Field(default=64, ge=1)
    """Width to which both encoders' features are projected before they are compared (kd_contrast)."""


@dataclass(frozen=True)
class Lessons:
    """What a student learns from, one row a window.

    `windows (n, channels, samples)` of the new modality; of the teacher at the same moments `logits (n, classes)` and
    `pooled (n, width)`, the mean of its final tokens, which KD-Contrast alone needs.
    """

    windows: NDArray[np.float32]
    logits: NDArray[np.float32]
    pooled: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Student:
    """A trained encoder with its head; both frozen."""

    encoder: Encoder
    """Its digest is still that of the encoder it was copied from, which computes something else."""
    head: TaskHead
    parameters: int
    """How many numbers were trained: encoder, head and, for KD-Contrast, both projections."""
    losses: tuple[float, ...]
    """Of each step."""
    compute: Compute

    def classes_of(self, windows: NDArray[np.float32]) -> NDArray[np.int64]:
        """Its class of each window, `(n,)`."""
        placed, last = PlacedEncoder(self.encoder, self.compute), self.encoder.positions - 1
        parts = torch.split(torch.from_numpy(windows), BATCH)
        with torch.inference_mode():
            found = [self.head(mean_over_tokens(placed.prefix(part, last))).argmax(dim=1) for part in parts]
        return np.asarray(torch.cat(found).numpy(), dtype=np.int64)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student's soft answer from the teacher's, mean over windows, times the temperature's square
    (Hinton et al. 2015), so that its gradients keep their size. Both are logits `(n, classes)`."""
    wanted = F.log_softmax(teacher / temperature, dim=1)
    given = F.log_softmax(student / temperature, dim=1)
    return temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)


def contrastive_loss(new: Tensor, old: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE between features `(n, width)` of the same moments: the mean of picking each window's old
    features among all of the batch by its new ones, and the other way round."""
    cosines = F.normalize(new, dim=1) @ F.normalize(old, dim=1).T / temperature
    own = torch.arange(len(new), device=new.device)
    return (F.cross_entropy(cosines, own) + F.cross_entropy(cosines.T, own)) / 2


def distil(
    rival: Rival,
    encoder: Encoder,
    lessons: Lessons,
    settings: RivalSettings,
    *,
    seed: int,
    compute: Compute | None = None,
) -> Student:
    """Train a student; `encoder` stays frozen and as it is. The same seed gives the same student.

    `compute` says where the network runs, always in float32; the processor where it is left out. A batch that memory
    does not hold goes through in parts, with the same result. Raises `WindowError` where the lessons do not fit or are
    not finite, `ConfigError` where the encoder can't be trained, `SelectionError` where the loss leaves all bounds.
    """
    _check(rival, encoder, lessons)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(rival, encoder, lessons, settings, compute or compute_on())
    losses = _train(network, settings, torch.Generator().manual_seed(seed + 1))
    network.modules.requires_grad_(False)
    return Student(
        encoder=network.encoder.network.to(torch.device("cpu")),
        head=network.head.to("cpu").eval(),
        parameters=sum(each.numel() for each in network.modules.parameters()),
        losses=losses,
        compute=network.encoder.compute,
    )


def _train(network: _Network, settings: RivalSettings, generator: torch.Generator) -> tuple[float, ...]:
    """Take all steps; returns their losses."""
    optimiser = torch.optim.Adam(network.modules.parameters(), settings.learning_rate)
    losses = []
    for rows in itertools.islice(_batches(len(network.windows), settings.batch, generator), settings.steps):
        optimiser.zero_grad(set_to_none=True)
        loss = network.loss(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.modules.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise SelectionError(
                "the loss left all bounds", why="the steps are too large", fix="set a smaller rivals.learning_rate"
            )
    return tuple(losses)


def _batches(windows: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of one mini-batch after another, without end, in shuffled passes; what a pass leaves over is dropped."""
    size = min(batch, windows)
    while True:
        order = torch.randperm(windows, generator=generator)
        yield from torch.split(order[: windows - windows % size], size)


class _Network:
    """The student in training: a copy of the encoder, its head, and the projections where features are compared."""

    def __init__(
        self, rival: Rival, encoder: Encoder, lessons: Lessons, settings: RivalSettings, compute: Compute
    ) -> None:
        self.settings, self.windows = settings, torch.from_numpy(lessons.windows)
        self.encoder = TrainableEncoder(
            encoder, self.windows, compute, what="the new encoder", fix="leave out baselines"
        )
        width = encoder.layout(encoder.positions - 1, "out")[1]
        self.head = TaskHead(width, lessons.logits.shape[1])
        self.modules = nn.ModuleList([self.encoder.network, self.head])
        self.old: Tensor | None = None
        if rival == "kd_contrast":
            assert lessons.pooled is not None
            self.old = torch.from_numpy(lessons.pooled)
            self.modules.append(nn.Linear(width, settings.projection))
            self.modules.append(nn.Linear(self.old.shape[1], settings.projection))
        self.modules.to(self.encoder.compute.device)
        self.logits = torch.from_numpy(lessons.logits)

    def loss(self, rows: Tensor) -> Tensor:
        """The loss of a batch."""
        pooled = self._features(rows)
        loss = distillation_loss(self.head(pooled), self._there(self.logits[rows]), self.settings.temperature)
        if self.old is None:
            return loss
        new, old = self.modules[2](pooled), self.modules[3](self._there(self.old[rows]))
        return loss + self.settings.contrast_weight * contrastive_loss(new, old, self.settings.contrast_temperature)

    def _features(self, rows: Tensor) -> Tensor:
        x, at_once = self.windows[rows], self.encoder.at_once(len(rows))
        if at_once >= len(rows):
            return self.encoder.pooled(x)
        # Windows need each other's features alone: of a part its activations are computed again going back.
        parts = torch.split(x, at_once)
        return torch.cat(
            [checkpoint(self.encoder.pooled, each, use_reentrant=False, preserve_rng_state=False) for each in parts]
        )

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.encoder.compute.device)


def _check(rival: Rival, encoder: Encoder, lessons: Lessons) -> None:
    encoder.window.check(lessons.windows.shape)
    parts = [("windows", lessons.windows), ("logits", lessons.logits)]
    if rival == "kd_contrast":
        if lessons.pooled is None:
            raise WindowError("KD-Contrast needs the teacher's features", fix="give Lessons.pooled")
        parts.append(("pooled", lessons.pooled))
    if len({len(part) for _, part in parts}) > 1 or not len(lessons.windows):
        raise WindowError(
            "a student needs as many windows as answers of the teacher, at least one",
            why=", ".join(f"{len(part)} {name}" for name, part in parts),
            fix="give one row of each a window",
        )
    for name, part in parts:
        if not np.isfinite(part).all():
            raise WindowError(f"{name}: some values are not finite", fix="leave those windows out")

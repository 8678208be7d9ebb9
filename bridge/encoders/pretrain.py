"""Training of compact encoders on PUBLIC recordings: label-free pretraining, and the old encoder with its task head.

The new encoder only ever sees `pretrain`, which takes no labels: it fills in masked stretches of the window and
predicts the window's own log power spectrum from the pooled tokens. The second objective makes rhythms
linearly readable, which masked reconstruction alone does not. The old encoder continues with `fit_teacher` on
public labels.

Both are deterministic by seed on one machine with a fixed number of torch threads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from bridge.config import Settings
from bridge.encoders.compact import CompactEncoder
from bridge.encoders.protocol import mean_over_tokens
from bridge.errors import SelectionError
from bridge.head import TaskHead
from bridge.held_back import held_back

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)` now and then; must be cheap."""


class OptimiserSettings(Settings):
    """AdamW with linear warm-up and a cosine to zero, and light augmentation of the windows."""

    steps: int = Field(default=600, ge=0)
    """Mini-batches; what the time depends on. 0 leaves the stage out."""
    batch: int = Field(default=64, ge=2)
    """Windows in a mini-batch."""
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    noise: float = Field(default=0.1, ge=0)
    """Standard deviation of added Gaussian noise, in units of the normalised window."""
    gain: float = Field(default=0.2, ge=0, lt=1)
    """A window is multiplied by a random factor within 1 +- gain."""
    shift: bool = True
    """Turn each window round by a random number of samples: what leaves at its end comes in at its start."""


class PretrainSettings(OptimiserSettings):
    """Label-free objectives and their weights."""

    mask_ratio: float = Field(default=0.5, gt=0, lt=1)
    """About so large a share of the tokens is hidden."""
    mask_span: int = Field(default=4, ge=1)
    """Hidden tokens come in stretches of so many."""
    reconstruction_weight: float = Field(default=1.0, ge=0)
    """Weight of filling in the hidden stretches (smooth L1)."""
    spectrum_weight: float = Field(default=1.0, ge=0)
    """Weight of predicting the window's own log power spectrum (mean squared error of standardised bands)."""
    spectrum_bands: int = Field(default=64, ge=2)
    """Bands of the spectrum: single bins at the low end, wider ones above."""
    spectrum_hz: float | None = Field(default=None, gt=0)
    """Highest frequency predicted; null: half the sampling rate."""


class SupervisedSettings(OptimiserSettings):
    """Training with public labels."""

    steps: int = Field(default=600, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    shift: bool = False
    """As in pretraining; off, since a beat at the seam may change what a label says."""
    label_smoothing: float = Field(default=0.05, ge=0, lt=1)
    validation: float = Field(default=0.2, gt=0, lt=1)
    """Share of the public patients that choose when to stop."""
    checks: int = Field(default=12, ge=1)
    """How often the validation patients are looked at; the best moment is kept."""
    average: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the running average of the weights, which is what is looked at and kept; 0 takes the last weights."""
    earliest: float = Field(default=0.5, ge=0, le=1)
    """No moment before this share of the steps is kept: few held-back patients make early peaks by luck."""


@dataclass
class History:
    """What training did: losses and checks by step, and the moment kept."""

    loss: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    kept_step: int | None = None


def pretrain(
    encoder: CompactEncoder,
    windows: NDArray[np.float32],
    settings: PretrainSettings,
    *,
    seed: int,
    progress: Progress | None = None,
) -> History:
    """Train `encoder` in place on `windows (n, channels, samples)` without labels; return the losses.

    Raises `WindowError` where the windows do not fit, `SelectionError` where there are none.
    """
    x = _as_windows(encoder, windows)
    history = History()
    if settings.steps == 0:
        return history
    with _seeded(seed) as generator:
        objective = _MaskedAndSpectral(encoder, x, settings)
        modules = nn.ModuleList([encoder, objective.heads])
        encoder.train()
        for step, optimiser in _steps(modules, settings):
            rows = torch.randint(len(x), (settings.batch,), generator=generator)
            clean = _turned(x[rows], settings, generator)
            loss = objective.loss(_augment(clean, settings, generator), clean, rows, generator)
            _descend(loss, modules, optimiser)
            history.loss.append(float(loss.detach()))
            if progress is not None and (step % 10 == 9 or step == settings.steps - 1):
                progress("masked pretraining", step + 1, settings.steps)
        encoder.eval()
    return history


def fit_teacher(
    encoder: CompactEncoder,
    windows: NDArray[np.float32],
    labels: NDArray[np.int64],
    patients: NDArray[np.str_],
    classes: int,
    settings: SupervisedSettings,
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[TaskHead, History]:
    """Train `encoder` in place together with a new task head on labelled windows; return the head and what happened.

    `windows (n, channels, samples)`, `labels (n,)` in `0 .. classes - 1`, `patients (n,)`. Classes count equally. A
    part of the patients (by keyed hash) is held back and chooses the moment to keep by balanced accuracy. Raises
    `SelectionError` where a class is missing among the training patients, or no patient is left to choose by.
    """
    x, y = _as_windows(encoder, windows), torch.from_numpy(np.asarray(labels, np.int64))
    words = {"who": "public patients", "what": "train a teacher", "why": "choose when to stop"}
    aside = held_back(patients, settings.validation, seed, **words)
    train, valid = torch.from_numpy(np.flatnonzero(~aside)), torch.from_numpy(np.flatnonzero(aside))
    pools = [train[y[train] == c] for c in range(classes)]
    if any(len(pool) == 0 for pool in pools):
        raise SelectionError(
            "the public training patients lack a class",
            why=f"{sum(len(pool) == 0 for pool in pools)} of {classes} classes have no window among them",
            fix="give more public patients, or a smaller validation share",
        )
    history = History()
    with _seeded(seed) as generator:
        head = TaskHead(encoder.architecture.width, classes)
        modules = nn.ModuleList([encoder, head])
        averaged = copy.deepcopy(modules).requires_grad_(False).eval()
        best, kept = -math.inf, copy.deepcopy(modules.state_dict())
        every = max(1, settings.steps // settings.checks)
        encoder.train()
        for step, optimiser in _steps(modules, settings):
            rows = _balanced_rows(pools, settings.batch, generator)
            turned = _turned(x[rows], settings, generator)
            logits = head(mean_over_tokens(encoder(_augment(turned, settings, generator))))
            loss = F.cross_entropy(logits, y[rows], label_smoothing=settings.label_smoothing)
            _descend(loss, modules, optimiser)
            _follow(averaged, modules, min(settings.average, step / (step + 10)))
            history.loss.append(float(loss.detach()))
            if step % every == every - 1 or step == settings.steps - 1:
                score = _balanced_accuracy(averaged, x, y, valid, classes)
                history.validation.append((step + 1, score))
                if score >= best and step + 1 >= settings.earliest * settings.steps:
                    best, history.kept_step, kept = score, step + 1, copy.deepcopy(averaged.state_dict())
                if progress is not None:
                    progress("teacher", step + 1, settings.steps)
        modules.load_state_dict(kept)
        encoder.eval()
    return head, history


def log_spectrum(x: Tensor, rate_hz: float, bands: int, highest_hz: float | None) -> Tensor:
    """Log power of `x (batch, channels, samples)` in bands: `(batch, channels * bands_used)`.

    A Hann-windowed periodogram without its zero-frequency bin. Band edges grow geometrically but never by less than one
    bin, so the low end is as fine as the window's length permits.
    """
    samples = x.shape[-1]
    top = min(samples // 2, int((highest_hz or rate_hz / 2) * samples / rate_hz))
    edges = _band_edges(max(top, 2), bands)
    # Differences of running sums lose their digits in float32.
    power = torch.fft.rfft(x.double() * torch.hann_window(samples, dtype=torch.float64), dim=-1).abs().square()
    summed = torch.cat([torch.zeros_like(power[..., :1]), power.cumsum(-1)], dim=-1)
    in_band = summed[..., edges[1:]] - summed[..., edges[:-1]]
    # A floor relative to the whole keeps empty bands (beyond a filter's edge) from being noise of rounding.
    floor = 1e-5 * power.mean(-1, keepdim=True) + 1e-12
    return torch.log(in_band.clamp_min(0) / (edges[1:] - edges[:-1]) + floor).flatten(1).float()


def _band_edges(top: int, bands: int) -> Tensor:
    """Bin indices from 1 to `top` + 1: strictly increasing, at most `bands` + 1 of them."""
    edges = [1]
    while edges[-1] <= top and len(edges) <= bands:
        left = bands + 1 - len(edges)
        ratio = ((top + 1) / edges[-1]) ** (1 / left)
        edges.append(max(edges[-1] + 1, round(edges[-1] * ratio)))
    return torch.tensor([min(edge, top + 1) for edge in edges])


class _MaskedAndSpectral:
    """The two label-free objectives over one set of windows."""

    def __init__(self, encoder: CompactEncoder, x: Tensor, settings: PretrainSettings) -> None:
        self.encoder, self.settings = encoder, settings
        tokens, width = encoder.layout(0, "in")
        channels, samples = x.shape[1:]
        self.tokens, self.points = tokens, max(1, min(samples // tokens, 25))
        spectrum = log_spectrum(x, encoder.window.rate_hz, settings.spectrum_bands, settings.spectrum_hz)
        self.spectrum = (spectrum - spectrum.mean(0)) / (spectrum.std(0, unbiased=False) + 1e-3)
        self.heads = nn.ModuleDict(
            {
                "patch": nn.Linear(width, channels * self.points),
                "spectrum": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, spectrum.shape[1])),
            }
        )
        self.hidden = nn.Parameter(0.02 * torch.randn(width))
        self.heads.register_parameter("hidden", self.hidden)

    def loss(self, noisy: Tensor, clean: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        mask = _span_mask(len(noisy), self.tokens, self.settings, generator)
        visible = self.encoder.stem.embed(noisy)
        h = torch.where(mask.unsqueeze(-1), self.hidden, visible) + self.encoder.stem.place
        h = self.encoder.suffix(h, 0)
        target = F.adaptive_avg_pool1d(clean, self.tokens * self.points)
        target = target.reshape(*target.shape[:2], self.tokens, self.points).permute(0, 2, 1, 3).flatten(2)
        reconstruction = F.smooth_l1_loss(self.heads["patch"](h)[mask], target[mask])
        spectrum = F.mse_loss(self.heads["spectrum"](mean_over_tokens(h)), self.spectrum[rows])
        return self.settings.reconstruction_weight * reconstruction + self.settings.spectrum_weight * spectrum


def _span_mask(batch: int, tokens: int, settings: PretrainSettings, generator: torch.Generator) -> Tensor:
    """Which tokens are hidden, `(batch, tokens)`: stretches at random places, at least one hidden token a window."""
    span = min(settings.mask_span, tokens)
    count = max(1, round(settings.mask_ratio * tokens / span))
    starts = torch.randint(tokens - span + 1, (batch, count), generator=generator)
    places = (starts.unsqueeze(-1) + torch.arange(span)).flatten(1)
    return torch.zeros(batch, tokens, dtype=torch.bool).scatter_(1, places, True)


def _augment(x: Tensor, settings: OptimiserSettings, generator: torch.Generator) -> Tensor:
    gain = 1 + settings.gain * (2 * torch.rand(len(x), 1, 1, generator=generator) - 1)
    return x * gain + settings.noise * torch.randn(x.shape, generator=generator)


def _balanced_rows(pools: list[Tensor], batch: int, generator: torch.Generator) -> Tensor:
    """A batch in which every class comes equally often: class weights without a loss that jumps with a rare class."""
    chosen = torch.randint(len(pools), (batch,), generator=generator)
    draws = torch.rand(batch, generator=generator)
    return torch.stack([pools[c][int(u * len(pools[c]))] for c, u in zip(chosen.tolist(), draws.tolist(), strict=True)])


def _turned(x: Tensor, settings: OptimiserSettings, generator: torch.Generator) -> Tensor:
    """Each window turned round by its own number of samples: its rhythms stay what they are."""
    if not settings.shift:
        return x
    samples = x.shape[-1]
    offsets = torch.randint(samples, (len(x), 1, 1), generator=generator)
    return x.gather(-1, ((torch.arange(samples) + offsets) % samples).expand(x.shape))


@torch.no_grad()
def _follow(averaged: nn.Module, modules: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the present ones."""
    for slow, fast in zip(averaged.parameters(), modules.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


@torch.no_grad()
def _balanced_accuracy(modules: nn.ModuleList, x: Tensor, y: Tensor, rows: Tensor, classes: int) -> float:
    encoder, head = modules
    predicted = torch.cat([head(mean_over_tokens(encoder(x[part]))).argmax(1) for part in torch.split(rows, 256)])
    recalls = [(predicted[y[rows] == c] == c).float().mean() for c in range(classes) if bool((y[rows] == c).any())]
    return float(torch.stack(recalls).mean())


def _as_windows(encoder: CompactEncoder, windows: NDArray[np.float32]) -> Tensor:
    encoder.window.check(windows.shape)
    if len(windows) == 0:
        raise SelectionError(
            "no public window to train on", fix="check the public patients with `fedbridge-site check`"
        )
    return torch.from_numpy(np.ascontiguousarray(windows, np.float32))


def _steps(modules: nn.Module, settings: OptimiserSettings) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    optimiser = torch.optim.AdamW(
        modules.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    warm_up = max(1, settings.steps // 20)
    for step in range(settings.steps):
        rising = min(1.0, (step + 1) / warm_up)
        falling = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rising * falling
        yield step, optimiser


def _descend(loss: Tensor, modules: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
    optimiser.step()


@contextmanager
def _seeded(seed: int) -> Iterator[torch.Generator]:
    """Torch's global generator (new layers' weights) and an own one, both from `seed`; the global one is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed + 1)

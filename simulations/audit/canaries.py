"""Canary patients, and what the shipped mechanisms release of a cohort of them.

A canary is a patient whose data are made so that its clipped contribution has the length of the bound and a direction
that no other canary shares: one number of the release is its own. It goes the way of every patient: drawn by the
shipped sampler, its gradient taken and clipped (or its statistics), summed, noised. A canary's score is what was
released in its direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from bridge.job import Job
from bridge.privacy.noise import NoiseSource
from bridge.shape import BridgeShape

if TYPE_CHECKING:
    from torch import Tensor

    from bridge.privacy import Batch, Plan
    from bridge.prototype import PrototypeBridge
    from client.features import FeatureSet

Floats = NDArray[np.float64]
Noise = Callable[[], NoiseSource]
"""Gives a fresh stream for each release."""

_LENGTH = 1e3
"""Of a canary's target: its gradient is far above any clipping bound."""
_LEARNING_RATE = 1e-6
"""Keeps the bridge, and so the canaries' directions, where they are. No guarantee depends on a learning rate."""
_RANK = _WIDTH = 16
_ROWS = 33
"""Numbers that the closed form of canaries reads: 32 whitened ones and the one."""


@dataclass(frozen=True)
class Canaries:
    """`count` canaries, of whom `inserted (count,)` take part."""

    inserted: NDArray[np.bool_]

    @classmethod
    def drawn(cls, count: int, seed: int | None) -> Canaries:
        """Each by its own fair coin; `seed` None: the operating system's."""
        return cls(np.random.default_rng(seed).random(count) < 0.5)

    @property
    def count(self) -> int:
        """Inserted or not."""
        return len(self.inserted)

    def names(self) -> NDArray[np.str_]:
        """Patient ids of those who take part."""
        return np.array([f"canary-{i:06d}" for i in np.flatnonzero(self.inserted)], dtype=np.str_)


def training_scores(job: Job, canaries: Canaries, noise: Noise, key: Callable[[int], bytes]) -> Floats:
    """Scores `(count,)` from all messages of a resolved job's gradient training, at one site.

    Under `central` from the noised sums, under `local` from every noised gradient that the site's optimiser gets (the
    accounting counts each as released, so the attacker may have them). `key` gives a message's sampling key.
    """
    from bridge.privacy import Plan, TrainPlan, mechanism
    from bridge.privacy.accounting import message_releases
    from bridge.privacy.sampling import PatientSampler

    shape = _training_shape(canaries.count)
    bridge = _training_bridge(shape)
    public = Plan.of(job)
    public = type(public)(**(vars(public) | {"learning_rate": _LEARNING_RATE}))
    release = message_releases(job, "train")[0]
    ours = mechanism(job.privacy.mechanism)
    total = np.zeros(shape.arrays()["B"])
    for message in range(1, job.rounds + 1):
        at_site = noise() if ours.noised_at == "site" else None
        plan = TrainPlan(**vars(public), align=_squares, noise=at_site)
        draws = _draws(PatientSampler(release, key(message)), canaries, shape)
        with _gradients_of(bridge.shape.trained.index("B")) as seen:
            update = ours.site_update(bridge, draws, plan).update
        if ours.noised_at == "site":
            total += public.divisor * np.sum(seen, axis=0)
        else:
            total += _summed(ours.aggregate({"site": update}, {"site": 1.0}, public, noise()), public)
    return -total.ravel()[: canaries.count]


def _summed(aggregated: tuple[dict[str, dict[str, Any]], dict[str, float]], plan: Plan) -> Floats:
    """The noised sum of gradients of B behind the server's step."""
    (step,) = aggregated[0].values()
    return np.asarray(step["B"], np.float64) / -(plan.learning_rate / plan.divisor)


def _training_shape(count: int) -> BridgeShape:
    """A paper's bridge whose B has a number for each canary."""
    tokens = -(-count // (_RANK * _WIDTH))
    return BridgeShape(width_new=_RANK, rank=_RANK, tokens_old=tokens, prototypes=_WIDTH, width_old=_WIDTH)


def _training_bridge(shape: BridgeShape) -> PrototypeBridge:
    from bridge.prototype import PrototypeBridge

    bridge = PrototypeBridge(shape)
    b = np.zeros(shape.arrays()["B"], np.float32)
    bridge.load_arrays({"A": np.eye(_RANK, dtype=np.float32), "B": b, "P": np.eye(_WIDTH, dtype=np.float32)})
    return bridge


def _draws(sampler: Any, canaries: Canaries, shape: BridgeShape) -> Iterator[Batch]:
    """The draws of a message: with B at zero, canary i's gradient is in the i-th number of B alone."""
    import torch

    from bridge.privacy import Batch

    members = np.flatnonzero(canaries.inserted)
    for rows in sampler.draws(canaries.names(), np.arange(len(members)), 1):
        drawn = members[rows[:, 0]]
        row, column = np.divmod(drawn, shape.columns)
        x = np.zeros((len(drawn), 1, _RANK), np.float32)
        y = np.zeros((len(drawn), 1, shape.columns), np.float32)
        x[np.arange(len(drawn)), 0, row] = 1.0
        y[np.arange(len(drawn)), 0, column] = _LENGTH
        targets = torch.from_numpy(y.reshape(len(drawn), 1, shape.tokens_old, _WIDTH))
        yield Batch(torch.from_numpy(x), targets, torch.ones(len(drawn), 1, dtype=torch.bool))


def _squares(tokens: Tensor, batch: Batch) -> Tensor:
    """Each patient's squared error: a loss of that patient's data alone."""
    return ((tokens - batch.targets).square().flatten(2).sum(dim=2) * batch.mask).sum(dim=1)


class _gradients_of:  # noqa: N801 - a context manager, read as a verb
    """Collects what every optimiser step inside the block gets as the gradient of one parameter, transposed."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __enter__(self) -> list[Floats]:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        seen: list[Floats] = []

        def record(optimiser: Any, arguments: Any, named: Any) -> None:
            weight = optimiser.param_groups[0]["params"][self._index]
            seen.append(weight.grad.double().numpy().T.copy())

        self._handle = register_optimizer_step_pre_hook(record)
        return seen

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


def closed_form_scores(job: Job, canaries: Canaries, noise: Noise) -> Floats:
    """Scores `(count,)` from the one release of a resolved job's closed form, at one site."""
    from client.closed_form import closed_form_item
    from client.requests import Request
    from client.session import Deadline
    from server.noised import noised_sum

    shape = _closed_form_shape(canaries.count)
    bridge, asked = _closed_form_bridge(shape), job.privacy.closed_form
    at_site = job.privacy.mechanism == "local"
    request = Request("query.closed_form", "audit", None, 0, 0)
    features = cast("FeatureSet", _CanaryFeatures(canaries, shape))
    _, item = closed_form_item(features, job, request, bridge, Deadline(np.inf), noise() if at_site else None)
    deviation = (asked.noise_multiplier or 0.0) * asked.clip
    released = noised_sum({"site": item}, job, deviation, None if at_site else noise()).values
    return released[1 : 1 + canaries.count]


def _closed_form_shape(count: int) -> BridgeShape:
    prototypes = -(-count // (_ROWS - 1))
    return BridgeShape(
        width_new=_ROWS - 1,
        rank=1,
        tokens_old=1,
        prototypes=prototypes,
        width_old=prototypes,
        cosines=1,
        components=_ROWS - 1,
        frozen_prototypes=True,
    )


def _closed_form_bridge(shape: BridgeShape) -> PrototypeBridge:
    from bridge.prototype import PrototypeBridge, initial_arrays

    width = shape.width_new
    constants = {"mean": np.zeros(width), "whitening": np.eye(width)}
    bridge = PrototypeBridge(shape)
    bridge.load_arrays(initial_arrays(shape, 0, np.eye(shape.prototypes), constants))
    return bridge


class _CanaryFeatures:
    """What the closed form reads of a site's features, for canaries: one window each, in whose cross moments the
    canary's own number outweighs all others."""

    def __init__(self, canaries: Canaries, shape: BridgeShape) -> None:
        from client.windowing import WindowTable

        self._members, self._shape = np.flatnonzero(canaries.inserted), shape
        n = len(self._members)
        nothing = np.full(n, "", dtype=np.str_)
        self.table = WindowTable(
            patients=canaries.names(),
            recordings=nothing,
            starts=np.zeros(n),
            labels=np.full(n, -1, dtype=np.int64),
            groups=nothing,
        )

    def new_output(self, m: int) -> NDArray[np.float32]:
        """`(n, width_new)`: the row of the canary's number."""
        x = np.zeros((len(self._members), self._shape.width_new), np.float32)
        x[np.arange(len(x)), self._members // self._shape.columns] = _LENGTH
        return x

    def old_input_tokens(self, l: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:  # noqa: E741
        """`(rows, 1, width_old)`: the column of the canary's number."""
        y = np.zeros((len(rows), 1, self._shape.width_old), np.float32)
        y[np.arange(len(rows)), 0, self._members[rows] % self._shape.columns] = _LENGTH**2
        return y

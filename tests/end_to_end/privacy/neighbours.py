"""Whole runs of neighbouring data sets: pretend sites that differ in one patient, asked the same, and compared.

A world is a folder of pretend sites. Its recordings come from one pool, so a patient is the same in all worlds, and
features are computed once. The server's side is a fixed script, the same in both worlds: broadcasts are public. The
site's side is the real ClientApp with its ledger, outbox and audit log. Noise is off, but every call for it is kept.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Array, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from numpy.typing import NDArray

from bridge.encoders.cards import EncoderCard, read_card
from bridge.job import Job
from bridge.messages import ReasonCode
from bridge.privacy.noise import NoiseSource
from bridge.shape import BridgeShape
from client.audit import AuditLog
from client.features import FeatureSet
from tests.client.sites import PERMISSIVE, RATES, ask, build_job, build_models, build_site

SLACK = 1e-5
"""Relative: updates leave as float32."""

M, L = 1, 1
"""The positions of the scripted bridge."""

POLICY: dict[str, Any] = {
    **PERMISSIVE,
    "minimum_patients": 5,
    "privacy": {
        "mechanisms": ["none", "local", "central"],
        "epsilon_cap": 1000,
        "delta": 0.01,
        "clip_max": 10,
        "noise_multiplier_min": 0.1,
        "sampling_rate_max": 1.0,
    },
}
"""A policy that lets every mechanism run: what holds the bounds is the mechanism, not the policy."""

FACTORED: dict[str, Any] = {
    "kind": "factored",
    "cosines": 2,
    "whitening": "public",
    "components": 5,
    "frozen_prototypes": True,
    "initialisation": "directions",
    "constant": "public",
}

Mechanism = Literal["local", "central"]
Hazard = Literal["nan", "huge", "large", "raises"]


@dataclass(frozen=True)
class Pool:
    """Recordings of all patients that a world may have, and the models."""

    folder: Path
    patients: tuple[str, ...]
    """With twelve windows each."""
    short: str
    """A patient with two windows."""
    windowless: str
    """One whose recording is shorter than a window."""
    damaged: str
    """One whose file can't be read."""

    @property
    def models(self) -> Path:
        return self.folder / "models"


def build_pool(folder: Path, patients: int = 24) -> Pool:
    """A pool with the small models of `tests.client.sites`."""
    build_models(folder / "models")
    site = build_site(folder / "pool", "p", patients=patients, policy=POLICY)
    *whole, short, windowless, damaged = sorted(path.stem for path in (site / "recordings").iterdir())
    for name, seconds in ((short, 8), (windowless, 2)):
        path = site / "recordings" / f"{name}.npz"
        arrays = dict(np.load(path))
        for key, rate in (*RATES.items(), ("label", 1)):
            arrays[key] = arrays[key][..., : rate * seconds]
        np.savez(path, **arrays)
    (site / "recordings" / f"{damaged}.npz").write_bytes(b"PK\x03\x04 torn")
    return Pool(folder, tuple(whole), short, windowless, damaged)


@dataclass(frozen=True)
class Cohorts:
    """Who is at one site."""

    pair: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def without(self, patient: str) -> Cohorts:
        """The same site, had that patient never come."""
        return Cohorts(*(tuple(p for p in each if p != patient) for each in (self.pair, self.validation, self.test)))


def build_world(pool: Pool, folder: Path, sites: Sequence[Cohorts]) -> Path:
    """Pretend sites `site-0`, `site-1`, ... with recordings of the pool and fresh ledgers."""
    plain = yaml.safe_load((pool.folder / "pool" / "site.yaml").read_text(encoding="utf-8"))
    for index, cohorts in enumerate(sites):
        home = folder / f"site-{index}"
        (home / "recordings").mkdir(parents=True)
        for patient in (*cohorts.pair, *cohorts.validation, *cohorts.test):
            shutil.copyfile(pool.folder / "pool" / "recordings" / f"{patient}.npz", home / f"recordings/{patient}.npz")
        splits = {name: list(getattr(cohorts, name)) for name in ("pair", "validation", "test")}
        changes = {"site": f"s{index}", "splits": splits, "cache": {"folder": str(pool.folder / "cache")}}
        (home / "site.yaml").write_text(yaml.safe_dump({**plain, **changes}), encoding="utf-8")
        (home / "policy.yaml").write_text(yaml.safe_dump(POLICY), encoding="utf-8")
    return folder


def private_job(pool: Pool, mechanism: Mechanism, **changes: Any) -> Job:
    """A resolved job; `changes` go into its sections, those of `privacy` one level deeper."""
    asked: dict[str, Any] = {
        "mechanism": mechanism,
        "delta": 1e-3,
        "patients_bound": 50,
        "simulation_seed": 5,
        "training": {"noise_multiplier": 1.5, "sampling_rate": 0.6, "clip": 0.02, "divisor": 3.0},
        "selection": {"noise_multiplier": 3.0, "groups": 4, "clip": 0.05},
        "closed_form": {"noise_multiplier": 2.0, "clip": 0.5},
        "metrics": {"noise_multiplier": 2.0},
    }
    for key, value in changes.pop("privacy", {}).items():
        asked[key] = {**asked[key], **value} if isinstance(value, dict) else value
    train = {"rounds": 2, "local_steps": 3 if mechanism == "local" else 1, **changes.pop("train", {})}
    return build_job(pool.models, privacy=asked, train=train, evaluate={"every": 2}, **changes)


def bridge_shape(pool: Pool, job: Job) -> BridgeShape:
    """Of the job's bridge at the scripted positions."""
    old, new = (read_card(pool.models / f"{name}_encoder", EncoderCard) for name in ("old", "new"))
    return BridgeShape.of(job.bridge, old, new, (M, L))


def broadcast(pool: Pool, job: Job, seed: int, scale: float = 0.5) -> dict[str, NDArray[np.float32]]:
    """A made-up bridge with all its public constants; no site can know whether it was trained."""
    rng = np.random.default_rng(seed)
    shapes = bridge_shape(pool, job).arrays()
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Asked:
    """One message of the script."""

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    """Of the broadcast bridge, where there is one."""
    scale: float = 0.5
    """How large its numbers are."""


def script(job: Job) -> list[Asked]:
    """All that the server of a run of the job may ask, in its order."""
    messages = [Asked("query.describe"), Asked("query.probe"), Asked("query.similarity", {"input-position": M})]
    positions = {"input-position": M, "output-position": L}
    if job.train.solves:
        messages.append(Asked("query.closed_form", positions, 1))
    for number in range(1, job.rounds + 1):
        messages.append(Asked("train", {"round": number, **positions}, number))
    last = {"round": job.rounds, **positions}
    for split in ("validation", "test"):
        if job.evaluates(split, job.rounds):
            messages.append(Asked("evaluate", {**last, "split": split}, 9))
    return messages


@dataclass
class Reply:
    """All that a site showed by one reply, and what its noise was asked to be."""

    site: int
    asked: Asked
    code: int = 0
    reason: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    """By item: an array, a number, a text or a flag."""
    form: list[tuple[str, ...]] = field(default_factory=list)
    """Record, name, dtype, shape and bytes of each item, in order."""
    size: int = 0
    noise: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    """Shape and standard deviation of every draw of noise."""
    steps: list[list[NDArray[np.float32]]] = field(default_factory=list)
    """Under `local`: what the optimiser was given at each local step."""

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        return {name: value for name, value in self.values.items() if isinstance(value, np.ndarray)}

    @property
    def label(self) -> str:
        return f"site {self.site}, {self.asked.kind} {self.asked.config}"


@dataclass
class Transcript:
    """The replies of one run in their order, and what each site's audit log says to have left."""

    replies: list[Reply]
    audited: list[list[tuple[str, str, str, tuple[int, ...], int]]]


def record(
    pool: Pool,
    world: Path,
    job: Job,
    *,
    messages: Sequence[Asked] | None = None,
    sites: int = 1,
    follow: Transcript | None = None,
    hazards: Mapping[str, Hazard] | None = None,
) -> Transcript:
    """Ask every site of a world the whole script, without noise.

    Under `local` a step starts from what the steps before released. With `follow` it is given what was released in
    that other run, so that both are asked the same at every step; the update must then be the same, too.
    """
    replies: list[Reply] = []
    key = secrets.token_hex(16)
    with quiet(hazards or {}) as watch:
        for asked in script(job) if messages is None else messages:
            for site in range(sites):
                watch.begin(None if follow is None else follow.replies[len(replies)].steps)
                message = ask(
                    world,
                    job,
                    asked.kind,
                    asked.config,
                    None if asked.seed is None else broadcast(pool, job, asked.seed, asked.scale),
                    node_config={"partition-id": site, "num-partitions": sites},
                    run_config={"simulation-folder": str(world), "run-key": key},
                )
                replies.append(read_reply(message, Reply(site, asked, noise=watch.noise, steps=watch.steps)))
    return Transcript(replies, [_audited(world / f"site-{site}") for site in range(sites)])


def read_reply(message: Message, reply: Reply) -> Reply:
    """Fill in what a message shows."""
    if message.has_error():
        reply.code, reply.reason = message.error.code, message.error.reason or ""
        return reply
    for record_name, content in message.content.items():
        for name, value in content.items():
            if isinstance(value, Array):
                reply.values[name] = value.numpy()
                reply.form.append((record_name, name, value.dtype, str(tuple(value.shape)), str(len(value.data))))
            else:
                reply.values[name] = value
                reply.form.append((record_name, name, type(value).__name__))
    reply.size = sum(len(each.deflate()) for each in get_all_nested_objects(message.content).values())
    return reply


class Watch:
    """What happens behind one message at a time."""

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, follow: list[list[NDArray[np.float32]]] | None) -> None:
        self.noise: list[tuple[tuple[int, ...], float]] = []
        self.steps: list[list[NDArray[np.float32]]] = []
        self.follow = follow


@contextmanager
def quiet(hazards: Mapping[str, Hazard]) -> Iterator[Watch]:
    """Noise off and watched, optimisers watched, and the hazards' patients with data of their kind."""
    watch = Watch()
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())

        def normal(_: NoiseSource, shape: int | tuple[int, ...], deviation: float) -> NDArray[np.float64]:
            watch.noise.append((tuple(np.atleast_1d(shape).tolist()), deviation))
            return np.zeros(shape)

        def step(optimiser: torch.optim.Adam, *rest: Any) -> Any:
            weights = [weight for group in optimiser.param_groups for weight in group["params"]]
            watch.steps.append([weight.grad.detach().numpy().copy() for weight in weights])
            if watch.follow is not None:
                for weight, grad in zip(weights, watch.follow[len(watch.steps) - 1], strict=True):
                    weight.grad = torch.from_numpy(grad.copy())
            return plain_step(optimiser, *rest)

        plain_step = torch.optim.Adam.step
        patch.setattr(NoiseSource, "normal", normal)
        patch.setattr(torch.optim.Adam, "step", step)
        if hazards:
            _spoil(patch, hazards)
        yield watch


def _spoil(patch: pytest.MonkeyPatch, hazards: Mapping[str, Hazard]) -> None:
    """Features of some patients as broken or as extreme as an encoder may make them."""
    factors = {"nan": np.nan, "huge": 1e30, "large": 1e3, "raises": 1.0}
    plain_pooled, plain_rows = FeatureSet._pooled, FeatureSet._rows

    def spoilt(own: NDArray[Any], owners: NDArray[np.str_]) -> NDArray[Any]:
        out = np.array(own)
        for patient, hazard in hazards.items():
            out[owners == patient] *= np.float32(factors[hazard])
        return out

    def pooled(self: FeatureSet, *rest: Any) -> NDArray[Any]:
        return spoilt(plain_pooled(self, *rest), self.table.patients)

    def rows_of(self: FeatureSet, array_of: Any, rows: Any, shape: Any) -> NDArray[Any]:
        owners = self.table.patients[rows]
        if any(hazard == "raises" and patient in owners for patient, hazard in hazards.items()):
            raise ValueError("the tokens of a patient can't be had")
        return spoilt(plain_rows(self, array_of, rows, shape), owners)

    patch.setattr(FeatureSet, "_pooled", pooled)
    patch.setattr(FeatureSet, "_rows", rows_of)


def _audited(site: Path) -> list[tuple[str, str, str, tuple[int, ...], int]]:
    entries = [line.entry for line in AuditLog(site / "audit.jsonl").verify()]
    return [(e.event, e.message, e.item, e.shape, e.bytes) for e in entries if e.event in ("sent", "refused")]


# The checks.


def bounds(job: Job) -> dict[str, float]:
    """By message: how far one patient may move all its arrays together, in L2 norm, before any noise."""
    asked = job.privacy
    return {
        "query.describe": 0.0,
        "query.probe": 2 * asked.selection.clip,
        "query.similarity": 2 * asked.selection.clip,
        "query.closed_form": asked.closed_form.clip,
        "train": asked.training.clip,
        "evaluate": 1.0,
    }


def check_neighbours(one: Transcript, other: Transcript, job: Job, changed: int = 0) -> dict[str, float]:
    """Raise `AssertionError` where runs of neighbours differ in anything but arrays of the changed site, or in these by
    more than their bound. Returns the largest movement of each message as a share of its bound."""
    check_form(one, other)
    shares: dict[str, float] = {}
    for a, b in zip(one.replies, other.replies, strict=True):
        check_noise(a, job)
        check_noise(b, job)
        moved = movement(a, b, job)
        if a.site != changed:
            assert moved == 0.0, f"{a.label}: moved, though nobody came or went there"
            continue
        bound = bounds(job)[a.asked.kind]
        assert moved <= bound * (1 + SLACK), f"{a.label}: moved by {moved:.6g}, the declared bound is {bound:g}"
        shares[a.asked.kind] = max(shares.get(a.asked.kind, 0.0), moved / bound if bound else 0.0)
    return shares


def check_form(one: Transcript, other: Transcript) -> None:
    """Raise `AssertionError` where anything but the numbers in arrays differs."""
    assert len(one.replies) == len(other.replies), "another number of replies"
    for a, b in zip(one.replies, other.replies, strict=True):
        assert (a.site, a.asked) == (b.site, b.asked), "another order of messages"
        assert (a.code, a.reason) == (b.code, b.reason), f"{a.label}: codes {a.code} and {b.code}"
        assert a.form == b.form, f"{a.label}: another name, type, shape or size: {a.form} and {b.form}"
        plain = {name: value for name, value in a.values.items() if name not in a.arrays}
        assert plain == {name: b.values[name] for name in plain}, f"{a.label}: another number, flag or text"
        assert a.size == b.size, f"{a.label}: {a.size} and {b.size} bytes"
        assert a.noise == b.noise, f"{a.label}: other draws of noise"
        assert len(a.steps) == len(b.steps), f"{a.label}: another number of steps"
    assert one.audited == other.audited, "the audit logs list other items"


def check_noise(reply: Reply, job: Job) -> None:
    """Raise `AssertionError` unless the site's noise is what the plan says: under `local` the multiplier times the
    bound on every number that leaves, or at every step; under `central` none."""
    assert reply.code == 0, f"{reply.label}: answered by code {ReasonCode(reply.code).name}"
    if job.privacy.mechanism == "central" or reply.asked.kind == "query.describe":
        assert reply.noise == [], f"{reply.label}: noise where none is due"
        return
    asked = job.privacy
    multiplier = {
        "query.probe": asked.selection,
        "query.similarity": asked.selection,
        "query.closed_form": asked.closed_form,
        "train": asked.training,
        "evaluate": asked.metrics,
    }[reply.asked.kind].noise_multiplier
    assert multiplier is not None
    deviation = multiplier * bounds(job)[reply.asked.kind]
    shapes = [array.shape for array in reply.arrays.values()] * max(1, len(reply.steps))
    assert [shape for shape, _ in reply.noise] == shapes, f"{reply.label}: noise of the shapes {reply.noise}"
    for _, found in reply.noise:
        assert found == pytest.approx(deviation), f"{reply.label}: noise of {found:g}, {deviation:g} is due"
    if reply.asked.kind == "train":
        assert len(reply.steps) == job.train.local_steps, f"{reply.label}: {len(reply.steps)} steps"


def movement(a: Reply, b: Reply, job: Job) -> float:
    """L2 norm by which the arrays of a reply differ, before noise.

    Training under `local` is judged by what its noise is added to: what each step gave the optimiser, times the public
    divisor, the most of any step. The update itself must not differ, since both runs were given the same noised sums.
    """
    if a.asked.kind == "train" and job.privacy.mechanism == "local":
        for name, array in a.arrays.items():
            assert np.array_equal(array, b.arrays[name]), f"{a.label}: {name} depends on more than the noised sums"
        divisor = job.privacy.training.divisor
        return max((divisor * _distance(x, y) for x, y in zip(a.steps, b.steps, strict=True)), default=0.0)
    return _distance(list(a.arrays.values()), [b.arrays[name] for name in a.arrays])


def _distance(one: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]]) -> float:
    squares = [np.square(x.astype(np.float64) - y.astype(np.float64)).sum() for x, y in zip(one, other, strict=True)]
    return float(np.sqrt(np.sum(squares))) if squares else 0.0


def compare(
    pool: Pool,
    folder: Path,
    cohorts: Cohorts,
    patient: str,
    job: Job,
    *,
    messages: Sequence[Asked] | None = None,
    others: Sequence[Cohorts] = (),
    hazards: Mapping[str, Hazard] | None = None,
) -> dict[str, float]:
    """Run a site with and without a patient, beside `others` that stay as they are, and check the two runs.

    Returns the largest movement of each message as a share of its bound.
    """
    sites = 1 + len(others)
    runs: list[Transcript] = []
    for name, here in (("with", cohorts), ("without", cohorts.without(patient))):
        world = build_world(pool, folder / name, [here, *others])
        follow = runs[0] if runs else None
        runs.append(record(pool, world, job, messages=messages, sites=sites, follow=follow, hazards=hazards))
    return check_neighbours(runs[0], runs[1], job)

"""Answers under a private mechanism: the ledger first, then the data, then the outbox.

A run's whole plan is reserved before its first answer. Each message draws its cost down before it is computed, and its
reply is stored, so that the same question gets the same answer and no question a second one. What is computed depends
on nothing but one patient's bounded share at a time (`bridge.privacy`), so a cohort of no patients is answered like any
other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Message
from safetensors.numpy import load, save

from bridge.hashing import sha256_array, sha256_json
from bridge.job import Job
from bridge.messages import ITEMS
from client.bounds import COHORTS, plan_of
from client.requests import Request
from client.session import Session

if TYPE_CHECKING:
    from bridge.privacy.noise import NoiseSource
    from client.features import FeatureSet
    from client.ledger import Ledger
    from client.site_file import Split

Items = dict[str, Any]
Cohorts = Mapping["Split", "FeatureSet | None"]
"""Features by cohort; None where one has no usable window."""
Compute = Callable[["Session", "Request", "FeatureSet | None", "Randomness"], Items]


class Randomness:
    """Where one reply's randomness comes from: the operating system, or in simulation the job's seed."""

    def __init__(self, job: Job, site: str, request: Request) -> None:
        self._labels = (site, request.message, request.round or 0, request.split or "")
        self._seed = job.privacy.simulation_seed
        self._at_site = job.privacy.mechanism == "local"

    @property
    def noise(self) -> NoiseSource | None:
        """A fresh stream for the site's own noise; None where the server adds it."""
        return self.stream("noise") if self._at_site else None

    def stream(self, purpose: str) -> NoiseSource:
        """A fresh stream of its own for a purpose."""
        from bridge.privacy.noise import NoiseSource

        if self._seed is None:
            return NoiseSource.from_system()
        return NoiseSource.seeded(self._seed, purpose, *self._labels)

    def key(self, purpose: str) -> bytes:
        """32 bytes from which patients are drawn."""
        if self._seed is None:
            return os.urandom(32)
        return bytes.fromhex(sha256_json(["fedbridge.draws/1", self._seed, purpose, *self._labels]))


@contextmanager
def reserved(session: Session) -> Iterator[tuple[Ledger, Cohorts]]:
    """The site's ledger, with the whole plan of the job reserved for every patient of its cohorts, and their features.

    What is computed on these features is paid for: a recording that comes later is not among them. Raises `BudgetError`
    where it would pass a patient's cap, `LedgerError` where the ledger can't be used.
    """
    from bridge.privacy.accounting import releases_of
    from client.ledger import Ledger, Plan

    job = session.job
    releases = plan_of(job)
    cohorts: Cohorts = {name: session.cohort(name) for name in COHORTS if releases_of(job, name)}
    plan = Plan(
        sha256=sha256_json(job.model_dump(mode="json", by_alias=True)),
        releases=releases,
        delta=job.privacy.delta,
        cap=session.policy.privacy.epsilon_cap,
        cohorts={name: _patients(features) for name, features in cohorts.items()},
    )
    with Ledger.open(session.site) as ledger:
        ledger.reserve(session.run_key, plan)
        yield ledger, cohorts


def private_reply(session: Session, message: Message, request: Request, compute: Compute) -> Message:
    """The reply of a private run: computed once and booked, or what was answered to the same question before.

    Raises `BudgetError`, `ReplayError` and `LedgerError`; then nothing leaves.
    """
    from bridge.privacy.accounting import message_releases
    from client.ledger import MessageKey

    split: Split = request.split or "pair"
    randomness = Randomness(session.job, session.site.name, request)
    with reserved(session) as (ledger, cohorts):
        stored = ledger.answer(
            session.run_key,
            MessageKey(request.message, request.round, request.split),
            _fingerprint(request),
            message_releases(session.job, request.message, request.split),
            split,
            lambda: _packed(compute(session, request, cohorts[split], randomness)),
            encrypt=session.job.privacy.mechanism == "central",
        )
    return session.reply(message, request, _unpacked(stored))


def _patients(features: FeatureSet | None) -> tuple[str, ...]:
    return () if features is None else tuple(np.unique(features.table.patients).tolist())


def _fingerprint(request: Request) -> str:
    """A hash of all that was asked."""
    arrays = {name: sha256_array(array) for name, array in sorted(request.arrays.items())}
    asked = [request.message, request.round, request.input_position, request.output_position, request.split, arrays]
    return sha256_json(asked)


def _packed(items: Items) -> bytes:
    return save({name: np.ascontiguousarray(value) for name, value in items.items()})


def _unpacked(content: bytes) -> Items:
    return {
        name: value.item() if ITEMS[name].kind == "number" else value for name, value in sorted(load(content).items())
    }

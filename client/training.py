"""A round at a site: which windows make which batch, and the update that the mechanism makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bridge.hashing import keyed_hash
from bridge.job import Job, TrainJob
from bridge.privacy.sampling import EMPTY
from client.requests import Request

if TYPE_CHECKING:
    from bridge.encoders.protocol import Encoder
    from bridge.privacy import Batch, SiteUpdate
    from bridge.prototype import PrototypeBridge
    from client.features import FeatureSet
    from client.session import Deadline
    from client.windowing import WindowTable


def batch_rows(
    patients: NDArray[np.str_], order: NDArray[np.int64], train: TrainJob, key: int
) -> Iterator[NDArray[np.int64]]:
    """The round's `local_steps` batches as row numbers `(patients_per_batch, windows_per_patient)`, EMPTY where none.

    `patients (n,)` names each row's patient, `order` lists the rows in an order that depends on the data alone.
    Patients come in shuffled passes, each once a pass, so all count equally however many windows they have; in a
    batch that is wider than the site, a patient appears again with other windows. A patient's windows are drawn
    without replacement; one with fewer than `windows_per_patient` leaves the rest EMPTY. All draws come from one
    generator seeded by `key`.
    """
    rng = np.random.default_rng(key)
    names = np.unique(patients)
    rows_of = {name: order[patients[order] == name] for name in names}
    queue: list[np.str_] = []
    for _ in range(train.local_steps):
        batch = np.full((train.patients_per_batch, train.windows_per_patient), EMPTY, dtype=np.int64)
        for slot in range(train.patients_per_batch):
            queue = queue or list(rng.permutation(names))
            own = rng.permutation(rows_of[queue.pop()])[: train.windows_per_patient]
            batch[slot, : len(own)] = own
        yield batch


def batch_key(job: Job, site: str, round_: int) -> int:
    """The seed of a round's batches: from the job's seed, the site and the round, so a resumed run draws the same."""
    return keyed_hash("fedbridge.batches/1", job.seed, site, round_)


def batch_order(table: WindowTable) -> NDArray[np.int64]:
    """The rows in an order that depends on the data alone."""
    return np.lexsort((table.starts, table.recordings, table.patients)).astype(np.int64)


def train_update(
    features: FeatureSet,
    job: Job,
    site: str,
    request: Request,
    bridge: PrototypeBridge,
    old_encoder: Encoder,
    deadline: Deadline,
) -> SiteUpdate:
    """The site's update of the broadcast `bridge`: exactly `local_steps` steps, the same bits for the same request.

    The caller has checked the request's round, positions and arrays.
    """
    from bridge.alignment import aligner
    from bridge.privacy import Plan, TrainPlan, mechanism

    m, l = request.positions  # noqa: E741
    plan = TrainPlan(**vars(Plan.of(job)), align=aligner(job.alignment, old_encoder, l))
    key = batch_key(job, site, request.round or 0)
    batches = _batches(features, job, m, l, key, deadline)
    return mechanism(job.privacy.mechanism).site_update(bridge, batches, plan)


def _batches(
    features: FeatureSet,
    job: Job,
    m: int,
    l: int,  # noqa: E741
    key: int,
    deadline: Deadline,
) -> Iterator[Batch]:
    table = features.table
    order = batch_order(table)
    inputs = features.new_output(m)
    for rows in batch_rows(table.patients, order, job.train, key):
        deadline.check()
        yield _batch(features, job, inputs, l, rows)


def _batch(
    features: FeatureSet,
    job: Job,
    inputs: NDArray[np.float32],
    l: int,  # noqa: E741
    rows: NDArray[np.int64],
) -> Batch:
    """Features and targets of the rows; EMPTY places are zeros behind the mask."""
    import torch

    from bridge.privacy import Batch

    mask = rows != EMPTY
    wanted = rows[mask]
    final = job.alignment.layer == "final"
    tokens = features.old_tokens(wanted) if final else features.old_input_tokens(l, wanted)
    x = np.zeros((*rows.shape, inputs.shape[1]), dtype=np.float32)
    y = np.zeros((*rows.shape, *tokens.shape[1:]), dtype=np.float32)
    x[mask], y[mask] = inputs[wanted], tokens
    return Batch(features=torch.from_numpy(x), targets=torch.from_numpy(y), mask=torch.from_numpy(mask))

"""A round at a site under a private mechanism: Poisson draws of patients, and the update that the mechanism makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.alignment import aligner
from bridge.job import Job
from bridge.messages import TRAIN
from bridge.privacy import Batch, Plan, SiteUpdate, TrainPlan, mechanism
from bridge.privacy.accounting import message_releases
from bridge.privacy.sampling import EMPTY, PatientSampler
from bridge.prototype import PrototypeBridge
from client.features import FeatureSet
from client.private import Randomness
from client.requests import Request
from client.session import Deadline
from client.site import Site
from client.training import batch_order

if TYPE_CHECKING:
    from bridge.encoders.protocol import Encoder


def private_update(
    site: Site,
    features: FeatureSet | None,
    job: Job,
    request: Request,
    bridge: PrototypeBridge,
    old_encoder: Encoder,
    randomness: Randomness,
    deadline: Deadline,
) -> SiteUpdate:
    """The site's update of the broadcast bridge from `local_steps` draws of its patients, however few they are."""
    m, l = request.positions  # noqa: E741
    public = Plan.of(job)
    plan = TrainPlan(**vars(public), align=aligner(job.alignment, old_encoder, l), noise=randomness.noise)
    sampler = PatientSampler(message_releases(job, TRAIN)[0], randomness.key("draws"))
    sizes = _Sizes(site, job, m, l)
    return mechanism(job.privacy.mechanism).site_update(bridge, _draws(features, job, sizes, sampler, deadline), plan)


class _Sizes:
    """Shapes of a batch, from the cards alone: a cohort of no patients has them, too."""

    def __init__(self, site: Site, job: Job, m: int, l: int) -> None:  # noqa: E741
        self.m, self.l, self.final = m, l, job.alignment.layer == "final"
        self.width = site.new_card.layout(m, "out")[1]
        self.tokens = site.old_card.layouts_out[-1] if self.final else site.old_card.layout(l, "in")


def _draws(
    features: FeatureSet | None, job: Job, sizes: _Sizes, sampler: PatientSampler, deadline: Deadline
) -> Iterator[Batch]:
    if features is None:
        patients, order = np.array([], dtype=np.str_), np.array([], dtype=np.int64)
    else:
        patients, order = features.table.patients, batch_order(features.table)
    for rows in sampler.draws(patients, order, job.train.windows_per_patient):
        deadline.check()
        yield _batch(features, sizes, rows)


def _batch(features: FeatureSet | None, sizes: _Sizes, rows: NDArray[np.int64]) -> Batch:
    """Features and targets of a draw; EMPTY places, and patients whose data can't be read, are zeros behind the
    mask."""
    mask = rows != EMPTY
    x = np.zeros((*rows.shape, sizes.width), dtype=np.float32)
    y = np.zeros((*rows.shape, *sizes.tokens), dtype=np.float32)
    for patient in range(len(rows)):
        assert features is not None  # nobody is drawn from nobody
        wanted = rows[patient][mask[patient]]
        try:
            own = features.new_output(sizes.m)[wanted]
            tokens = features.old_tokens(wanted) if sizes.final else features.old_input_tokens(sizes.l, wanted)
        except Exception:  # one patient's trouble must not be seen from outside
            mask[patient] = False
            continue
        x[patient, mask[patient]], y[patient, mask[patient]] = own, tokens
    return Batch(features=torch.from_numpy(x), targets=torch.from_numpy(y), mask=torch.from_numpy(mask))

"""The closed form at a site: the sufficient statistics of its patients' ridge regression, as one vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bridge.job import Job
from bridge.messages import closed_form_length
from client.errors import CacheError, ModelsError
from client.requests import Request
from client.statistics import selection_rows

if TYPE_CHECKING:
    from bridge.closed_form import Regression
    from bridge.privacy.noise import NoiseSource
    from bridge.prototype import PrototypeBridge
    from client.features import FeatureSet
    from client.session import Deadline

Floats = NDArray[np.float64]


def closed_form_item(
    features: FeatureSet | None,
    job: Job,
    request: Request,
    bridge: PrototypeBridge,
    deadline: Deadline,
    noise: NoiseSource | None = None,
) -> tuple[str, Floats]:
    """Name and value of the answer to `query.closed_form`: the sum over patients of their statistics, float64, which is
    `closed_form_moments` without a mechanism and `statistics` with one.

    At most `selection.windows_per_patient` windows of each patient count. `features` is None where no patient can be
    used: zeros. Under a private mechanism each patient's vector has an L2 norm of at most R =
    `privacy.closed_form.clip`, so one patient added or removed moves the sum by at most R; one whose data raise or give
    no finite number counts as zeros. With `noise` Gaussian noise of deviation `noise_multiplier` R is added.
    """
    asked = job.privacy.closed_form
    total = np.zeros(closed_form_length(bridge.shape, job.privacy.gram))
    if features is not None:
        total += _sum(features, job, request, bridge, deadline)
    if noise is not None:
        if asked.noise_multiplier is None:
            raise ValueError("a job that travels holds the noise multiplier of the closed form")
        total += noise.normal(total.shape, asked.noise_multiplier * asked.clip)
    return ("statistics" if job.privacy.private else "closed_form_moments"), total


def _sum(features: FeatureSet, job: Job, request: Request, bridge: PrototypeBridge, deadline: Deadline) -> Floats:
    from bridge.closed_form import Regression

    m, l = request.positions  # noqa: E741
    regression = Regression.of(bridge.shape, bridge.arrays(), job.privacy.gram)
    rows = selection_rows(features, job)
    patients, inputs = features.table.patients, features.new_output(m)
    total = np.zeros(regression.length)
    for patient in np.unique(patients[rows]):
        deadline.check()
        own = rows[patients[rows] == patient]
        if not job.privacy.private:
            total += regression.patient(inputs[own], features.old_input_tokens(l, own))
            continue
        total += _clipped(regression, features, inputs[own], l, own, job.privacy.closed_form.clip)
    return total


def _clipped(
    regression: Regression,
    features: FeatureSet,
    inputs: NDArray[np.float32],
    l: int,  # noqa: E741
    own: NDArray[np.int64],
    clip: float,
) -> Floats:
    """A patient's clipped vector; whatever goes wrong with its data must not be seen, so it counts as zeros then."""
    try:
        with np.errstate(all="ignore"):
            return regression.patient(inputs, features.old_input_tokens(l, own), clip)
    except (CacheError, ModelsError):  # not of the patient's data
        raise
    except Exception:
        return np.zeros(regression.length)

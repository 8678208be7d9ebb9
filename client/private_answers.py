"""What a site answers under a private mechanism: the items of each message but describe, from a cohort of any size.

`features` is None where the cohort has no usable window. Every array has the shape and, without noise, the bound that
the plan declares, whoever is in the cohort.
"""

from __future__ import annotations

from typing import Any

from client.answers import Items
from client.features import FeatureSet
from client.private import Randomness
from client.requests import Request
from client.session import Session


def probe(session: Session, request: Request, features: FeatureSet | None, randomness: Randomness) -> Items:
    """Sums over groups of patients of their clipped scores, for each new position."""
    from client.private_statistics import probe_sums

    sizes = session.dimensions
    value = probe_sums(features, session.job, sizes.positions_new, sizes.classes, session.deadline, randomness.noise)
    return {"probe_sums": value}


def similarity(session: Session, request: Request, features: FeatureSet | None, randomness: Randomness) -> Items:
    """Sums over groups of patients of their clipped similarities, for each old position."""
    from client.private_statistics import similarity_sums

    assert request.input_position is not None
    value = similarity_sums(
        features,
        session.job,
        request.input_position,
        session.dimensions.positions_old,
        session.deadline,
        randomness.noise,
    )
    return {"similarity_sums": value}


def closed_form(session: Session, request: Request, features: FeatureSet | None, randomness: Randomness) -> Items:
    """The sum of the patients' clipped statistics."""
    from client.closed_form import closed_form_item
    from client.networks import broadcast_bridge

    bridge = broadcast_bridge(request)
    name, value = closed_form_item(features, session.job, request, bridge, session.deadline, randomness.noise)
    return {name: value}


def train(session: Session, request: Request, features: FeatureSet | None, randomness: Randomness) -> Items:
    """Noised local steps, or the sum of clipped gradients at the broadcast parameters; and the public weight."""
    from client.networks import broadcast_bridge, old_encoder
    from client.private_training import private_update

    site, job = session.site, session.job
    bridge = broadcast_bridge(request)
    result = private_update(site, features, job, request, bridge, old_encoder(site), randomness, session.deadline)
    items: dict[str, Any] = {f"update.{name}": value for name, value in result.update.items()}
    return items | {"weight": job.sites.weight(site.name)}


def evaluate(session: Session, request: Request, features: FeatureSet | None, randomness: Randomness) -> Items:
    """The sum of the patients' scaled confusion tables."""
    from client.networks import inference_chain
    from client.private_evaluation import confusion_sums

    multiplier = session.job.privacy.metrics.noise_multiplier
    assert multiplier is not None  # the plan was checked
    chain = inference_chain(session.site, request)
    value = confusion_sums(features, chain, session.dimensions.classes, randomness.noise, multiplier)
    return {"confusion_sums": value}

"""What a site answers without a privacy mechanism: the items of each message but describe."""

from __future__ import annotations

from typing import Any

from client.requests import Request
from client.session import Session

Items = dict[str, Any]


def probe(session: Session, request: Request) -> Items:
    """Scores or moments of the new encoder's positions."""
    from client.statistics import probe_item

    sizes = session.dimensions
    name, value = probe_item(session.pairs(), session.job, sizes.positions_new, sizes.classes, session.deadline)
    return {name: value}


def similarity(session: Session, request: Request) -> Items:
    """How alike each old position is to the chosen new one."""
    from client.statistics import similarity_item

    assert request.input_position is not None
    positions = session.dimensions.positions_old
    name, value = similarity_item(session.pairs(), session.job, request.input_position, positions, session.deadline)
    return {name: value}


def closed_form(session: Session, request: Request) -> Items:
    """The sufficient statistics of the closed form, exact."""
    from client.closed_form import closed_form_item
    from client.networks import broadcast_bridge

    name, value = closed_form_item(session.pairs(), session.job, request, broadcast_bridge(request), session.deadline)
    return {name: value}


def train(session: Session, request: Request) -> Items:
    """The update of local training, the equal or public weight, and the loss where the policy permits it."""
    from client.networks import broadcast_bridge, old_encoder
    from client.training import train_update

    site, job = session.site, session.job
    bridge = broadcast_bridge(request)
    result = train_update(session.pairs(), job, site.name, request, bridge, old_encoder(site), session.deadline)
    items: Items = {f"update.{name}": value for name, value in result.update.items()}
    items |= {"weight": job.sites.weight(site.name)}
    if session.policy.permits("train_loss"):
        items |= {"train_loss": result.loss}
    return items


def evaluate(session: Session, request: Request) -> Items:
    """Confusion counts of the broadcast bridge on the validation or test patients, as far as permitted."""
    from client.evaluation import confusions, group_features, permitted_confusions
    from client.networks import inference_chain

    assert request.split is not None
    names = permitted_confusions(session.policy)
    features = group_features(session, request.split)
    chain = inference_chain(session.site, request)
    return dict(confusions(features, chain, session.dimensions.classes, session.policy, names))

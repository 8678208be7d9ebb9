"""The ClientApp: what a site answers to a coordinator. Everything leaves through the outbox, errors as codes alone.

Importing this module loads neither torch nor a recording: each message may be a fresh process, and most refusals need
neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from bridge.errors import FedbridgeError
from bridge.messages import Dimensions, ReasonCode
from client.audit import AuditLog
from client.outbox import Outbox
from client.redact import reason_of, redact
from client.requests import read_config
from client.session import Session, admit, open_house, open_session
from client.sitelog import log_error

if TYPE_CHECKING:
    from client.features import FeatureSet

app = ClientApp(mods=[redact])


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Whether the site can take part: yes or no, its agreed name, and a reason code. No count, no measure."""
    read_config(message)
    site, policy = open_house(context)
    reason = ReasonCode.OK
    try:
        for problem in _pairs(admit(site, policy, context)).problems:
            log_error(site.log_path, message.metadata.message_type, "FILE_LEFT_OUT", problem.error)
    except FedbridgeError as error:
        reason = reason_of(error)
        log_error(site.log_path, message.metadata.message_type, reason.name, error)
    outbox = Outbox(
        message.metadata.message_type,
        Dimensions(positions_new=0, positions_old=0, classes=0),
        policy,
        AuditLog(site.audit_path),
        str(message.metadata.run_id),
    )
    outbox.add("site", site.name)
    outbox.add("can_take_part", reason is ReasonCode.OK)
    outbox.add("reason", int(reason))
    return Message(outbox.reply_content(), reply_to=message)


@app.query("probe")
def probe(message: Message, context: Context) -> Message:
    """Stage 1 of the selection: scores or moments of the new encoder's positions."""
    from client.statistics import probe_item

    session = open_session(context)
    request = session.request(message)
    sizes = session.dimensions
    name, value = probe_item(_pairs(session), session.job, sizes.positions_new, sizes.classes, session.deadline)
    return session.reply(message, request, {name: value})


@app.query("similarity")
def similarity(message: Message, context: Context) -> Message:
    """Stage 2 of the selection: how alike each old position is to the chosen new one."""
    from client.statistics import similarity_item

    session = open_session(context)
    request = session.request(message)
    assert request.input_position is not None
    name, value = similarity_item(
        _pairs(session), session.job, request.input_position, session.dimensions.positions_old, session.deadline
    )
    return session.reply(message, request, {name: value})


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training: the update, the equal or public weight, and the loss where the policy permits it."""
    from client.networks import old_encoder
    from client.training import train_update

    session = open_session(context)
    request = session.request(message)
    pairs = _pairs(session)
    site, job = session.site, session.job
    result = train_update(pairs, job, site.name, request, old_encoder(site), session.deadline)
    items: dict[str, Any] = {f"update.{name}": value for name, value in result.update.items()}
    items |= {"weight": job.sites.weight(site.name)}
    if session.policy.permits("train_loss"):
        items |= {"train_loss": result.loss}
    return session.reply(message, request, items)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Confusion counts of the broadcast bridge on the site's validation or test patients, as far as permitted."""
    from client.evaluation import confusions, group_features, permitted_confusions
    from client.networks import inference_chain

    session = open_session(context)
    request = session.request(message)
    assert request.split is not None
    names = permitted_confusions(session.policy)
    _one_thread()
    features = group_features(session, request.split)
    chain = inference_chain(session.site, request)
    found = confusions(features, chain, session.dimensions.classes, session.policy, names)
    return session.reply(message, request, dict(found))


def _pairs(session: Session) -> FeatureSet:
    """The paired windows' features, computed with one torch thread."""
    _one_thread()
    return session.pairs()


def _one_thread() -> None:
    """Same request, same bits: one torch thread a site."""
    import torch

    torch.set_num_threads(1)

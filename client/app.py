"""The ClientApp: what a site answers to a coordinator. Everything leaves through the outbox, errors as codes alone.

Importing this module loads neither torch nor a recording: each message may be a fresh process, and most refusals need
neither.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from bridge.errors import FedbridgeError
from bridge.messages import Dimensions, ReasonCode
from client.audit import AuditLog
from client.errors import NotAcceptedError
from client.outbox import Outbox
from client.policy import Policy
from client.redact import reason_of, redact
from client.requests import read_config
from client.session import Session, admit, open_house, open_session
from client.site import Site
from client.sitelog import log_error

app = ClientApp(mods=[redact])


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Whether the site can take part: yes or no, its agreed name, and a reason code. No count, no measure."""
    read_config(message)
    site, policy = open_house(context)
    try:
        session = admit(site, policy, context)
        with session.working():
            _prepare(session, message)
    except FedbridgeError as error:
        return _declined(site, policy, message, error)
    try:
        with session.working(), session.leaving():
            return _description(site, policy, message, ReasonCode.OK)
    except NotAcceptedError as error:
        return _declined(site, policy, message, error)


def _declined(site: Site, policy: Policy, message: Message, error: FedbridgeError) -> Message:
    """The reply that a site can't take part; the error itself goes to the site's own log."""
    reason = reason_of(error)
    log_error(site.log_path, message.metadata.message_type, reason.name, error)
    return _description(site, policy, message, reason)


def _description(site: Site, policy: Policy, message: Message, reason: ReasonCode) -> Message:
    """The reply to describe, through the outbox."""
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


def _prepare(session: Session, message: Message) -> None:
    """Raise what keeps the site from taking part in an admitted job.

    Under a private mechanism that is the budget alone: whether it has patients enough was declared when it enrolled,
    and no answer may depend on how many there are.
    """
    _one_thread()
    if session.job.privacy.private:
        from client.private import reserved

        with reserved(session):
            return
    for problem in session.pairs().problems:
        log_error(session.site.log_path, message.metadata.message_type, "FILE_LEFT_OUT", problem.error)


@app.query("probe")
def probe(message: Message, context: Context) -> Message:
    """Stage 1 of the selection: what the site says of the new encoder's positions."""
    return _answer("probe", message, context)


@app.query("similarity")
def similarity(message: Message, context: Context) -> Message:
    """Stage 2 of the selection: how alike each old position is to the chosen new one."""
    return _answer("similarity", message, context)


@app.query("closed_form")
def closed_form(message: Message, context: Context) -> Message:
    """The sufficient statistics of the bridge that a ridge regression gives, in one message."""
    return _answer("closed_form", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of training: the update and the equal or public weight."""
    return _answer("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """What the broadcast bridge makes of the site's validation or test patients, as far as permitted."""
    return _answer("evaluate", message, context)


def _answer(kind: str, message: Message, context: Context) -> Message:
    """The items of `client.answers`, or under a private mechanism those of `client.private_answers` by the ledger."""
    session = open_session(context)
    request = session.request(message)
    _one_thread()
    with session.working():
        if session.job.privacy.private:
            from client import private, private_answers

            return private.private_reply(session, message, request, getattr(private_answers, kind))
        from client import answers

        return session.reply(message, request, getattr(answers, kind)(session, request))


def _one_thread() -> None:
    """Same request, same bits: one torch thread a site."""
    import torch

    torch.set_num_threads(1)

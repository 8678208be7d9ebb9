"""The outermost layer of a site's app: whatever goes wrong inside leaves as a reason code and its fixed sentence.

Flower sends the text of an exception to the server word for word, so nothing may get past this mod.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from flwr.app import Context, Error, Message

from bridge.errors import ConfigError, ItemError, PositionError, SelectionError, WeightsError, WindowError
from bridge.messages import SENTENCES, ReasonCode
from client.audit import AuditLog, Entry
from client.errors import SiteError
from client.locate import site_paths
from client.sitelog import log_error

_CODES: tuple[tuple[type[BaseException], ReasonCode], ...] = (
    (ConfigError, ReasonCode.SITE_MISCONFIGURED),
    (WeightsError, ReasonCode.WEIGHTS_MISSING),
    (WindowError, ReasonCode.DATA_UNUSABLE),
    (SelectionError, ReasonCode.DATA_UNUSABLE),
    (PositionError, ReasonCode.MESSAGE_INVALID),
    (ItemError, ReasonCode.ITEM_REFUSED),
)

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def redact(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Answer, or reply `Error(code=ReasonCode, reason=SENTENCES[code])`; the details go to the site's own log."""
    try:
        return call_next(message, context)
    except (Exception, SystemExit) as error:
        code = reason_of(error)
        try:
            _record(message, context, code, error)
        except Exception as failure:  # the log and the audit are the site's; the server gets the code in any case
            log_error(None, message.metadata.message_type, code.name, failure)
        return Message(Error(code=int(code), reason=SENTENCES[code]), reply_to=message)


def reason_of(error: BaseException) -> ReasonCode:
    """The code that the server may learn of an error."""
    if isinstance(error, SiteError):
        return error.reason
    if isinstance(error, OSError) and error.errno in _DISK:
        return ReasonCode.STORAGE
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return ReasonCode.INTERNAL


def _record(message: Message, context: Context, code: ReasonCode, error: BaseException) -> None:
    """The error into the site's log, the refusal into its audit log, as far as the site can be found."""
    paths = site_paths(context)
    log_error(paths.log if paths else None, message.metadata.message_type, code.name, error)
    if paths is not None and paths.audit is not None:
        entry = Entry(
            run=str(message.metadata.run_id),
            message=message.metadata.message_type,
            event="refused",
            purpose=f"answered by {code.name} alone",
        )
        AuditLog(paths.audit).append([entry])

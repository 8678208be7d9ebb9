"""The schema of everything that may leave a site, and of what the server asks.

Client and server both read this module and neither trusts the other: the site's outbox refuses what does not fit before
it leaves, the server's replies check refuses what does not fit before it is used. Nothing else has a name, so nothing
else can leave. Imports no torch.

How items travel in Flower's records (one name, one kind): arrays in the ArrayRecord `arrays`, numbers in the
MetricRecord `metrics`, texts and flags in the ConfigRecord `config`. A record without items is left out, except that a
train reply always has exactly one ArrayRecord and one MetricRecord, as Flower's strategies demand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from bridge.encoders.cards import EncoderCard, HeadCard
from bridge.errors import ItemError
from bridge.job import Job
from bridge.job_privacy import GramName
from bridge.projection import projected_width
from bridge.shape import BridgeShape

ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"

DESCRIBE, PROBE, SIMILARITY, TRAIN, EVALUATE = "query.describe", "query.probe", "query.similarity", "train", "evaluate"
CLOSED_FORM = "query.closed_form"
MESSAGES = (DESCRIBE, PROBE, SIMILARITY, CLOSED_FORM, TRAIN, EVALUATE)

SITE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")
"""A site's agreed name: it leaves the site, so it is a plain word and no place for anything else."""

Kind = Literal["array", "number", "text", "flag"]


class ReasonCode(IntEnum):
    """Why a site can't or won't: all that the server learns of an error. Flower's own codes stay below 100."""

    OK = 0
    INTERNAL = 100
    JOB_INVALID = 101
    COORDINATOR_UNKNOWN = 102
    POLICY_FORBIDS = 103
    MECHANISM_FORBIDDEN = 104
    TOO_MANY_ROUNDS = 105
    TOO_FEW_PATIENTS = 106
    WEIGHTS_DIFFER = 107
    WEIGHTS_MISSING = 108
    DATA_UNUSABLE = 109
    SITE_MISCONFIGURED = 110
    MESSAGE_INVALID = 111
    ITEM_REFUSED = 112
    GROUP_TOO_SMALL = 113
    STORAGE = 114
    TOO_SLOW = 115
    PRIVACY_TOO_WEAK = 116
    BUDGET_SPENT = 117
    ASKED_AGAIN = 118
    LEDGER_UNUSABLE = 119
    CODE_NOT_ACCEPTED = 120
    JOB_NOT_ACCEPTED = 121
    STUDY_WITHDRAWN = 122
    ASKED_TOO_OFTEN = 123
    STUDY_UNUSABLE = 124


SENTENCES: MappingProxyType[ReasonCode, str] = MappingProxyType(
    {
        ReasonCode.OK: "The site can take part.",
        ReasonCode.INTERNAL: "The site met an error of its own; its local log tells more.",
        ReasonCode.JOB_INVALID: "The site can't read the job.",
        ReasonCode.COORDINATOR_UNKNOWN: "The site's policy does not list this coordinator.",
        ReasonCode.POLICY_FORBIDS: "The site's policy does not permit what was asked.",
        ReasonCode.MECHANISM_FORBIDDEN: "The site's policy does not permit this privacy mechanism.",
        ReasonCode.TOO_MANY_ROUNDS: "The site's policy permits fewer rounds.",
        ReasonCode.TOO_FEW_PATIENTS: "The site has fewer patients than its own policy demands.",
        ReasonCode.WEIGHTS_DIFFER: "The site's models are not those of the job.",
        ReasonCode.WEIGHTS_MISSING: "The site's models are missing or damaged.",
        ReasonCode.DATA_UNUSABLE: "The site's recordings can't be used as they are.",
        ReasonCode.SITE_MISCONFIGURED: "The site's own configuration can't be used.",
        ReasonCode.MESSAGE_INVALID: "The message is not one that a site answers.",
        ReasonCode.ITEM_REFUSED: "The site's outbox refused an item of the reply.",
        ReasonCode.GROUP_TOO_SMALL: "The group of patients is smaller than the site's policy permits for metrics.",
        ReasonCode.STORAGE: "The site can't write to its disk.",
        ReasonCode.TOO_SLOW: "The message took longer than the site's policy permits.",
        ReasonCode.PRIVACY_TOO_WEAK: "The site's policy demands stronger privacy than the job offers.",
        ReasonCode.BUDGET_SPENT: "The patients' privacy budget does not suffice for the job.",
        ReasonCode.ASKED_AGAIN: "The message was begun before and its reply is lost, or its plan is used up.",
        ReasonCode.LEDGER_UNUSABLE: "The site's privacy ledger can't be used.",
        ReasonCode.CODE_NOT_ACCEPTED: "The site has not accepted the code of this run.",
        ReasonCode.JOB_NOT_ACCEPTED: "The site has accepted no study with this job.",
        ReasonCode.STUDY_WITHDRAWN: "The site has withdrawn from this study.",
        ReasonCode.ASKED_TOO_OFTEN: "The site has answered this question as often as the study says.",
        ReasonCode.STUDY_UNUSABLE: "The site's record of the study it accepted can't be used.",
    }
)


@dataclass(frozen=True)
class Dimensions:
    """The public numbers that item shapes are written in; the same at the server and at every site."""

    positions_new: int
    positions_old: int
    classes: int
    probe_moments: int = 0
    gram: GramName = "released"
    """What the closed form's statistics hold of the Gram matrix."""
    bridge: BridgeShape | None = None
    """The bridge's sizes, once the positions are known."""

    @classmethod
    def of(
        cls, job: Job, old: EncoderCard, new: EncoderCard, head: HeadCard, positions: tuple[int, int] | None = None
    ) -> Dimensions:
        """From the job and the cards; the bridge's sizes need the chosen `(m, l)`."""
        classes, folds = len(head.classes), job.selection.folds
        return cls(
            positions_new=new.positions,
            positions_old=old.positions,
            classes=classes,
            probe_moments=sum(folds * moments_length(width, classes) for width in probe_widths(job, new)),
            gram=job.privacy.gram,
            bridge=None if positions is None else BridgeShape.of(job.bridge, old, new, positions),
        )

    def size(self, term: str) -> int:
        """One term of an item's shape: a whole number, a field, or a number of the bridge (0 before it is known)."""
        if term.isdigit():
            return int(term)
        if hasattr(self, term):
            return int(getattr(self, term))
        if term == "statistics":
            return 0 if self.bridge is None else closed_form_length(self.bridge, self.gram)
        return 0 if self.bridge is None else int(getattr(self.bridge, term))


def closed_form_length(shape: BridgeShape, gram: GramName) -> int:
    """Numbers in the closed form's statistics: a weight, the cross moments of A's inputs with the coefficients of the
    old tokens, and of the inputs' Gram matrix nothing (`public`), the means and squares of all inputs but the one
    (`diagonal`), or the upper triangle (`released`); in this order."""
    rows = shape.rows
    of_gram = {"public": 0, "diagonal": 2 * (rows - 1), "released": rows * (rows + 1) // 2}
    return 1 + rows * shape.columns + of_gram[gram]


def probe_widths(job: Job, new: EncoderCard) -> tuple[int, ...]:
    """How many features the probe's moments are about at each new position, after the projection of wide ones."""
    return tuple(projected_width(width, job.selection.width_limit) for _, width in new.layouts_out)


def moments_length(width: int, classes: int) -> int:
    """Numbers in one fold's probe moments at one position.

    With features X extended by a one and one-hot pseudo-labels Y: the upper triangle of X'X (its corner is the number
    of windows), and X'Y (its last row holds the class counts; Y'Y of one-hot labels is the number of windows again).
    """
    extended = width + 1
    return extended * (extended + 1) // 2 + extended * classes


@dataclass(frozen=True)
class Item:
    """One thing that may leave a site. `shape` is written in terms of `Dimensions.size`."""

    name: str
    message: str
    kind: Kind
    purpose: str
    shape: tuple[str, ...] = ()
    dtype: str = ""
    low: float = -np.inf
    high: float = np.inf
    opt_in: bool = False

    def resolved_shape(self, dimensions: Dimensions) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(dimensions.size(term) for term in self.shape)


_UPDATE_BOUND = 1e6
_COUNT_BOUND = 2.0**53

_ITEMS: tuple[Item, ...] = (
    Item("site", DESCRIBE, "text", "order and report replies by the site's agreed name"),
    Item("can_take_part", DESCRIBE, "flag", "know whom to ask"),
    Item("reason", DESCRIBE, "number", "tell why a site can't take part", low=0, high=199),
    Item("probe_scores", PROBE, "array", "choose the input position", ("positions_new",), "float64", 0, 1),
    Item("probe_moments", PROBE, "array", "choose the input position", ("probe_moments",), "float64", opt_in=True),
    Item("similarity_scores", SIMILARITY, "array", "choose the output position", ("positions_old",), "float64", -1, 1),
    Item(
        "similarity_moments",
        SIMILARITY,
        "array",
        "choose the output position",
        ("positions_old", "3"),
        "float64",
        opt_in=True,
    ),
    Item("probe_sums", PROBE, "array", "choose the input position under privacy", ("positions_new",), "float64"),
    Item(
        "similarity_sums",
        SIMILARITY,
        "array",
        "choose the output position under privacy",
        ("positions_old",),
        "float64",
    ),
    Item("statistics", CLOSED_FORM, "array", "solve for the bridge under privacy", ("statistics",), "float64"),
    Item(
        "closed_form_moments",
        CLOSED_FORM,
        "array",
        "solve for the bridge in one step",
        ("statistics",),
        "float64",
        opt_in=True,
    ),
    Item("update.A", TRAIN, "array", "train the bridge", ("rows", "rank"), "float32", -_UPDATE_BOUND, _UPDATE_BOUND),
    Item(
        "update.B",
        TRAIN,
        "array",
        "train the bridge",
        ("rank", "columns"),
        "float32",
        -_UPDATE_BOUND,
        _UPDATE_BOUND,
    ),
    Item(
        "update.P",
        TRAIN,
        "array",
        "train the bridge",
        ("prototypes", "width_old"),
        "float32",
        -_UPDATE_BOUND,
        _UPDATE_BOUND,
    ),
    Item("weight", TRAIN, "number", "average with equal or public weights", low=0, high=1),
    Item("train_loss", TRAIN, "number", "follow the training", low=-_UPDATE_BOUND, high=_UPDATE_BOUND, opt_in=True),
    Item(
        "confusion.bridge",
        EVALUATE,
        "array",
        "labels against the bridge",
        ("classes", "classes"),
        "int64",
        0,
        _COUNT_BOUND,
        True,
    ),
    Item(
        "confusion.teacher",
        EVALUATE,
        "array",
        "labels against the teacher",
        ("classes", "classes"),
        "int64",
        0,
        _COUNT_BOUND,
        True,
    ),
    Item(
        "confusion.agreement",
        EVALUATE,
        "array",
        "pseudo-labels against the bridge",
        ("classes", "classes"),
        "int64",
        0,
        _COUNT_BOUND,
        True,
    ),
    Item(
        "confusion_sums",
        EVALUATE,
        "array",
        "judge bridge and teacher under privacy",
        ("3", "classes", "classes"),
        "float64",
    ),
)

ITEMS: MappingProxyType[str, Item] = MappingProxyType({item.name: item for item in _ITEMS})
DEFAULT_ITEMS = tuple(item.name for item in _ITEMS if not item.opt_in)
UPDATE_ITEMS = ("update.A", "update.B", "update.P")
PRIVATE_ITEMS = ("probe_sums", "similarity_sums", "statistics", *UPDATE_ITEMS, "confusion_sums")
"""What leaves under a private mechanism, beside what describe answers and the weight."""
CONFUSION_ITEMS = ("confusion.bridge", "confusion.teacher", "confusion.agreement")


def declared(name: str, message: str) -> Item:
    """The item of that name in that message; raises `ItemError` where there is none."""
    item = ITEMS.get(name)
    if item is None or item.message != message:
        known = ", ".join(each.name for each in _ITEMS if each.message == message) or "none"
        raise ItemError(
            f"item '{name}' is not declared for '{message}'", why=f"declared there: {known}", fix="leave it out"
        )
    return item


def check_item(item: Item, value: Any, dimensions: Dimensions) -> None:
    """Raise `ItemError` unless `value` is exactly what `item` declares: kind, dtype, shape, finite, within its bound.

    Errors name the item, the shape and the bound, never the value.
    """
    if item.kind == "array":
        _check_array(item, value, dimensions)
    elif item.kind == "number":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _refused(item, f"it is a {type(value).__name__}", "a number is declared")
        if not np.isfinite(value) or not item.low <= value <= item.high:
            raise _refused(item, "it is not finite or out of its bound", f"[{item.low:g}, {item.high:g}] is declared")
    elif item.kind == "flag":
        if not isinstance(value, bool):
            raise _refused(item, f"it is a {type(value).__name__}", "yes or no is declared")
    elif not isinstance(value, str) or not SITE_NAME.match(value):
        raise _refused(item, "it is not a plain name", "letters, digits, '_', '.', '-', at most 63, are declared")


def _check_array(item: Item, value: Any, dimensions: Dimensions) -> None:
    shape = item.resolved_shape(dimensions)
    if not isinstance(value, np.ndarray):
        raise _refused(item, f"it is a {type(value).__name__}", "an array is declared")
    if value.dtype.name != item.dtype:
        raise _refused(item, f"its dtype is {value.dtype.name}", f"{item.dtype} is declared")
    if value.shape != shape:
        raise _refused(item, f"its shape is {value.shape}", f"{shape} is declared")
    if not np.isfinite(value).all():
        raise _refused(item, "it holds NaN or infinity", "finite numbers are declared")
    if value.size and (value.min() < item.low or value.max() > item.high):
        raise _refused(item, "it goes beyond its bound", f"[{item.low:g}, {item.high:g}] is declared")


def _refused(item: Item, why: str, declares: str) -> ItemError:
    return ItemError(
        f"item '{item.name}' of '{item.message}' is refused: {why}", why=declares, fix="see docs/reference/messages.md"
    )

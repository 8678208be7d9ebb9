"""The schema of what may leave a site: each item passes as declared and is refused by name otherwise."""

from __future__ import annotations

import sys
from subprocess import run

import numpy as np
import pytest

from bridge.encoders.cards import EncoderCard, HeadCard
from bridge.errors import ItemError
from bridge.job import BridgeJob, Job, Models, SelectionJob
from bridge.messages import (
    CLOSED_FORM,
    CONFUSION_ITEMS,
    DEFAULT_ITEMS,
    DESCRIBE,
    EVALUATE,
    ITEMS,
    MESSAGES,
    PROBE,
    SENTENCES,
    SIMILARITY,
    TRAIN,
    UPDATE_ITEMS,
    Dimensions,
    ReasonCode,
    check_item,
    declared,
    moments_length,
    probe_widths,
)
from bridge.shape import BridgeShape
from bridge.windows import Preprocessing, WindowSpec

DIMENSIONS = Dimensions(
    positions_new=5,
    positions_old=4,
    classes=3,
    probe_moments=40,
    bridge=BridgeShape(width_new=8, rank=2, tokens_old=10, prototypes=6, width_old=7),
)

GOOD = {
    "site": "hospital-3",
    "can_take_part": True,
    "reason": 106,
    "probe_scores": np.linspace(0, 1, 5),
    "probe_moments": np.arange(40.0) * -1e12,
    "probe_sums": np.linspace(-30, 30, 5),
    "similarity_sums": np.full(4, 1e9),
    "statistics": np.full(1 + 8 * 60 + 8 * 9 // 2, -3.5),
    "closed_form_moments": np.zeros(1 + 8 * 60 + 8 * 9 // 2),
    "confusion_sums": np.full((3, 3, 3), -0.5),
    "similarity_scores": np.array([-1.0, 0.0, 0.5, 1.0]),
    "similarity_moments": np.full((4, 3), -7.5),
    "update.A": np.full((8, 2), -1e6, np.float32),
    "update.B": np.full((2, 60), 1e6, np.float32),
    "update.P": np.zeros((6, 7), np.float32),
    "weight": 1.0,
    "train_loss": 0.25,
    "confusion.bridge": np.full((3, 3), 9, np.int64),
    "confusion.teacher": np.zeros((3, 3), np.int64),
    "confusion.agreement": np.eye(3, dtype=np.int64),
}
ARRAYS = [name for name, value in GOOD.items() if isinstance(value, np.ndarray)]
NUMBERS = ["reason", "weight", "train_loss"]


def refuse(name: str, value: object, why: str) -> None:
    with pytest.raises(ItemError) as caught:
        check_item(ITEMS[name], value, DIMENSIONS)
    assert f"'{name}'" in str(caught.value)
    assert why in str(caught.value)


def test_every_declared_item_passes_as_declared() -> None:
    assert set(GOOD) == set(ITEMS)
    for name, value in GOOD.items():
        check_item(ITEMS[name], value, DIMENSIONS)


def test_the_closed_list_is_that_of_the_design() -> None:
    by_message = {message: [i.name for i in ITEMS.values() if i.message == message] for message in MESSAGES}
    assert by_message == {
        DESCRIBE: ["site", "can_take_part", "reason"],
        PROBE: ["probe_scores", "probe_moments", "probe_sums"],
        SIMILARITY: ["similarity_scores", "similarity_moments", "similarity_sums"],
        CLOSED_FORM: ["statistics", "closed_form_moments"],
        TRAIN: [*UPDATE_ITEMS, "weight", "train_loss"],
        EVALUATE: [*CONFUSION_ITEMS, "confusion_sums"],
    }
    opt_in = {name for name, item in ITEMS.items() if item.opt_in}
    assert opt_in == {"probe_moments", "similarity_moments", "closed_form_moments", "train_loss", *CONFUSION_ITEMS}
    assert set(DEFAULT_ITEMS) == set(ITEMS) - opt_in
    assert all(item.purpose for item in ITEMS.values())


@pytest.mark.parametrize(
    ("name", "message"), [("patients", TRAIN), ("probe_scores", TRAIN), ("weight", DESCRIBE), ("", EVALUATE)]
)
def test_an_undeclared_item_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ItemError, match=f"item '{name}' is not declared for '{message}'"):
        declared(name, message)


def test_a_declared_item_is_found_in_its_message_only() -> None:
    for name, item in ITEMS.items():
        assert declared(name, item.message) is item


@pytest.mark.parametrize("name", ARRAYS)
def test_a_misshapen_or_oversized_array_is_refused_by_name(name: str) -> None:
    good = GOOD[name]
    refuse(name, good[:-1], "its shape is")
    refuse(name, np.concatenate([good, good]), "its shape is")
    refuse(name, good[None], "its shape is")
    refuse(name, good.ravel()[:1], "its shape is")
    if good.ndim == 2 and good.shape[0] != good.shape[1]:
        refuse(name, good.T, "its shape is")


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_another_dtype_is_refused_by_name(name: str) -> None:
    good = GOOD[name]
    for dtype in {"float16", "float32", "float64", "int64", "object"} - {good.dtype.name}:
        refuse(name, np.zeros(good.shape).astype(dtype), "its dtype is")
    refuse(name, good.tolist(), "it is a list")
    refuse(name, 1.0, "it is a float")
    refuse(name, None, "it is a NoneType")


@pytest.mark.parametrize("name", [name for name in ARRAYS if GOOD[name].dtype.kind == "f"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_array_that_is_not_finite_is_refused_by_name(name: str, bad: float) -> None:
    value = GOOD[name].copy()
    value.flat[-1] = bad
    refuse(name, value, "NaN or infinity")


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("probe_scores", 1.001),
        ("probe_scores", -0.001),
        ("similarity_scores", 1.01),
        ("similarity_scores", -1.01),
        ("update.A", 1.1e6),
        ("update.B", -1.1e6),
        ("update.P", 2e6),
        ("confusion.bridge", -1),
        ("confusion.teacher", 2**54),
        ("confusion.agreement", -5),
    ],
)
def test_an_array_out_of_its_bound_is_refused_by_name(name: str, bad: float) -> None:
    value = GOOD[name].copy()
    value.flat[0] = bad
    refuse(name, value, "beyond its bound")


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite_bounded_and_numbers(name: str) -> None:
    for bad in (np.nan, np.inf, -np.inf, 1e7, -1e7):
        refuse(name, bad, "not finite or out of its bound")
    for bad in (True, "1", None, np.ones(1), [1.0]):
        refuse(name, bad, "a number is declared")
    if name == "weight":
        for bad in (-0.1, 1.1):
            refuse(name, bad, "[0, 1] is declared")


def test_flags_and_names_are_nothing_else() -> None:
    for bad in (1, "yes", None, np.True_):
        refuse("can_take_part", bad, "yes or no is declared")
    for bad in ("", "two words", "p/ath", "a" * 64, "-x", "é", "a\n", 3, b"site", None):
        refuse("site", bad, "not a plain name")
    check_item(ITEMS["site"], "a" * 63, DIMENSIONS)


def test_refusals_never_hold_the_value() -> None:
    secret = 123456.789
    for name, value in (("weight", secret), ("probe_scores", np.full(5, secret)), ("site", "Jane Doe 1950")):
        with pytest.raises(ItemError) as caught:
            check_item(ITEMS[name], value, DIMENSIONS)
        assert "123456" not in str(caught.value)
        assert "Jane" not in str(caught.value)


def test_every_reason_has_its_fixed_sentence() -> None:
    assert set(SENTENCES) == set(ReasonCode)
    assert all(code == ReasonCode.OK or 100 <= code <= ITEMS["reason"].high for code in ReasonCode)
    assert len(set(SENTENCES.values())) == len(SENTENCES)


def test_dimensions_come_from_the_job_and_the_cards() -> None:
    def encoder(layouts: tuple[tuple[int, int], ...]) -> EncoderCard:
        return EncoderCard(
            family="compact",
            window=WindowSpec(modality="ECG", channels=("II",), rate_hz=100, samples=1000),
            preprocessing=Preprocessing(),
            layouts_in=layouts,
            layouts_out=tuple((tokens, width + 1) for tokens, width in layouts),
            parameters=1,
            weights_sha256="0",
        )

    old, new = encoder(((20, 5), (10, 7))), encoder(((9, 2), (8, 3), (7, 4)))
    head = HeadCard(classes=("a", "b"), width=8, old_encoder="x", weights_sha256="0")
    job = Job(
        name="j",
        models=Models(old_encoder="x", new_encoder="y", task_head="z"),
        selection=SelectionJob(folds=4),
        bridge=BridgeJob(rank=2, prototypes=3),
    )
    before = Dimensions.of(job, old, new, head)
    assert before.probe_moments == 4 * sum((w + 1) * (w + 2) // 2 + (w + 1) * 2 for w in (3, 4, 5))
    assert (before.positions_new, before.positions_old, before.classes) == (3, 2, 2)
    narrow = job.model_copy(update={"selection": SelectionJob(folds=4, width_limit=4)})
    sizes = [3, 4, 4]
    assert probe_widths(narrow, new) == tuple(sizes)
    expected = 4 * sum((w + 1) * (w + 2) // 2 + (w + 1) * 2 for w in sizes)
    assert Dimensions.of(narrow, old, new, head).probe_moments == expected
    after = Dimensions.of(job, old, new, head, positions=(2, 1))
    shapes = {name: ITEMS[name].resolved_shape(after) for name in UPDATE_ITEMS}
    assert shapes == {"update.A": (5, 2), "update.B": (2, 30), "update.P": (3, 7)}


def test_moments_length_counts_triangle_and_cross_products() -> None:
    for width in (1, 2, 64):
        for classes in (2, 5):
            extended = np.ones((3, width + 1))
            cross = extended.T @ np.ones((3, classes))
            assert moments_length(width, classes) == len(np.triu_indices(width + 1)[0]) + cross.size


def test_the_schema_needs_neither_torch_nor_flower() -> None:
    code = "import sys, bridge.messages; print([m for m in ('torch', 'flwr') if m in sys.modules])"
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

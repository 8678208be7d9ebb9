"""Garbage of each kind from one site of a real run: it costs that site its turn, and nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from bridge.messages import ITEMS, Dimensions
from bridge.shape import BridgeShape
from server.errors import ReplyError, RunError
from server.record import read_record
from server.replies import Expected, content_bytes, read_reply
from tests.server.conftest import Models
from tests.server.wire import Behaviour, Site, WireGrid, arrays_of, over_the_wire, run_server, site_update

NAMES = ("alpha", "beta", "gamma")
SITES = {"minimum": 2, "wait_seconds": 5, "timeout_seconds": 5, "retries": 1, "expected": NAMES}
SECRET = "patient-0815-Mustermann"


def edit(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Behaviour:
    """A site that answers honestly but for what `change` does to its arrays and metrics."""

    def behave(site: Site, message: Any, honest: RecordDict) -> RecordDict:
        arrays = {name: array.numpy() for name, array in honest.array_records["arrays"].items()}
        metrics = dict(honest.metric_records["metrics"])
        change(arrays, metrics)
        records: dict[str, Any] = {}
        records["arrays"] = ArrayRecord({n: a if isinstance(a, Array) else Array(a) for n, a in arrays.items()})
        records["metrics"] = MetricRecord(metrics)
        return RecordDict(records)

    return behave


def put(name: str, value: Any) -> Behaviour:
    return edit(lambda arrays, _: arrays.__setitem__(name, value))


def spoil(name: str, how: Callable[[np.ndarray], Any]) -> Behaviour:
    return edit(lambda arrays, _: arrays.__setitem__(name, how(arrays[name])))


def metric(name: str, value: Any) -> Behaviour:
    return edit(lambda _, metrics: metrics.__setitem__(name, value))


def also(name: str, record: Any) -> Behaviour:
    def behave(site: Site, message: Any, honest: RecordDict) -> RecordDict:
        honest[name] = record
        return honest

    return behave


def one_value(array: np.ndarray, value: float) -> np.ndarray:
    array.flat[array.size // 2] = value
    return array


def raw(dtype: str, shape: tuple[int, ...], data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def saved(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def lying_header(shape: str) -> bytes:
    """A numpy file that claims `shape` and holds eight bytes."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    header = text.encode() + b" " * (117 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 8


def pickled() -> bytes:
    return saved(np.array([{"a": 1}], dtype=object), allow_pickle=True)


GARBAGE: dict[str, tuple[Behaviour, str]] = {
    "extra array": (put(SECRET, np.zeros(3, np.float32)), "BAD_REPLY"),
    "array of another message": (put("probe_scores", np.zeros(3)), "BAD_REPLY"),
    "array missing": (edit(lambda arrays, _: arrays.__delitem__("update.P")), "BAD_REPLY"),
    "shape (1,) that would broadcast": (put("update.A", np.zeros(1, np.float32)), "BAD_REPLY"),
    "transposed": (spoil("update.A", lambda a: np.ascontiguousarray(a.T)), "BAD_REPLY"),
    "float64": (spoil("update.B", lambda a: a.astype(np.float64)), "BAD_REPLY"),
    "integers": (spoil("update.B", lambda a: a.astype(np.int32)), "BAD_REPLY"),
    "NaN": (spoil("update.P", lambda a: one_value(a, np.nan)), "BAD_REPLY"),
    "infinity": (spoil("update.P", lambda a: one_value(a, -np.inf)), "BAD_REPLY"),
    "beyond its bound": (spoil("update.P", lambda a: one_value(a, 2e6)), "BAD_REPLY"),
    "weight a billion": (metric("weight", 1e9), "BAD_REPLY"),
    "weight negative": (metric("weight", -1.0), "BAD_REPLY"),
    "weight zero": (metric("weight", 0.0), "BAD_REPLY"),
    "weight just not its own": (metric("weight", 0.5), "BAD_REPLY"),
    "weight NaN": (metric("weight", float("nan")), "BAD_REPLY"),
    "weight a list": (metric("weight", [1.0, 1.0]), "BAD_REPLY"),
    "weight missing": (edit(lambda _, metrics: metrics.__delitem__("weight")), "BAD_REPLY"),
    "loss infinite": (metric("train_loss", float("inf")), "BAD_REPLY"),
    "extra metric": (metric("num-examples", 512), "BAD_REPLY"),
    "two array records": (also("more", ArrayRecord({"x": Array(np.zeros(2))})), "BAD_REPLY"),
    "two metric records": (also("more", MetricRecord({"x": 1.0})), "BAD_REPLY"),
    "a text": (also("config", ConfigRecord({"comment": SECRET})), "BAD_REPLY"),
    "an empty record": (also("config", ConfigRecord({})), "BAD_REPLY"),
    "records exchanged": (also("metrics", ArrayRecord({"x": Array(np.zeros(2))})), "BAD_REPLY"),
    "nothing": (lambda *_: RecordDict(), "BAD_REPLY"),
    "bytes that are no array": (put("update.A", raw("float32", (16, 2), b"garbage" * 20)), "BAD_REPLY"),
    "no bytes": (put("update.A", raw("float32", (16, 2), b"")), "BAD_REPLY"),
    "cut short": (spoil("update.A", lambda a: raw("float32", (16, 2), saved(a)[:-4])), "BAD_REPLY"),
    "too long": (spoil("update.A", lambda a: raw("float32", (16, 2), saved(a) + b"more")), "BAD_REPLY"),
    "a pickle": (put("update.A", raw("object", (1,), pickled())), "BAD_REPLY"),
    "header claims terabytes": (put("update.A", raw("float32", (16, 2), lying_header("(999999999999,)"))), "BAD_REPLY"),
    "header claims the shape": (put("update.A", raw("float32", (16, 2), lying_header("(16, 2)"))), "BAD_REPLY"),
    "header is code": (put("update.A", raw("float32", (16, 2), lying_header("__import__('os')"))), "BAD_REPLY"),
    "another serialisation": (spoil("update.A", lambda a: raw("float32", (16, 2), saved(a), "torch")), "BAD_REPLY"),
    "silence": (lambda *_: None, "NO_REPLY"),
    "an exception's text": (lambda *_: Error(code=2, reason=f"ValueError: {SECRET}"), "FLOWER_2"),
    "policy forbids": (lambda *_: Error(code=103, reason=SECRET), "POLICY_FORBIDS"),
    "a code of its own": (lambda *_: Error(code=4711, reason=SECRET), "UNKNOWN_CODE"),
    "two replies that differ": (
        lambda site, message, honest: [honest, metric("train_loss", 0.125)(site, message, honest)],  # type: ignore[list-item]
        "BAD_REPLY",
    ),
}


def run(models: Models, folder: Path, bad: Behaviour | None, phase: str = "train 2", **job: Any) -> dict[str, Any]:
    members = [Site(name) for name in NAMES]
    if bad is not None:
        members[1].wrong[phase] = bad
    run_server(WireGrid(members, shuffle=5), folder, models.folder, models.job(**{"sites": SITES, **job}))
    return load_file(folder / "bridge" / "bridge.safetensors")


@pytest.mark.parametrize(("bad", "code"), GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_costs_the_site_its_turn(models: Models, tmp_path: Path, bad: Behaviour, code: str) -> None:
    kept = run(models, tmp_path / "run", bad, train={"rounds": 2}, evaluate={"final": False})
    record = read_record(tmp_path / "run")
    assert record.status == "completed"
    assert [each.sites for each in record.rounds] == [list(NAMES), ["alpha", "gamma"]]
    lost = {site.site: site.lost_turns for site in record.sites}
    assert lost == {"alpha": [], "beta": [f"round 2: {code}"], "gamma": []}
    # The rest of the round is the mean of the two others.
    newest = load_file(tmp_path / "run" / "checkpoints" / "round-000001.safetensors")
    broadcast = {name: newest[f"arrays/{name}"] for name in "ABP"}
    for name in "ABP":
        updates = [site_update(site, 2, broadcast)[name] for site in ("alpha", "gamma")]
        np.testing.assert_allclose(kept[name], broadcast[name] + np.mean(updates, axis=0), rtol=1e-5, atol=1e-6)
    for file in ("run.json", "log.jsonl"):
        assert SECRET not in (tmp_path / "run" / file).read_text()
    assert not list((tmp_path / "run").glob("checkpoints/.*"))


def test_refused_bytes_are_counted(models: Models, tmp_path: Path) -> None:
    run(models, tmp_path / "run", also("more", ArrayRecord({"x": Array(np.zeros(1000))})))
    rows = {(row.site, row.item): row for row in read_record(tmp_path / "run").outbox}
    refused = rows["beta", "refused"]
    assert refused.count == 1
    assert refused.bytes > 8000
    assert refused.purpose.startswith("none")
    assert rows["beta", "update.A"].count == 2
    assert rows["alpha", "update.A"].count == 3


def test_doubled_replies_count_once(models: Models, tmp_path: Path) -> None:
    once = run(models, tmp_path / "once", None)
    twice = run(models, tmp_path / "twice", lambda site, message, honest: [honest, honest], phase="train")
    assert all(np.array_equal(once[name], twice[name]) for name in once)
    assert read_record(tmp_path / "twice").rounds[0].sites == list(NAMES)


def test_other_layouts_of_the_same_numbers_are_the_same(models: Models, tmp_path: Path) -> None:
    """Fortran order and big-endian bytes are ways to write the declared item, not other items."""
    plain = run(models, tmp_path / "plain", None)
    for how in (np.asfortranarray, lambda a: a.astype(">f4")):
        other = run(models, tmp_path / str(id(how)), spoil("update.A", how), phase="train")
        assert all(np.array_equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("phase", ["query.probe", "query.similarity"])
@pytest.mark.parametrize(
    "bad",
    [
        lambda *_: arrays_of({"probe_scores": np.array([0.1, 0.2, 1.5])}),
        lambda *_: arrays_of({"similarity_scores": np.array([0.1, 0.2, np.nan, 0.3])}),
        lambda *_: arrays_of({"probe_moments": np.zeros(10)}),
        lambda *_: Error(code=109, reason=""),
        lambda *_: None,
    ],
)
def test_a_lost_turn_in_selection_leaves_the_site_in_training(
    models: Models, tmp_path: Path, phase: str, bad: Behaviour
) -> None:
    run(models, tmp_path / "run", bad, phase=phase)
    record = read_record(tmp_path / "run")
    assert record.selection is not None
    stage = record.selection.probe_scores if phase == "query.probe" else record.selection.similarity_scores
    assert stage is not None
    assert stage.per_site is not None
    assert sorted(stage.per_site) == ["alpha", "gamma"]
    assert all(each.sites == list(NAMES) for each in record.rounds)


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_bad_confusions_have_no_part_in_the_sums(models: Models, tmp_path: Path, dtype: type) -> None:
    bad = {"confusion.bridge": np.full((3, 3), 7, dtype)}
    run(models, tmp_path / "run", lambda *_: arrays_of(bad), phase="evaluate")
    run(models, tmp_path / "silent", lambda *_: None, phase="evaluate")
    spoilt, silent = (read_record(tmp_path / each) for each in ("run", "silent"))
    assert spoilt.evaluation == silent.evaluation
    assert [site.lost_turns for site in spoilt.sites] == [[], ["evaluate test 3: BAD_REPLY"], []]


def test_too_few_good_replies_are_asked_again_then_stop_the_run(models: Models, tmp_path: Path) -> None:
    members = [Site(name) for name in NAMES]
    members[0].wrong["train 2"] = lambda *_: Error(code=114, reason="")
    members[2].wrong["train 2"] = lambda *_: None
    with pytest.raises(RunError, match=r"round 2: 1 good replies, 2 are needed; missing: alpha \(STORAGE\), gamma"):
        run_server(WireGrid(members), tmp_path, models.folder, models.job(sites={**SITES, "retries": 2}))
    asked = [[config["round"] for kind, config in site.seen if kind == "train"] for site in members]
    assert asked == [[1, 2, 2, 2], [1, 2], [1, 2, 2, 2]]
    record = read_record(tmp_path)
    assert record.status == "failed"
    assert [each.round for each in record.rounds] == [1]
    assert [site.lost_turns for site in record.sites] == [["round 2: STORAGE"] * 3, [], ["round 2: NO_REPLY"] * 3]
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["attempt"], e["sites"]) for e in events if e["event"] == "retry"] == [
        (1, ["alpha", "gamma"]),
        (2, ["alpha", "gamma"]),
    ]
    assert [e["event"] for e in events][-2:] == ["checkpoint", "failed"]
    assert "alpha (STORAGE)" in events[-2]["stopped"]


def test_a_repeated_round_is_as_if_nothing_had_happened(models: Models, tmp_path: Path) -> None:
    fails = {"alpha": 2, "beta": 1}

    def shaky(site: Site, message: Any, honest: RecordDict) -> Any:
        fails[site.name] -= 1
        return honest if fails[site.name] < 0 else None

    members = [Site(name) for name in NAMES]
    members[0].wrong["train 2"] = members[1].wrong["train 2"] = shaky
    sites = {**SITES, "minimum": 3, "retries": 2}
    run_server(WireGrid(members), tmp_path / "run", models.folder, models.job(sites=sites))
    plain = run(models, tmp_path / "plain", None)
    kept = load_file(tmp_path / "run" / "bridge" / "bridge.safetensors")
    assert all(np.array_equal(plain[name], kept[name]) for name in plain)
    assert [each.sites for each in read_record(tmp_path / "run").rounds] == [list(NAMES)] * 3


def test_offline_sites_are_not_waited_for(models: Models, tmp_path: Path) -> None:
    members = [Site(name) for name in NAMES]
    grid = WireGrid(members)

    def vanish(site: Site, message: Any, honest: RecordDict) -> RecordDict:
        grid.offline.add(1001)
        return honest

    members[1].wrong["train 1"] = vanish
    run_server(grid, tmp_path, models.folder, models.job(sites=SITES))
    record = read_record(tmp_path)
    assert record.sites[1].lost_turns == [f"{phase}: OFFLINE" for phase in ("round 2", "round 3", "evaluate test 3")]
    assert grid.timeouts == [5.0] * len(grid.timeouts)


def test_a_round_waits_for_sites_that_come_back(models: Models, tmp_path: Path) -> None:
    members = [Site(name) for name in NAMES]
    grid = WireGrid(members)
    honest_ids = grid.get_node_ids

    def away_for_a_while() -> Any:
        if grid.polls == back[0]:
            grid.offline.clear()
        return honest_ids()

    def vanish(site: Site, message: Any, honest: RecordDict) -> RecordDict:
        grid.offline.add(1001)
        back.append(grid.polls + 4)
        back.pop(0)
        return honest

    back = [-1]
    grid.get_node_ids = away_for_a_while  # type: ignore[method-assign]
    members[1].wrong["train 1"] = vanish
    run_server(grid, tmp_path, models.folder, models.job(sites={**SITES, "minimum": 3}))
    record = read_record(tmp_path)
    assert [each.sites for each in record.rounds] == [list(NAMES)] * 3
    assert record.sites[1].lost_turns == ["round 2: OFFLINE"]


DIMENSIONS = Dimensions(
    3,
    4,
    3,
    probe_moments=100,
    bridge=BridgeShape(width_new=16, rank=2, tokens_old=6, prototypes=4, width_old=8),
)
TRAIN = Expected(("update.A", "update.B", "update.P", "weight"), ("train_loss",), DIMENSIONS)
NUMBERS = st.floats(width=32) | st.integers(-(2**31), 2**31)
ANY_ARRAY = st.one_of(
    st.builds(
        lambda shape, dtype: np.ones(shape, dtype),
        st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 24]), max_size=3),
        st.sampled_from(["float32", "float64", "int64", "bool", "U3", "complex64"]),
    ).map(Array),
    st.binary(max_size=200).map(lambda data: raw("float32", (16, 2), data)),
)
RECORDS = st.one_of(
    st.dictionaries(st.sampled_from([*ITEMS, "other"]), ANY_ARRAY, max_size=5).map(ArrayRecord),
    st.dictionaries(st.sampled_from([*ITEMS, "other"]), NUMBERS, max_size=4).map(MetricRecord),
    st.dictionaries(st.sampled_from([*ITEMS, "other"]), st.text(max_size=9) | st.booleans(), max_size=3).map(
        ConfigRecord
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["arrays", "metrics", "config", "other"]), RECORDS, max_size=4))
def test_no_reply_raises_anything_but_a_refusal(records: dict[str, Any]) -> None:
    WireGrid([])
    request = Message(RecordDict(), dst_node_id=5, message_type="train")
    reply = over_the_wire(Message(RecordDict(records), reply_to=request))
    assert content_bytes(reply) >= 0
    refusal = ""
    try:
        answer = read_reply(reply, TRAIN)
        assert {"update.A", "update.B", "update.P", "weight"} <= set(answer.values) <= {*TRAIN.required, "train_loss"}
        assert answer.values["update.A"].shape == (16, 2)
    except ReplyError as error:
        refusal = str(error)
    assert "'other'" not in refusal


@pytest.mark.parametrize(
    ("wrong", "asked", "lost"),
    [
        (lambda *_: None, 2, "NO_REPLY"),
        (lambda *_: Error(code=5, reason=""), 2, "FLOWER_5"),
        (lambda *_: Error(code=103, reason=""), 1, "POLICY_FORBIDS"),
    ],
)
def test_who_is_lost_on_the_way_is_asked_again_in_the_last_evaluation_and_who_refuses_is_not(
    models: Models, tmp_path: Path, wrong: Behaviour, asked: int, lost: str
) -> None:
    members = [Site(name) for name in NAMES]
    first = [wrong]

    def once(site: Site, message: Any, honest: RecordDict) -> Any:
        return first.pop()(site, message, honest) if first else honest

    members[1].wrong["evaluate"] = once
    sites = {**SITES, "minimum": 3, "retries": 3}
    run_server(WireGrid(members), tmp_path / "run", models.folder, models.job(sites=sites))
    assert [sum(kind == "evaluate" for kind, _ in site.seen) for site in members] == [1, asked, 1]
    record = read_record(tmp_path / "run")
    assert [site.lost_turns for site in record.sites] == [[], [f"evaluate test 3: {lost}"], []]
    run(models, tmp_path / "plain", None)
    whole = read_record(tmp_path / "plain").evaluation
    assert record.evaluation is not None
    assert (record.evaluation == whole) == (asked == 2)

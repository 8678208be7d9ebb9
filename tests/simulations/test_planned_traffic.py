"""What `bridge.study.traffic` plans from the job and the cards is what the audit logs of real runs say was sent."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.job import Job
from bridge.messages import DEFAULT_ITEMS, ITEMS
from bridge.study.traffic import planned_messages, total
from client.app import app as client_app
from server.app import app as server_app
from simulations.local_grid import run_local
from simulations.prepare import prepare, read_job, run_config, site_folders
from tests.bridge.study.studies import cards, encoder_card, job
from tests.simulations.studies import tiny

Sent = list[tuple[str, int | None, dict[str, int]]]


def sent(site: Path) -> Sent:
    """Message, round and bytes by item of each reply, read from the log's lines as they stand."""
    lines = [json.loads(line) for line in (site / "audit.jsonl").read_text(encoding="utf-8").splitlines()]
    items = [line for line in lines if line["event"] == "sent"]
    found: Sent = []
    for (message, round_), group in groupby(items, key=lambda line: (line["message"], line["round"])):
        replies: list[dict[str, int]] = [{}]
        for line in group:
            if line["item"] in replies[-1]:
                replies.append({})
            replies[-1][line["item"]] = line["bytes"]
        found += [(message, round_, reply) for reply in replies]
    return found


def finished(folder: Path, *overrides: str) -> tuple[Job, tuple[EncoderCard, EncoderCard, HeadCard], list[Path]]:
    prepare(tiny(*overrides), folder)
    sites = site_folders(folder)
    run_local(server_app, client_app, run_config(folder, engine="local", resume=False), len(sites), 2)
    models = folder / "models"
    old, new = (read_card(models / name, EncoderCard) for name in ("old_encoder", "new_encoder"))
    return read_job(folder), (old, new, read_card(models / "task_head", HeadCard)), sites


DEFAULTS = f"policy.items={json.dumps(DEFAULT_ITEMS)}"
FACTORED = "bridge={kind: factored, cosines: 2, rank: 3, prototypes: 3, initialisation: directions, constant: public, frozen_prototypes: true, whitening: public, components: 5}"  # noqa: E501
NOISE = "training: {noise_multiplier: 2}, selection: {noise_multiplier: 2}, metrics: {noise_multiplier: 2}, closed_form: {noise_multiplier: 2, gram: diagonal}"  # noqa: E501
MORE = ("split.validation=0.2", "data.builtin.hospital_patients=20")

RUNS: dict[str, tuple[str, ...]] = {
    "defaults": (DEFAULTS,),
    "opt-ins": (),
    "best": (*MORE, "train.keep=best"),
    "best by loss": (*MORE, "train.keep=best", "train.criterion=train_loss"),
    "every second": (*MORE, "evaluate={final: false, every: 2}"),
    "closed form": ("train=closed_form", FACTORED),
    "closed form first": (DEFAULTS.replace("]", ', "closed_form_moments"]'), "train.start=closed_form", FACTORED),
    "fixed": ("selection={mode: fixed, input_position: 1, output_position: 2}",),
    "moments": (DEFAULTS.replace("]", ', "probe_moments", "similarity_moments"]'), "selection.mode=moments"),
    "local": (f"privacy={{mechanism: local, {NOISE}}}",),
    "local closed form": (f"privacy={{mechanism: local, {NOISE}}}", "train=closed_form", FACTORED),
    "central": (
        *MORE,
        f"privacy={{mechanism: central, {NOISE}}}",
        "train.local_steps=1",
        "evaluate={final: true, every: 2}",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_what_a_run_sends(session_cache: Path, tmp_path: Path, name: str) -> None:
    overrides = RUNS[name]
    asked, found, sites = finished(tmp_path / "run", *overrides)
    items = tiny(*overrides).policy.items
    planned = planned_messages(asked, *found, items=items)
    assert len(sites) == 2
    for site in sites:
        replies = sent(site)
        assert [message for message, _, _ in replies] == [each.message for each in planned]
        for each, (_, round_, reply) in zip(planned, replies, strict=True):
            if each.round is None and each.split == "test":
                assert asked.train.keep == "best"
                assert asked.evaluates("test", round_ or 0)
            else:
                assert each.round == round_
            assert each.items.keys() == reply.keys()
            for item, size in reply.items():
                low, high = each.items[item]
                assert low <= size <= high
                assert low == high or item == "site"
        bytes_ = sum(sum(reply.values()) for _, _, reply in replies)
        low, high = total(planned)
        assert low <= bytes_ <= high
        assert high - low == 62  # the site's name alone is not known


def test_the_sizes_of_a_small_run_by_hand() -> None:
    """Cards of the test's own: 3 old layers of (5, 4), 4 new ones of (5, 6), 3 classes."""
    asked = job(bridge={"rank": 2, "prototypes": 7}, train={"rounds": 2}, evaluate={"final": True})
    planned = planned_messages(asked, *cards())
    assert [(each.message, each.round, each.split) for each in planned] == [
        ("query.describe", None, None),
        ("query.probe", None, None),
        ("query.similarity", None, None),
        ("train", 1, None),
        ("train", 2, None),
    ]
    assert planned[0].items == {"site": (1, 63), "can_take_part": (1, 1), "reason": (8, 8)}
    assert planned[1].items == {"probe_scores": (4 * 8, 4 * 8)}
    assert planned[2].items == {"similarity_scores": (3 * 8, 3 * 8)}
    # A: 6 x 2, B: 2 x (5 tokens x 7 prototypes), P: 7 x 4, float32.
    update = {"update.A": (48, 48), "update.B": (280, 280), "update.P": (112, 112), "weight": (8, 8)}
    assert planned[3].items == planned[4].items == update
    assert planned[3].bytes == (448, 448)
    assert total(planned) == (10 + 32 + 24 + 2 * 448, 72 + 32 + 24 + 2 * 448)


def test_sizes_span_the_positions_that_may_be_chosen() -> None:
    old, _, head = cards()
    new = encoder_card("PPG", b"", positions=2, width=6)
    new = new.model_copy(update={"layouts_out": ((5, 6), (5, 10))})
    old = old.model_copy(update={"layouts_in": ((5, 4), (8, 3), (2, 9))})
    asked: dict[str, Any] = {"bridge": {"rank": 2, "prototypes": 7}, "train": {"rounds": 1}}
    (update,) = [each for each in planned_messages(job(**asked), old, new, head) if each.message == "train"]
    assert update.items == {
        "update.A": (6 * 2 * 4, 10 * 2 * 4),
        "update.B": (2 * 2 * 7 * 4, 2 * 8 * 7 * 4),
        "update.P": (7 * 3 * 4, 7 * 9 * 4),
        "weight": (8, 8),
    }
    fixed = job(**asked, selection={"mode": "fixed", "input_position": 1, "output_position": 2})
    (update,) = [each for each in planned_messages(fixed, old, new, head) if each.message == "train"]
    assert update.items == {"update.A": (80, 80), "update.B": (112, 112), "update.P": (252, 252), "weight": (8, 8)}


def test_what_a_policy_does_not_permit_is_not_planned() -> None:
    found = cards()
    best = job(train={"rounds": 3, "keep": "best"})
    silent = planned_messages(best, *found, items=DEFAULT_ITEMS)
    assert {each.message for each in silent} == {"query.describe", "query.probe", "query.similarity", "train"}
    needed = planned_messages(best, *found)
    assert [list(each.items) for each in needed if each.message == "evaluate"] == [["confusion.agreement"]] * 4
    everything = planned_messages(best, *found, items=ITEMS)
    assert [each.split for each in everything if each.message == "evaluate"] == ["validation"] * 3 + ["test"]
    assert everything[-1].round is None
    without = planned_messages(best, *found, items=set(DEFAULT_ITEMS) - {"update.P"})
    assert "train" not in {each.message for each in without}
    assert planned_messages(best, *found, items=()) == []

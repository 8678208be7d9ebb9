"""A server that asks for less than the hospital's policy demands is refused by the site, the policy's line named in its
own log, before a recording is touched; whatever it sends, the ledger answers once and for what was reserved."""

from __future__ import annotations

import copy
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Message

from bridge.job import job_text
from bridge.messages import PRIVATE_ITEMS, SENTENCES, ReasonCode
from tests.client.sites import ALL_ITEMS, ask
from tests.end_to_end.privacy.neighbours import (
    FACTORED,
    Asked,
    Cohorts,
    Pool,
    Reply,
    broadcast,
    build_world,
    private_job,
    read_reply,
    script,
)

POLICY: dict[str, Any] = {
    "items": list(ALL_ITEMS),
    "coordinators": ["university"],
    "max_rounds": 2,
    "privacy": {
        "mechanisms": ["local"],
        "epsilon_cap": 4.0,
        "delta": 0.001,
        "clip_max": 0.1,
        "noise_multiplier_min": 1.5,
        "sampling_rate_max": 0.6,
    },
}
"""What the hospital of these tests permits: exactly what `sound` asks for, and every item."""

SOUND = {
    "coordinator": "university",
    "bridge": FACTORED,
    "train.start": "closed_form",
    "privacy.simulation_seed": None,
    "privacy.delta": 0.001,
    "privacy.training": {"noise_multiplier": 1.5, "sampling_rate": 0.6, "clip": 0.1, "divisor": 3.0},
    "privacy.selection": {"noise_multiplier": 4.0, "groups": 4, "clip": 0.1},
    "privacy.closed_form": {"noise_multiplier": 4.0, "clip": 0.1},
    "privacy.metrics": {"noise_multiplier": 2.0},
}


def hospital(pool: Pool, folder: Path, policy: Mapping[str, Any] | None) -> Path:
    """A deployed site of six patients; None: without a policy file."""
    names = pool.patients
    site = build_world(pool, folder, [Cohorts(names[:4], names[4:5], names[5:6])]) / "site-0"
    (site / "policy.yaml").unlink()
    if policy is not None:
        (site / "policy.yaml").write_text(yaml.safe_dump(dict(policy)), encoding="utf-8")
        return site
    plain = yaml.safe_load((site / "site.yaml").read_text(encoding="utf-8"))
    del plain["policy"]
    (site / "site.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    return site


def job(pool: Pool, **changes: Any) -> str:
    """The text of a job that the hospital accepts, with some keys changed (`__` for the dots), sound or not."""
    plain = yaml.safe_load(job_text(private_job(pool, "local")))
    for path, value in [*SOUND.items(), *((key.replace("__", "."), value) for key, value in changes.items())]:
        *sections, last = path.split(".")
        section = plain
        for name in sections:
            section = section[name]
        section[last] = {**section[last], **value} if isinstance(value, dict) else value
    return yaml.safe_dump(plain)


class Server:
    """Asks one site, as the server of one run."""

    def __init__(self, pool: Pool, site: Path, text: str, **run_config: Any) -> None:
        self.pool, self.site, self.text = pool, site, text
        self.run_config = {"run-key": secrets.token_hex(16), **run_config}
        # Arrays of the right shapes for jobs that no site can read, too.
        self.sound = private_job(pool, "local", bridge=FACTORED, train={"start": "closed_form"})

    def send(self, asked: Asked) -> Message:
        arrays = None if asked.seed is None else broadcast(self.pool, self.sound, asked.seed)
        return ask(self.site, self.text, asked.kind, asked.config, arrays, run_config=self.run_config)

    def reply(self, kind: str, seed: int | None = None, **config: Any) -> Reply:
        """The first message of that kind in the script, with another broadcast or other numbers."""
        found = next(each for each in script(self.sound) if each.kind == kind)
        named = {key.replace("_", "-"): value for key, value in config.items()}
        asked = Asked(kind, {**found.config, **named}, found.seed if seed is None else seed)
        return read_reply(self.send(asked), Reply(0, asked))

    def code(self, kind: str, seed: int | None = None, **config: Any) -> ReasonCode:
        """What the server learns: a code and its fixed sentence, or under `describe` the code alone."""
        reply = self.reply(kind, seed, **config)
        code = ReasonCode(reply.values["reason"] if kind == "query.describe" else reply.code)
        if reply.code:
            assert reply.reason == SENTENCES[code]
        return code

    @property
    def log(self) -> list[str]:
        """The site's own log, entry by entry: a line that is not indented begins one."""
        path = self.site / "site.log"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return re.split(r"\n(?=\S)", text.rstrip()) if text else []

    def logged(self, line: str) -> int:
        """In how many entries."""
        return sum(line in entry for entry in self.log)


MESSAGES = ("query.describe", "query.probe", "train")

WEAK, FORBIDDEN, INVALID = ReasonCode.PRIVACY_TOO_WEAK, ReasonCode.MECHANISM_FORBIDDEN, ReasonCode.JOB_INVALID

REFUSED: dict[str, tuple[dict[str, Any], ReasonCode, str]] = {
    "less noise in training": (
        {"privacy__training": {"noise_multiplier": 1.4999}},
        WEAK,
        "privacy.noise_multiplier_min is 1.5",
    ),
    "less noise in selection": (
        {"privacy__selection": {"noise_multiplier": 0.5}},
        WEAK,
        "privacy.noise_multiplier_min is 1.5",
    ),
    "less noise in the closed form": (
        {"privacy__closed_form": {"noise_multiplier": 0.5}},
        WEAK,
        "privacy.noise_multiplier_min is 1.5",
    ),
    "less noise in metrics": (
        {"privacy__metrics": {"noise_multiplier": 0.5}},
        WEAK,
        "privacy.noise_multiplier_min is 1.5",
    ),
    "a larger clip in training": ({"privacy__training": {"clip": 0.11}}, WEAK, "privacy.clip_max is 0.1"),
    "a larger clip in selection": ({"privacy__selection": {"clip": 0.11}}, WEAK, "privacy.clip_max is 0.1"),
    "a larger clip in the closed form": ({"privacy__closed_form": {"clip": 0.11}}, WEAK, "privacy.clip_max is 0.1"),
    "a higher q": ({"privacy__training": {"sampling_rate": 0.61}}, WEAK, "privacy.sampling_rate_max is 0.6"),
    "a larger delta": ({"privacy__delta": 0.0011}, WEAK, "privacy.delta is 0.001"),
    "more rounds": ({"train__rounds": 3}, ReasonCode.TOO_MANY_ROUNDS, "max_rounds is 2"),
    "more steps": ({"train__local_steps": 400}, WEAK, "privacy.epsilon_cap is 4"),
    "no mechanism": ({"privacy__mechanism": "none"}, FORBIDDEN, "privacy.mechanisms are ['local']"),
    "a trusted server": (
        {"privacy__mechanism": "central", "train__local_steps": 1},
        FORBIDDEN,
        "privacy.mechanisms are ['local']",
    ),
    "raw scores": (
        {"privacy__mechanism": "none", "selection__mode": "scores"},
        FORBIDDEN,
        "privacy.mechanisms are ['local']",
    ),
    "raw moments": (
        {"privacy__mechanism": "none", "selection__mode": "moments"},
        FORBIDDEN,
        "privacy.mechanisms are ['local']",
    ),
    "another coordinator": ({"coordinator": "company"}, ReasonCode.COORDINATOR_UNKNOWN, "coordinators are"),
    "moments under privacy": ({"selection__mode": "moments"}, INVALID, "selection.mode 'moments'"),
    "FedMedian": ({"strategy__name": "FedMedian"}, INVALID, "strategy.name 'FedMedian'"),
    "FedTrimmedAvg": ({"strategy__name": "FedTrimmedAvg"}, INVALID, "strategy.name 'FedTrimmedAvg'"),
    "Krum": ({"strategy__name": "Krum"}, INVALID, "strategy.name 'Krum'"),
    "FedProx": ({"strategy__name": "FedProx"}, INVALID, "strategy.name 'FedProx'"),
    "several steps without noise": ({"privacy__mechanism": "central"}, INVALID, "train.local_steps 3"),
    "losses": ({"train__keep": "best", "train__criterion": "train_loss"}, INVALID, "train.criterion 'train_loss'"),
    "negatives of other patients": (
        {"alignment": {"loss": "infonce", "negatives": "batch"}},
        INVALID,
        "alignment.negatives 'batch'",
    ),
    "a delta that gives a patient away": ({"privacy__patients_bound": 101}, INVALID, "patients_bound 101"),
    "an epsilon without noise": (
        {"privacy__training": {"noise_multiplier": None}, "privacy__epsilon": 1.0},
        INVALID,
        "privacy.training.noise_multiplier",
    ),
    "no noise at all": ({"privacy__training": {"noise_multiplier": 0.0}}, INVALID, "noise_multiplier"),
    "an unknown wish": ({"privacy": {"raw_metrics": True}}, INVALID, "raw_metrics"),
    "a seed": ({"privacy__simulation_seed": 1}, INVALID, "privacy.simulation_seed"),
}


@pytest.fixture(scope="module")
def refusing(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hospital with that policy."""
    return hospital(pool, tmp_path_factory.mktemp("refusing"), POLICY)


_touched: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _touched is not None and event in ("open", "os.listdir", "os.scandir"):
        _touched.append(str(arguments[0]))


sys.addaudithook(_note)


@contextmanager
def touching(*folders: Path) -> Iterator[list[str]]:
    """Which paths below the folders this process opens or lists meanwhile, as Python itself reports it."""
    global _touched
    found: list[str] = []
    _touched = []
    try:
        yield found
    finally:
        everything, _touched = _touched, None
        found += [path for path in everything if any(path.startswith(str(folder)) for folder in folders)]


@pytest.mark.parametrize("wish", REFUSED)
def test_a_weaker_plan_is_refused_before_any_data_is_touched(pool: Pool, refusing: Path, wish: str) -> None:
    changes, code, line = REFUSED[wish]
    server = Server(pool, refusing, job(pool, **changes))
    before = server.logged(line)
    with touching(refusing / "recordings", pool.folder / "cache", refusing / "ledger.sqlite") as touched:
        assert [server.code(kind) for kind in MESSAGES] == [code] * len(MESSAGES)
    assert touched == []
    assert server.logged(line) == before + len(MESSAGES)
    assert not (refusing / "ledger.sqlite").exists()


@pytest.mark.parametrize("wish", ["less noise in training", "more steps", "FedMedian", "a seed"])
def test_a_refusal_is_the_same_where_the_recordings_are_gone(pool: Pool, tmp_path: Path, wish: str) -> None:
    changes, code, _ = REFUSED[wish]
    site = hospital(pool, tmp_path, POLICY)
    for path in (site / "recordings").iterdir():
        path.unlink()
    (site / "recordings").rmdir()
    assert {Server(pool, site, job(pool, **changes)).code(kind) for kind in MESSAGES} == {code}


@pytest.mark.parametrize("key", [None, "", "f" * 31, "F" * 32, "f" * 32 + "\n", "../" + "f" * 29, 7])
def test_a_run_without_a_key_is_refused(pool: Pool, refusing: Path, key: Any) -> None:
    """The ledger could not tell a run that goes on from a new one."""
    server = Server(pool, refusing, job(pool), **({"run-key": key} if key is not None else {}))
    if key is None:
        del server.run_config["run-key"]
    with touching(refusing / "recordings", pool.folder / "cache") as touched:
        assert {server.code("query.describe"), server.code("train")} == {ReasonCode.JOB_INVALID}
    assert touched == []
    assert server.logged("run-key") > 0


def test_a_sound_plan_is_answered_with_noised_items_alone(pool: Pool, tmp_path: Path) -> None:
    """The policy permits every item, losses and tables of counts too; a private job gets none of these."""
    site = hospital(pool, tmp_path, POLICY)
    server = Server(pool, site, job(pool))
    with touching(site / "recordings") as touched:
        replies = [read_reply(server.send(asked), Reply(0, asked)) for asked in script(server.sound)]
    assert touched  # so that nothing else above means something
    assert [each.code for each in replies] == [0] * 8
    sent = {name for each in replies for name in each.values}
    assert sent == {"site", "can_take_part", "reason", "weight", *PRIVATE_ITEMS} - {"update.P"}
    assert server.log == []


# What the ledger says.


def test_the_same_question_gets_the_same_answer(pool: Pool, tmp_path: Path) -> None:
    """Noise that is drawn anew could be averaged away."""
    server = Server(pool, hospital(pool, tmp_path, POLICY), job(pool))
    for kind in ("query.probe", "query.closed_form", "train", "evaluate"):
        first, second = server.reply(kind), server.reply(kind)
        assert first.code == 0
        assert first.arrays
        assert all(np.array_equal(array, second.arrays[name]) for name, array in first.arrays.items())


def test_another_question_under_the_same_run_and_message_is_refused(pool: Pool, tmp_path: Path) -> None:
    server = Server(pool, hospital(pool, tmp_path, POLICY), job(pool))
    assert server.code("query.similarity", input_position=1) == 0
    assert server.code("query.similarity", input_position=2) == ReasonCode.ASKED_AGAIN
    assert server.code("query.closed_form") == 0
    assert server.code("query.closed_form", seed=77) == ReasonCode.ASKED_AGAIN
    assert server.code("train") == 0
    assert server.code("train", seed=77) == ReasonCode.ASKED_AGAIN
    assert server.code("train", output_position=0) == ReasonCode.ASKED_AGAIN
    assert server.code("evaluate") == 0
    assert server.code("evaluate", seed=77) == ReasonCode.ASKED_AGAIN
    assert server.logged("asked before in another form") == 5


def test_a_run_does_not_change_its_plan(pool: Pool, tmp_path: Path) -> None:
    site = hospital(pool, tmp_path, POLICY)
    server = Server(pool, site, job(pool))
    assert server.code("query.probe") == 0
    other = Server(pool, site, job(pool, privacy__training={"noise_multiplier": 3.0}), **server.run_config)
    assert other.code("query.describe") == ReasonCode.ASKED_AGAIN
    assert other.code("train") == ReasonCode.ASKED_AGAIN
    assert server.logged("the run has reserved another plan") > 0


def test_messages_beyond_the_plan_are_refused(pool: Pool, tmp_path: Path) -> None:
    """One evaluation of test patients is reserved, whichever bridge is kept."""
    text = job(pool, train__keep="best", evaluate={"every": 1}, privacy__metrics={"noise_multiplier": 3.0})
    server = Server(pool, hospital(pool, tmp_path, POLICY), text)
    assert server.code("evaluate", round=1, split="test") == 0
    assert server.code("evaluate", round=2, split="test") == ReasonCode.ASKED_AGAIN
    assert server.logged("the run's plan has reserved 1") > 0
    assert [server.code("evaluate", round=n, split="validation") for n in (1, 2)] == [0, 0]
    assert server.code("evaluate", round=3, split="validation") == ReasonCode.MESSAGE_INVALID
    assert [server.code("train", round=n) for n in (0, 1, 2, 3)] == [111, 0, 0, 111]


def test_statistics_that_the_plan_has_no_use_for_are_refused(pool: Pool, tmp_path: Path) -> None:
    fixed = {"mode": "fixed", "input_position": 1, "output_position": 1}
    server = Server(pool, hospital(pool, tmp_path, POLICY), job(pool, selection=fixed, train__start="initial"))
    assert server.code("query.describe") == 0
    refusals = (ReasonCode.MESSAGE_INVALID, ReasonCode.ASKED_AGAIN)
    for kind in ("query.probe", "query.similarity", "query.closed_form"):
        assert server.code(kind) in refusals
    assert server.code("train") == 0


def test_a_new_run_does_not_refill_the_budget(pool: Pool, tmp_path: Path) -> None:
    site = hospital(pool, tmp_path, POLICY)
    first, second = (Server(pool, site, job(pool, name=name)) for name in ("first", "second"))
    assert first.code("query.describe") == 0
    assert second.code("query.describe") == ReasonCode.BUDGET_SPENT
    assert second.code("query.probe") == ReasonCode.BUDGET_SPENT
    assert second.logged("the policy's privacy.epsilon_cap is 4") > 0
    assert first.code("query.probe") == 0


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("train", {"proximal_mu": 1.0}),
        ("train", {"split": "test"}),
        ("evaluate", {"split": "pair"}),
        ("evaluate", {"round": 1}),
        ("query.probe", {"minimum_patients": 1}),
        ("query.describe", {"count": True}),
        ("query.probe", {"noise_multiplier": 0.0}),
    ],
)
def test_no_message_lowers_what_the_plan_says(pool: Pool, refusing: Path, kind: str, config: dict[str, Any]) -> None:
    server = Server(pool, refusing, job(pool))
    with touching(refusing / "recordings", pool.folder / "cache") as touched:
        assert (
            read_reply(server.send(with_config(kind, server, config)), Reply(0, Asked(kind))).code
            == ReasonCode.MESSAGE_INVALID
        )
    assert touched == []


def with_config(kind: str, server: Server, config: dict[str, Any]) -> Asked:
    found = next(each for each in script(server.sound) if each.kind == kind)
    named = {key.replace("_", "-") if key != "noise_multiplier" else key: value for key, value in config.items()}
    return Asked(kind, {**found.config, **named}, found.seed)


# Without a policy file.

STRICT: dict[str, Any] = {
    "coordinator": "anybody",
    "privacy__delta": 1e-5,
    "privacy__training": {"noise_multiplier": 4.0, "sampling_rate": 0.1, "clip": 1.0},
    "privacy__selection": {"noise_multiplier": 15.0, "clip": 1.0},
    "privacy__closed_form": {"noise_multiplier": 15.0, "clip": 1.0},
    "privacy__metrics": {"noise_multiplier": 6.0},
}


def strict_job(pool: Pool, **changes: Any) -> str:
    merged = copy.deepcopy(STRICT)
    for key, value in changes.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) else value
    return job(pool, **merged)


def test_without_a_policy_a_private_mechanism_is_answered(pool: Pool, tmp_path: Path) -> None:
    server = Server(pool, hospital(pool, tmp_path, None), strict_job(pool))
    assert [server.code(kind) for kind in MESSAGES] == [ReasonCode.OK] * len(MESSAGES)


@pytest.mark.parametrize(
    ("changes", "code", "line"),
    [
        ({"privacy__mechanism": "none"}, FORBIDDEN, "privacy.mechanisms are ['local']"),
        (
            {"privacy__mechanism": "central", "train__local_steps": 1},
            FORBIDDEN,
            "privacy.mechanisms are ['local']",
        ),
        ({"privacy__delta": 2e-5}, WEAK, "privacy.delta is 1e-05"),
        ({"privacy__training": {"clip": 1.01}}, WEAK, "privacy.clip_max is 1"),
        ({"privacy__training": {"sampling_rate": 0.11}}, WEAK, "privacy.sampling_rate_max is 0.1"),
        ({"privacy__training": {"noise_multiplier": 0.99}}, WEAK, "privacy.noise_multiplier_min is 1"),
        ({"privacy__metrics": {"noise_multiplier": 2.0}}, WEAK, "privacy.epsilon_cap is 1"),
    ],
)
def test_without_a_policy_the_strictest_bounds_hold(
    pool: Pool, tmp_path: Path, changes: dict[str, Any], code: ReasonCode, line: str
) -> None:
    site = hospital(pool, tmp_path, None)
    server = Server(pool, site, strict_job(pool, **changes))
    with touching(site / "recordings", pool.folder / "cache") as touched:
        assert [server.code(kind) for kind in MESSAGES] == [code] * len(MESSAGES)
    assert touched == []
    assert server.logged(line) == len(MESSAGES)

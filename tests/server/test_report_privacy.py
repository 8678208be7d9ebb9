"""The report under a private mechanism: the promise in words, and nothing that isn't released."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.record import SIMULATED_EVALUATION, Evaluation, RunRecord, write_record
from server.report.folder import read_folder
from server.report.privacy import released
from server.report.render import write_report
from server.statement import PRIVACY_JSON, Statement, build_statement, write_statement
from tests.server import private, runs
from tests.server.test_report import Page


def rendered(folder: Path, record: RunRecord, statement: Statement | None = None) -> Page:
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, record)
    if statement is not None:
        write_statement(folder, statement)
    return Page(write_report(folder))


@pytest.fixture(scope="module")
def statement() -> Statement:
    return build_statement(private.job(), private.record())


@pytest.fixture(scope="module")
def page(statement: Statement, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return rendered(tmp_path_factory.mktemp("private"), private.record(), statement)


def test_the_promise_stands_at_the_top_and_in_its_section(page: Page, statement: Statement) -> None:
    assert statement.epsilon is not None
    # Rounded up, never down.
    assert "epsilon 7.86 at delta 0.001 for each patient" in page.text[: page.text.index("The result, as released")]
    assert 7.85 < statement.epsilon <= 7.86
    section = page.text[page.text.index("What this run promises about privacy") :]
    for words in (
        "This protects the patient, with all windows, in all sessions, at one site",
        "add or remove one patient",
        "can be right about at most",
        "Who must be trusted: the server",
        "Timing: how long",
        "public patients, says its card",
        "dp-accounting PLD",
    ):
        assert words in section
    assert "No formal" not in page.text


def test_the_events_are_a_table(page: Page) -> None:
    section = page.text[page.text.index("What was released, with how much noise") :]
    for row in (
        "Sums of gradients in training patients whose recordings train the bridge 1.3 0.7 0.91 0.25 80",
        "Scores for where the bridge reads patients whose recordings train the bridge 4 1 4 all 1",
        "Evaluation: confusion tables test patients 0.9 1 0.9 all 1",
    ):
        assert row in section


def test_what_is_not_released_is_not_shown(tmp_path: Path, statement: Statement, page: Page) -> None:
    """Even from a record that holds it: the page is the same as from one that doesn't."""
    record = private.record()
    full = RunRecord.model_validate(
        record.model_dump(by_alias=True)
        | {key: value for key, value in runs.completed().items() if key in ("rounds", "selection", "seconds")}
    )
    assert full.selection is not None
    assert full.selection.probe_scores is not None
    noised = private.record().selection
    assert noised is not None
    assert noised.probe_scores is not None
    scores = full.selection.probe_scores.model_copy(update={"aggregate": noised.probe_scores.aggregate})
    full = full.model_copy(update={"selection": full.selection.model_copy(update={"probe_scores": scores})})
    evaluation = full.evaluation.model_copy(update={"patients": 141, "windows": 2813})
    text = rendered(tmp_path, full.model_copy(update={"evaluation": evaluation}), statement).text
    for words in ("141 test patients", "2,813", "each site's own scores", "s a round", "took 2"):
        assert words not in text
    assert "Training losses are not released" in page.text
    hidden = released(full)
    assert (hidden.seconds, {row.seconds for row in hidden.rounds}) == (None, {None})
    assert hidden.selection is not None
    assert hidden.selection.probe_scores is not None
    assert hidden.selection.probe_scores.per_site is None


def test_the_noise_of_scores_and_tables_is_told(page: Page) -> None:
    assert [label.split(":")[0] for label in page.labels].count("Confusion matrices") == 1
    assert "a cell's noise has a standard deviation of 0.9" in page.text
    assert "of draws of the noise" in page.text


def test_a_run_without_privacy_is_shown_as_it_is() -> None:
    record = RunRecord.model_validate(runs.completed())
    assert released(record) is record


def test_the_simulators_figures_stand_apart(tmp_path: Path, statement: Statement) -> None:
    known = Evaluation.model_validate(runs.completed()["evaluation"])
    (tmp_path / SIMULATED_EVALUATION).write_text(known.model_dump_json(), encoding="utf-8")
    page = rendered(tmp_path, private.record(), statement)
    start = page.text.index("What the simulator knows (no hospital would release this)", page.text.index("as released"))
    before, section = page.text[:start], page.text[start : page.text.index("Which classes are taken for which")]
    assert "0.71 (0.63 to 0.79)" in before
    assert "0.76 (0.73 to 0.80)" in section
    assert "141 test patients (2,813 windows)" in section
    assert "All data on one machine" in section
    assert "0.76 (0.73" not in before
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)


def test_no_simulated_figures_without_a_file_or_without_privacy(tmp_path: Path, page: Page) -> None:
    assert "What the simulator knows" not in page.text
    known = Evaluation.model_validate(runs.completed()["evaluation"])
    (tmp_path / SIMULATED_EVALUATION).write_text(known.model_dump_json(), encoding="utf-8")
    plain = rendered(tmp_path, RunRecord.model_validate(runs.completed()))
    assert "What the simulator knows" not in plain.text
    assert "No formal privacy guarantee. This run used threat model none" in plain.text


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_a_private_run_without_its_statement_promises_nothing(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / PRIVACY_JSON).write_text(content, encoding="utf-8")
    page = rendered(tmp_path, private.record())
    assert "No privacy statement." in page.text
    assert "epsilon =" not in page.text
    assert read_folder(tmp_path).statement is None


@pytest.mark.parametrize(
    ("asked", "training", "words"),
    [
        ({"simulation_seed": 1}, {"public_patients": 40}, "The privacy statement is void."),
        ({}, {"public": False}, "can reveal them, and no noise added here protects them"),
        ({}, {}, "Patient-level differential privacy, on a condition"),
    ],
)
def test_a_void_or_conditional_statement_says_so_at_the_top(
    tmp_path: Path, asked: dict[str, Any], training: dict[str, Any], words: str
) -> None:
    record = private.record(private.config(**asked))
    models = {name: card | {"training": training} for name, card in record.models.items()}
    record = record.model_copy(update={"models": models})
    page = rendered(tmp_path, record, build_statement(private.job(**asked), record))
    assert words in page.text[: page.text.index("The result, as released")]
    assert ("This protects" in page.text) == ("statement is void" not in page.text)


def test_rotations_say_that_they_add_up(tmp_path: Path) -> None:
    record = private.record().model_copy(update={"rotations": ["rotation-0", "rotation-1"]})
    for name in record.rotations:
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, private.record())
    page = rendered(tmp_path, record)
    assert "what they lose adds up" in page.text

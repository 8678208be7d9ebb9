"""The report of a run: true figures, nothing loaded from outside, every missing part said and none crashed on."""

from __future__ import annotations

import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bridge.messages import SENTENCES, ReasonCode
from server.errors import RunFolderError
from server.record import Metric, RunRecord
from server.replies import BAD_REPLY, NO_REPLY, OFFLINE
from server.report.headline import headline, remarks
from server.report.render import write_report
from server.report.windows import EXAMPLE_WINDOWS, read_example_windows
from server.report.words import in_bytes, in_time, lost_turns_in_words, reason_in_words
from server.roster import NOT_EXPECTED, SAME_NAME
from tests.server import runs


class Page(HTMLParser):
    """What a browser would make of a page: its text, its tags, its links, and whether every tag is closed."""

    _VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.pieces: list[str] = []
        self.labels: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.pieces))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "srcset", "data", "action"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name == "aria-label":
                self.labels.append(value or "")
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "text"):
            self.pieces.append(data)


def render(folder: Path, record: dict[str, Any]) -> Page:
    return Page(write_report(runs.write_run(folder, record)))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = runs.write_run(tmp_path_factory.mktemp("full"), runs.completed())
    runs.write_windows(folder)
    return Page(write_report(folder))


def test_the_headline_is_one_true_sentence(full: Page) -> None:
    assert (
        "On 141 test patients (2,813 windows), the federated bridge reads PPG alone and reaches a balanced accuracy of "
        "0.76 (0.73 to 0.80); its teacher, which needs ECG, reaches 0.79; a hospital alone reaches on average 0.70; "
        "training on shuffled pairs gives 0.35; chance is 0.33." in full.text
    )


def test_a_full_run_shows_every_part(full: Page) -> None:
    assert full.tags.count("svg") == 8  # result, groups, confusion, scores, curves, bytes, two moments
    assert [label.split(":")[0] for label in full.labels if label != "Contents"] == [
        "Result against its controls",
        "Balanced accuracy by group",
        "Confusion matrices",
        "Selection scores by position; "
        "the bridge reads position 3 of the new encoder and writes position 3 of the old one",
        "Training curves",
        "Bytes that left each site",
        "Example 1, class under 75",
        "Example 2, class over 100",
    ]
    for words in ("ODC-By 1.0", "15,360 parameters", "learning_rate: 0.001", "ventricular tachycardia", "flwr 1.41.0"):
        assert words in full.text
    assert "rounds 3, 7: The site can't write to its disk." in full.text
    assert "no: The site has fewer patients than its own policy demands." in full.text
    assert "No formal guarantee." in full.text
    assert "6.15 MB" in full.text  # 5 sites x (1,228,800 updates + 160 losses + 1,512 counts + 90 others) bytes


def test_the_page_loads_nothing_and_its_links_end_in_itself(full: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(full.tags)
    assert full.links
    assert all(link.startswith("#") and link[1:] in full.ids for link in full.links)
    assert len(full.ids) == len(set(full.ids))


def test_the_style_loads_nothing(tmp_path: Path) -> None:
    text = write_report(runs.write_run(tmp_path, runs.completed())).read_text(encoding="utf-8")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert not re.findall(r"https?://", text)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path, runs.completed())
    first = write_report(folder, tmp_path / "first.html").read_bytes()
    assert write_report(folder, tmp_path / "second.html").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.html", "run.json", "second.html"]


def test_a_failed_run_says_why_at_the_top(tmp_path: Path) -> None:
    page = render(tmp_path, runs.failed_early())
    assert page.tags.count("svg") == 0
    top = page.text[: page.text.index("The result against its controls")]
    assert "The run failed. 1 of at least 3 sites" in top
    assert "ask <hospital-c> & run" in top
    for words in ("The run did not come to choosing positions.", "No round was counted.", "holds no card of a model"):
        assert words in page.text


def test_a_running_run_shows_what_it_has(tmp_path: Path) -> None:
    page = render(tmp_path, runs.running())
    assert "The run has not ended yet" in page.text
    assert "4 of 20" in page.text
    assert page.tags.count("svg") == 2  # scores and curves


def test_a_run_without_permissions_says_which_are_missing(tmp_path: Path) -> None:
    page = render(tmp_path, runs.silent())
    assert "no site's policy permits the counts that it needs" in page.text
    assert "20 rounds were counted, but there is no curve to show" in page.text
    assert "the sites' policies do not permit these counts" in page.text
    assert "each site's own scores" not in page.text
    assert page.tags.count("svg") == 2  # scores and bytes


def test_pooled_figures_have_no_interval_and_say_why(tmp_path: Path) -> None:
    record = runs.completed() | {"engine": "deployment"}
    why = "none: the server sees sums of confusion matrices over sites only, so patients can't be resampled"
    record["evaluation"] = {"bridge": runs.metrics(0.71, None, 0.8), "windows": 1200, "interval": why}
    page = render(tmp_path, record)
    assert (
        "On 1,200 test windows, the federated bridge reads PPG alone and reaches a balanced accuracy of 0.71."
        in page.text
    )
    assert f"No intervals: {why.removeprefix('none: ')}." in page.text
    assert "95 % interval" not in page.text.replace("\u00a0", " ")


def test_a_rotated_run_lists_its_rotations(tmp_path: Path) -> None:
    runs.rotated(tmp_path)
    page = Page(write_report(tmp_path))
    assert "pools these 3 runs" in page.text
    assert "rotation-2 no record: No such file or directory" in page.text
    assert "PPG takes the place of ECG" in page.text  # the models are those of the rotations
    assert "12.3 MB" in page.text  # and so is what left the sites: 2 x 6.15 MB
    inner = [link for link in page.links if not link.startswith("#")]
    assert inner == ["rotation-0/report.html", "rotation-1/report.html"]
    assert all((tmp_path / link).is_file() for link in inner)
    elsewhere = Page(write_report(tmp_path, tmp_path.parent / f"{tmp_path.name}.html"))
    assert all(link.startswith("#") for link in elsewhere.links)


def test_a_licence_that_forbids_commercial_use_is_repeated(tmp_path: Path) -> None:
    record = runs.completed()
    assert "commercial" not in render(tmp_path, record).text
    licence = {"model": "HuBERT-ECG", "licence_weights": "CC BY-NC 4.0"}
    record["models"]["old_encoder"]["training"] = {**licence, "commercial_use": "forbidden"}
    record["models"]["new_encoder"]["training"] = {"model": "LaBraM-base", "commercial_use": "permitted"}
    text = render(tmp_path, record).text
    assert text.count("No commercial use.") == 1
    assert "The licence of the old encoder, HuBERT-ECG, forbids commercial use (CC BY-NC 4.0)." in text
    assert "commercial use: permitted" in text


def test_texts_of_a_run_can_not_become_markup(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>$x_1$'
    record = runs.completed() | {"name": evil, "status": "failed", "error": evil, "config": {evil: evil}}
    record["evaluation"]["groups"] = {evil: {"bridge": runs.metrics(0.6)}}
    record["evaluation"]["classes"] = [evil, "b", "c"]
    page = render(tmp_path, record)
    assert "script" not in page.tags
    assert page.text.count('<script>alert("1")</script>') >= 4


def test_the_configuration_around_a_simulated_job_is_shown(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path, runs.completed())
    (folder / "config.yaml").write_text("partition:\n  kind: dirichlet\n", encoding="utf-8")
    assert "The simulation around it partition: kind: dirichlet" in Page(write_report(folder)).text
    (folder / "config.yaml").write_text("partition: [", encoding="utf-8")
    assert "The simulation around it" not in Page(write_report(folder)).text


def test_wrong_example_windows_are_said_and_do_not_stop_the_report(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path, runs.completed())
    (folder / EXAMPLE_WINDOWS).write_text('[{"title": "x", "role": "old", "patient": "p1"}]', encoding="utf-8")
    page = Page(write_report(folder))
    assert "is not a list of example windows" in page.text
    assert page.tags.count("svg") == 6


def test_example_windows_are_read_back(tmp_path: Path) -> None:
    assert read_example_windows(tmp_path) == []
    runs.write_windows(tmp_path)
    windows = read_example_windows(tmp_path)
    assert [(window.title, window.role, len(window.values)) for window in windows] == [
        ("Example 1, class under 75", "new", 1250),
        ("Example 1, class under 75", "old", 1250),
        ("Example 2, class over 100", "new", 1250),
        ("Example 2, class over 100", "old", 1250),
    ]


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_any_number_of_classes_and_positions_is_drawn(tmp_path: Path, classes: int) -> None:
    record = runs.completed()
    record["evaluation"] |= {
        "confusion": {"bridge": [[0] * classes for _ in range(classes)]},
        "classes": [f"a rather long class name {i}" for i in range(classes)],
    }
    scores = [0.1 * (i % 7) for i in range(24)]
    record["selection"] |= {"mode": "moments", "probe_scores": {"aggregate": scores}, "output_position": 23}
    record["selection"]["similarity_scores"] = {"aggregate": scores}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where a picture has no room for its labels
        assert render(tmp_path, record).tags.count("svg") == 6


def test_an_output_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path, runs.completed())
    with pytest.raises(RunFolderError, match="can't be written"):
        write_report(folder, tmp_path / "absent" / "report.html")


def test_remarks_compare_in_points_and_intervals() -> None:
    teacher, alone, shuffled, centralised = (
        "The bridge lies 2.9 points below its teacher: what is lost by giving up the old modality. "
        "The two intervals overlap.",
        "The bridge lies 6.2 points above a hospital alone, on average: what the hospitals gain by training together. "
        "The two intervals overlap.",
        "Trained on shuffled pairs it gives 0.35; chance lies within its interval (0.32 to 0.38), as it must. "
        "This interval and that of the bridge do not touch.",
        "The bridge lies 0.7 points below all data on one machine: what federation costs. The two intervals overlap.",
    )
    assert remarks(RunRecord.model_validate(runs.completed())) == [teacher, centralised, alone, shuffled]


def test_a_bridge_at_chance_is_said_to_be_at_chance() -> None:
    record = runs.completed()
    record["evaluation"] |= {"bridge": runs.metrics(0.35, 0.04), "teacher": runs.metrics(0.35, 0.05)}
    first, second = remarks(RunRecord.model_validate(record))[:2]
    assert first == "The bridge's interval (0.31 to 0.39) holds chance (0.33): it can't be told from guessing."
    assert second.startswith("The bridge is level with its teacher")


def test_shuffled_pairs_off_chance_are_called_out() -> None:
    record = runs.completed()
    record["evaluation"]["baselines"]["shuffled_pairs"] = runs.metrics(0.5, 0.03)
    assert "does not hold chance (0.33): doubt the result" in remarks(RunRecord.model_validate(record))[-1]


def test_without_labels_the_headline_speaks_of_agreement() -> None:
    record = runs.completed()
    figures = Metric(value=0.87).model_dump()
    record["evaluation"] = {"bridge": {"agreement": figures}}
    assert headline(RunRecord.model_validate(record)).startswith(
        "The federated bridge gives its teacher's answer on 0.87"
    )


def test_every_code_has_words() -> None:
    for code in ReasonCode:
        assert reason_in_words(code.name) == SENTENCES[code]
    for name in (NO_REPLY, OFFLINE, BAD_REPLY, NOT_EXPECTED, SAME_NAME, "UNKNOWN_CODE"):
        assert reason_in_words(name).endswith(".")
    assert reason_in_words("FLOWER_5") == "Flower could not deliver the message or its reply (its code 5)."
    assert reason_in_words("as the site said") == "as the site said"


def test_lost_turns_are_grouped_by_reason() -> None:
    turns = [
        "describe: OFFLINE",
        "round 2: NO_REPLY",
        "round 2: NO_REPLY",
        "round 9: NO_REPLY",
        "round 4: OFFLINE",
        "?",
    ]
    assert lost_turns_in_words(turns) == [
        "describe, round 4: The site was not online.",
        "rounds 2, 9: No reply came in time.",
        "?",
    ]


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (62_124, "62.1 kB"), (999_499, "999 kB"), (999_900, "1.00 MB")],
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert in_bytes(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (172.4, "2 min 52 s"), (7500.0, "2 h 5 min")],
)
def test_time_in_words(seconds: float, words: str) -> None:
    assert in_time(seconds) == words

"""The report of a run on real sites: what the server wrote is all there is, and nothing is said of a simulation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.record import read_record, write_record
from server.report.render import write_report
from server.submission.record import Submission, write_submission
from tests.server.conftest import Models
from tests.server.wire import Site, WireGrid, run_server


def deployed(models: Models, folder: Path, members: list[Site], **changes: object) -> Path:
    """A run folder as the server leaves it on a coordinator's machine."""
    try:
        run_server(WireGrid(members), folder, models.folder, models.job(**changes))
    finally:
        write_record(folder, read_record(folder).model_copy(update={"engine": "deployment"}))
        submission = Submission(
            study="wire-0123abcd",
            study_sha256="0123abcd" * 8,
            study_file="/studies/wire.zip",
            submitted="2030-01-01T00:00:00+00:00",
            flower_run="7",
        )
        write_submission(folder, submission)
    return folder


def rendered(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.S))


def check_plain(page: str) -> None:
    # The job itself is quoted: it names a coordinator, and a key that only simulations may use.
    text = re.sub(r"<[^>]+>", " ", re.sub(r"<(pre|style).*?</\1>", "", page, flags=re.S))
    for word in ("simulat", "shuffled", "linear student", "on one machine", "Example windows"):
        assert word not in text, word
    contents = page[page.index("<nav") : page.index("</nav>")]
    assert re.findall(r'href="#(\w+)"', contents) == list(sections(page))
    for name, content in sections(page).items():
        body = re.sub(r"<h2>.*?</h2>", "", content, flags=re.S)
        assert re.sub(r"<[^>]+>|\s", "", body) or "<svg" in body, f"section {name} is empty"


def test_a_completed_run(models: Models, tmp_path: Path) -> None:
    members = [Site("a"), Site("b"), Site("c", wrong={"train 2": lambda *_: None})]
    page = rendered(deployed(models, tmp_path, members))
    check_plain(page)
    assert "The result beside its teacher" in page
    assert "wire-0123abcd, sha256 0123abcd" in page
    assert "No intervals: the server sees sums" in page
    assert "<dd>3 of 3</dd>" in page
    assert "round 2" in sections(page)["federation"]


def test_a_run_that_failed_for_its_sites(models: Models, tmp_path: Path) -> None:
    members = [Site("a"), Site("b", False, 122), Site("c", False, 120)]
    with pytest.raises(Exception, match="1 sites can take part"):
        deployed(models, tmp_path, members)
    page = rendered(tmp_path)
    check_plain(page)
    assert "The site has withdrawn from this study." in page
    assert "The site has not accepted the code of this run." in page
    assert "<dd>1 of 3</dd>" in page


def test_a_damaged_submission_hides_nothing_else(models: Models, tmp_path: Path) -> None:
    folder = deployed(models, tmp_path, [Site("a"), Site("b")])
    (folder / "submitted.json").write_text("{")
    page = rendered(folder)
    check_plain(page)
    assert "<dt>Study</dt>" not in page

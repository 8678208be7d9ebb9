"""docs/reference/messages.md says what the code says now."""

from __future__ import annotations

from bridge.messages import ITEMS, SENTENCES
from tools.messages_page import PAGE, rendered


def test_the_generated_parts_are_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert rendered(page) == page, "run python -m tools.messages_page"


def test_the_page_names_every_item_and_sentence() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in ITEMS:
        assert f"| `{name}` |" in page
    for sentence in SENTENCES.values():
        assert sentence in page


def test_a_stale_page_is_noticed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    stale = page.replace("The site can't read the job.", "Something else.")
    assert stale != page
    assert rendered(stale) == page

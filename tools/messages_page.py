"""Write the tables of docs/reference/messages.md from the code (`--check`: only compare)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bridge.messages import ITEMS, MESSAGES, SENTENCES, Item, ReasonCode
from client.policy import template

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "messages.md"


def items_table() -> str:
    """What may leave, one row an item, in the order of the messages."""
    rows = ["| message | item | what it is | bounds | by default | purpose |", "|---|---|---|---|---|---|"]
    for message in MESSAGES:
        for item in (each for each in ITEMS.values() if each.message == message):
            default = "no: opt-in" if item.opt_in else "yes"
            rows.append(
                f"| `{message}` | `{item.name}` | {_kind(item)} | {_bounds(item)} | {default} | {item.purpose} |"
            )
    return "\n".join(rows)


def codes_table() -> str:
    """The reason codes and their fixed sentences."""
    rows = ["| code | name | sentence |", "|---|---|---|"]
    return "\n".join(rows + [f"| {int(code)} | `{code.name}` | {SENTENCES[code]} |" for code in ReasonCode])


def policy_block() -> str:
    """The policy file that `fedbridge-site policy template` prints."""
    return f"```yaml\n{template().rstrip()}\n```"


def rendered(page: str) -> str:
    """The page with each generated part replaced by what the code says now."""
    for name, text in (("items", items_table()), ("codes", codes_table()), ("policy", policy_block())):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in page or end not in page:
            raise SystemExit(f"{PAGE}: the markers of '{name}' are missing")
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        page = pattern.sub(lambda _, text=text, begin=begin, end=end: f"{begin}\n{text}\n{end}", page)
    return page


def _kind(item: Item) -> str:
    if item.kind != "array":
        return {"number": "a number", "text": "a plain name", "flag": "yes or no"}[item.kind]
    return f"{item.dtype} `({', '.join(item.shape)})`"


def _bounds(item: Item) -> str:
    if item.kind in ("text", "flag"):
        return ""
    if item.low == float("-inf"):
        return "finite"
    return f"{_number(item.low)} to {_number(item.high)}"


def _number(value: float) -> str:
    return "2^53" if value == 2.0**53 else f"{value:,.0f}"


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8")
    after = rendered(before)
    if "--check" in sys.argv[1:]:
        raise SystemExit(0 if before == after else f"{PAGE} is out of date: run python -m tools.messages_page")
    PAGE.write_text(after, encoding="utf-8")

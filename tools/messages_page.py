"""Write the tables of docs/reference/messages.md from the code (`--check`: only compare)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bridge.job import SelectionJob
from bridge.messages import ITEMS, MESSAGES, SENTENCES, Item, ReasonCode, moments_length
from bridge.projection import projected_width
from bridge.shape import BridgeShape
from client.policy import template

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "messages.md"


_CLASSES = 2

WIDTHS: dict[str, tuple[int, ...]] = {
    "LaBraM-base": (200,) * 12,
    "HuBERT-ECG small": (512,) * 8,
    "HuBERT-ECG base": (768,) * 12,
    "HuBERT-ECG large": (960,) * 16,
    "PaPaGei-S": (32,) * 4 + (64,) * 4 + (128,) * 4 + (256,) * 4 + (512,) * 2,
    "NormWear": (768,) * 12,
    "ECG-FM": (768,) * 12,
}
"""Width of the output of each position of the published encoders."""

BRIDGES: dict[str, BridgeShape] = {
    "ISRUC: HuBERT-ECG small 7 to LaBraM 2": BridgeShape(512, 32, 181, 300, 200),
    "ISRUC: LaBraM 11 to HuBERT-ECG small 0": BridgeShape(200, 4, 46, 200, 512),
    "WESAD: HuBERT-ECG small 7 to PaPaGei 11": BridgeShape(512, 32, 235, 50, 128),
    "WESAD: PaPaGei 4 to HuBERT-ECG small 2": BridgeShape(64, 8, 93, 150, 512),
    "FOG: NormWear 3 to LaBraM 11": BridgeShape(768, 256, 19, 200, 200),
    "FOG: LaBraM 6 to NormWear 10": BridgeShape(200, 8, 1680, 50, 768),
}
"""The bridges of the paper's six directions, at its positions."""


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


def probe_sizes_table() -> str:
    """Bytes of `probe_moments` for the published encoders."""
    limit, folds = SelectionJob().width_limit, SelectionJob().folds
    rows = ["| new encoder | positions | width | `probe_moments` | unprojected |", "|---|---|---|---|---|"]
    for name, widths in WIDTHS.items():
        sent, whole = (
            8 * folds * sum(moments_length(projected_width(width, most), _CLASSES) for width in widths)
            for most in (limit, max(widths))
        )
        shown = str(widths[0]) if len(set(widths)) == 1 else f"{min(widths)} to {max(widths)}"
        rows.append(f"| {name} | {len(widths)} | {shown} | {_megabytes(sent)} | {_megabytes(whole)} |")
    return "\n".join(rows)


def update_sizes_table() -> str:
    """Bytes of a train reply's update for the paper's bridges."""
    rows = ["| direction | parameters | `update.*` |", "|---|---|---|"]
    for name, shape in BRIDGES.items():
        rows.append(f"| {name} | {shape.parameters:,} | {_megabytes(4 * shape.parameters)} |")
    return "\n".join(rows)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def policy_block() -> str:
    """The policy file that `fedbridge-site policy template` prints."""
    return f"```yaml\n{template().rstrip()}\n```"


def rendered(page: str) -> str:
    """The page with each generated part replaced by what the code says now."""
    parts = {
        "items": items_table(),
        "probe sizes": probe_sizes_table(),
        "update sizes": update_sizes_table(),
        "codes": codes_table(),
        "policy": policy_block(),
    }
    for name, text in parts.items():
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

"""What the docs say is current, and their links lead somewhere."""

from __future__ import annotations

import re

from tests.conftest import ROOT


def test_links_between_the_docs_lead_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken


def test_the_table_of_codes_is_current() -> None:
    from bridge.messages import SENTENCES

    text = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| (.*) \|$", text, re.MULTILINE)
    assert {
        (int(code), code_name, sentence) for code, code_name, sentence in rows if int(code) >= 100 or code_name == "OK"
    } >= {(int(code), code.name, sentence) for code, sentence in SENTENCES.items()}


def test_the_configuration_reference_is_current() -> None:
    from tools.config_reference import reference

    written = (ROOT / "docs" / "reference" / "configs.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python -m tools.config_reference > docs/reference/configs.md"

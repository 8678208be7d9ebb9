"""The examples in the docs are executed as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bridge.encoders.loading import read_encoder_card
from bridge.errors import WeightsError
from tests.conftest import ROOT


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_own_encoder_example_runs_and_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    for block in python_blocks(ROOT / "docs" / "own-encoder.md"):
        exec(compile(block, "own-encoder.md", "exec", dont_inherit=True), names)  # noqa: S102
    card = read_encoder_card(tmp_path / "models" / "new_encoder")
    assert card.family == "two-blocks"
    assert card.layouts_in == ((25, 16), (25, 16))


def test_the_contract_kit_finds_a_wrong_layout_in_that_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    class_block, folder_block, check_block = (block for block in python_blocks(ROOT / "docs" / "own-encoder.md"))
    wrong = class_block.replace("return self._window.samples // 50, 16", "return self._window.samples // 50, 17")
    assert wrong != class_block
    for block in (wrong, folder_block):
        exec(compile(block, "own-encoder.md", "exec", dont_inherit=True), names)  # noqa: S102
    with pytest.raises(WeightsError, match="layout"):
        exec(compile(check_block, "own-encoder.md", "exec", dont_inherit=True), names)  # noqa: S102


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

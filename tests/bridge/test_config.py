"""YAML into settings: every problem is one error that names the file, the key and the closest valid key."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from bridge.config import Settings, load_model, load_yaml, parse_model, parse_yaml
from bridge.errors import ConfigError, ExitCode


class Inner(Settings):
    learning_rate: float = Field(default=0.1, gt=0)
    colours: list[str] = Field(default_factory=list)


class Wave(Settings):
    kind: Literal["wave"] = "wave"
    frequency: float = 1.0


class Step(Settings):
    kind: Literal["step"] = "step"
    height: float = 1.0


class Outer(Settings):
    schema_: Literal["x/1"] = Field(default="x/1", alias="schema")
    name: str
    rounds: int = Field(default=3, ge=1)
    inner: Inner = Inner()
    shapes: list[Wave] = Field(default_factory=list)
    by_name: dict[str, Inner] = Field(default_factory=dict)
    choice: Wave | Step | None = None


def problem(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_model(parse_yaml(text, "job.yaml"), Outer, "job.yaml")
    assert caught.value.exit_code == ExitCode.CONFIG == 2
    assert "job.yaml" in caught.value.what
    return caught.value


def test_values_arrive_frozen_with_their_defaults() -> None:
    found = parse_model(parse_yaml("name: a\nschema: x/1\ninner: {learning_rate: 0.5}", "f"), Outer, "f")
    assert (found.name, found.rounds, found.inner.learning_rate, found.inner.colours) == ("a", 3, 0.5, [])
    with pytest.raises(ValidationError):
        found.rounds = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "unknown", "closest"),
    [
        ("name: a\nround: 3", "round", "rounds"),
        ("name: a\ninner: {lerning_rate: 1}", "inner.lerning_rate", "learning_rate"),
        ("name: a\nlearning_rat: 1", "learning_rat", "learning_rate"),
        ("name: a\nscheme: x/1", "scheme", "schema"),
        ("name: a\nshapes: [{frequenzy: 2}]", "shapes.0.frequenzy", "frequency"),
        ("name: a\nby_name: {x: {colors: []}}", "by_name.x.colors", "colours"),
        ("name: a\nchoice: {kind: step, hight: 2}", "choice.Step.hight", "height"),
    ],
)
def test_an_unknown_key_names_the_closest(text: str, unknown: str, closest: str) -> None:
    assert f"unknown key '{unknown}', did you mean '{closest}'?" in problem(text).what


def test_an_unknown_key_near_nothing_is_only_named() -> None:
    what = problem("name: a\nzzzqqq: 1").what
    assert "unknown key 'zzzqqq'" in what
    assert "did you mean" not in what


def test_missing_keys_and_bad_values_are_named_all_at_once() -> None:
    error = problem("rounds: 0\ninner: {learning_rate: fast}")
    assert "key 'name' is missing" in error.what
    assert "key 'rounds': Input should be greater than or equal to 1 (found 0)" in error.what
    assert "key 'inner.learning_rate'" in error.what
    assert "(found 'fast')" in error.what
    assert "3 problem(s)" in error.why


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "3"])
def test_a_file_without_keys_is_refused(text: str) -> None:
    assert "holds no keys" in problem(text).what


def test_syntax_errors_name_the_line() -> None:
    with pytest.raises(ConfigError, match=r"job\.yaml: line 2 is not valid YAML"):
        parse_yaml("a: 1\nb: c: d\n", "job.yaml")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        parse_yaml("a: !!python/object/apply:os.system [ls]", "job.yaml")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: can't be read"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        load_yaml(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x93")
    with pytest.raises(ConfigError, match=r"binary\.yaml: is not a text file"):
        load_yaml(binary)


def test_a_file_becomes_a_model(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: ünal\nchoice: {kind: step, height: 2}\n", encoding="utf-8")
    found = load_model(path, Outer)
    assert found.name == "ünal"
    assert found.choice == Step(height=2.0)

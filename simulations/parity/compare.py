"""Runs a case and compares each array as it comes, so that no more is held than the network itself needs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridge.encoders.recipes import RECIPES
from bridge.encoders.scalogram import scalogram
from bridge.windows import Preprocessing
from client.preprocessing import finish_windows, prepare_run
from simulations.errors import FixtureError
from simulations.parity.cases import (
    Arrays,
    EncoderFacts,
    FoundCase,
    PreprocessingFacts,
    arrays_of,
    encoder_facts,
    preprocessing_facts,
)
from simulations.parity.encoders import Prepared, made_signal, prepare
from simulations.parity.fill import tensor_sha256, tokens
from simulations.parity.result import CaseResult

_RECIPES = {name.replace("-", ""): steps for name, steps in RECIPES.items()}
_CONSTANT = Preprocessing(normalise="recording")
"""The fixtures' flat lead shows normalisation alone."""


def run(case: FoundCase) -> CaseResult:
    """Run a case. Raises `FixtureError` where it is damaged or unknown, and what the encoder raises."""
    if case.kind == "unreadable":
        raise FixtureError(
            f"{case.name}: no case that can be read",
            why="its .json is missing, is damaged, or describes neither an encoder nor preprocessing",
            fix="copy the folder again",
        )
    return _run_encoder(case) if case.kind == "encoder" else _run_preprocessing(case)


@torch.inference_mode()
def _run_encoder(case: FoundCase) -> CaseResult:
    facts, arrays = encoder_facts(case), arrays_of(case)
    prepared = prepare(case, facts)
    encoder = prepared.encoder
    _check_layouts(case, facts, prepared)
    pending = _to_compare(case, facts, arrays)
    front = dict(_front(facts, prepared, arrays))
    middle = dict(_middle(case, facts, prepared, arrays))
    left_over = sorted(pending - front.keys() - middle.keys())
    if left_over:
        raise FixtureError(f"{case.name}: damaged", why=f"nothing computes {', '.join(left_over)}")
    errors = {**front, **middle}
    return CaseResult(
        name=case.name,
        model=facts.model,
        weights="as stated" if prepared.weights_stated else "no digest stated",
        front=max(front.values()),
        middle=max(middle.values(), default=None),
        worst=max(errors, key=errors.__getitem__),
        arrays=len(errors),
        positions=encoder.positions,
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        seconds_a_window=_time(prepared),
    )


def _front(facts: EncoderFacts, prepared: Prepared, arrays: Arrays) -> Iterator[tuple[str, float]]:
    """Every position's input and output from one pass."""
    encoder, native = prepared.encoder, prepared.embed()
    h = encoder.to_tokens(native)
    for i in range(encoder.positions):
        yield from _views(facts, arrays, h, "in", i)
        native = encoder.run_block(i, native)
        h = encoder.to_tokens(native)
        yield from _views(facts, arrays, h, "out", i)
    yield from _final(facts, arrays, h, "")


def _middle(case: FoundCase, facts: EncoderFacts, prepared: Prepared, arrays: Arrays) -> Iterator[tuple[str, float]]:
    """The end, after the fixtures' tokens were written into the input of a block."""
    for i, recipe in facts.mid.items():
        h = tokens(recipe.tag, recipe.shape, recipe.scale)
        if tensor_sha256(h) != recipe.sha256:
            raise FixtureError(
                f"{case.name}: damaged",
                why=f"the tokens that its recipe makes for position {i} do not have the digest that it says",
                fix="copy the folder again",
            )
        if recipe.shape[1:] != prepared.encoder.layout(i, "in"):
            raise FixtureError(f"{case.name}: damaged", why=f"tokens of shape {recipe.shape} do not fit position {i}")
        yield from _final(facts, arrays, prepared.encoder.suffix(h, i), f"mid.{i}.")


def _views(facts: EncoderFacts, arrays: Arrays, h: Tensor, side: Any, i: int) -> Iterator[tuple[str, float]]:
    rows = facts.row_index.get(i, {}).get(side)
    yield from _compared(arrays, f"{side}_pool.{i}", h.mean(1))
    yield from _compared(arrays, f"{side}_full.{i}", h)
    if rows:
        yield from _compared(arrays, f"{side}_rows.{i}", h[0, rows])


def _final(facts: EncoderFacts, arrays: Arrays, h: Tensor, prefix: str) -> Iterator[tuple[str, float]]:
    yield from _compared(arrays, f"{prefix}final_pool", h.mean(1))
    yield from _compared(arrays, f"{prefix}final_full", h)
    if facts.final_row_index:
        yield from _compared(arrays, f"{prefix}final_tokens_sub", h[:, facts.final_row_index])


def _compared(arrays: Arrays, name: str, found: Tensor) -> Iterator[tuple[str, float]]:
    if name in arrays:
        yield name, error_of(name, found.numpy(), arrays[name])


def error_of(name: str, found: NDArray[Any], reference: NDArray[Any]) -> float:
    """Largest difference in standard deviations of the reference; of a constant one, 0 or infinite."""
    if found.shape != reference.shape:
        raise FixtureError(f"{name}: computed {found.shape}, the fixtures have {reference.shape}")
    reference = reference.astype(np.float64)
    difference, deviation = float(np.abs(found - reference).max()), float(reference.std())
    if not np.isfinite(difference) or not deviation:
        return 0.0 if difference == 0 else float("inf")
    return difference / deviation


def _to_compare(case: FoundCase, facts: EncoderFacts, arrays: Arrays) -> set[str]:
    """Names of the arrays to compare: all but the extras, which no bridge uses. Raises where one is missing."""
    wanted = {f"{side}_pool.{i}" for i in range(facts.positions) for side in ("in", "out")} | {"final_pool"}
    missing = sorted((wanted | {f"mid.{i}.final_pool" for i in facts.mid}) - arrays.keys())
    if missing:
        raise FixtureError(f"{case.name}: damaged", why=f"arrays are missing: {', '.join(missing)}")
    beside = (
        re.compile(r"(mid\.\d+\.)?(" + "|".join(map(re.escape, facts.extras)) + r"|.*_index)") if facts.extras else None
    )
    return {name for name in arrays if beside is None or not beside.fullmatch(name)}


def _check_layouts(case: FoundCase, facts: EncoderFacts, prepared: Prepared) -> None:
    encoder = prepared.encoder
    found = {i: {side: encoder.layout(i, side) for side in ("in", "out")} for i in range(encoder.positions)}
    said = {i: {side: shape[1:] for side, shape in sides.items()} for i, sides in facts.shapes.items()}
    if encoder.positions != facts.positions or found != said:
        raise FixtureError(
            f"{case.name}: the encoder's positions are not those of the original",
            why=f"here {encoder.positions}: {found}; there {facts.positions}: {said}",
        )


def _time(prepared: Prepared) -> float:
    """Seconds a window of one pass; it is not the first, which also sets things up."""
    begin = time.perf_counter()
    prepared.encoder(prepared.windows)
    return (time.perf_counter() - begin) / len(prepared.windows)


def _run_preprocessing(case: FoundCase) -> CaseResult:
    facts, arrays = preprocessing_facts(case), arrays_of(case)
    if case.entry not in arrays:
        raise FixtureError(f"{case.name}: damaged", why=f"arrays are missing: {case.entry}")
    raw = made_signal(case.name, facts.input)
    model = case.entry.partition("_")[0]
    begin = time.perf_counter()
    found = _prepared(case, facts, model, raw)
    seconds = time.perf_counter() - begin
    if found.shape != facts.output_shape:
        raise FixtureError(f"{case.name}: computed {found.shape}, the original {facts.output_shape}")
    error = error_of(case.name, _stored(case, facts, found), arrays[case.entry])
    return CaseResult(
        name=case.name,
        model=model,
        preprocessing=error,
        worst=case.entry,
        arrays=1,
        seconds_a_window=seconds / (len(raw) if raw.ndim == 3 else 1),
    )


def _prepared(case: FoundCase, facts: PreprocessingFacts, model: str, raw: Tensor) -> NDArray[Any]:
    """Recordings are `(n,)` or `(channels, n)`; epochs are `(epochs, channels, n)`, each by itself."""
    if case.entry.endswith("_scalogram"):
        return scalogram(raw[None])[0].numpy()
    if model != "constant" and model not in _RECIPES:
        raise FixtureError(
            f"{case.name}: unknown model '{model}'",
            why=f"known: {', '.join(_RECIPES)}",
            fix="use a version of fedbridge that has this model",
        )
    rate = facts.input.rate_hz
    if rate is None:
        raise FixtureError(f"{case.name}: damaged", why="its input has no rate_hz")
    steps = _CONSTANT if model == "constant" else _RECIPES[model]
    if raw.ndim == 3:
        steps = steps.by_window()
        epochs = [prepare_run(epoch, rate, facts.rate_out_hz, steps) for epoch in raw.numpy()]
        found = finish_windows(np.stack(epochs), steps)
    else:
        whole = prepare_run(np.atleast_2d(raw.numpy()), rate, facts.rate_out_hz, steps)
        found = finish_windows(whole[None], steps, whole)[0].reshape(*raw.shape[:-1], -1)
    # The format's LaBraM stays in microvolts; here hundreds of them are the model's unit.
    return found / np.float32(steps.scale)


def _stored(case: FoundCase, facts: PreprocessingFacts, found: NDArray[Any]) -> NDArray[Any]:
    """The part of the result that the fixtures keep."""
    if facts.stored == "all":
        return found
    part = re.fullmatch(r"item (\d+) of axis (\d+)", facts.stored)
    if part is None:
        raise FixtureError(f"{case.name}: damaged", why=f"what is stored is not understood: {facts.stored}")
    kept: NDArray[Any] = np.take(found, int(part[1]), axis=int(part[2]))
    return kept

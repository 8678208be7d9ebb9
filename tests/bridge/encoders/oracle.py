"""Numeric fixtures of the published models: weights, inputs and outputs of the originals, rebuilt from recipes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridge.config import Settings
from bridge.encoders.published import published_model
from bridge.encoders.split import SplitEncoder
from bridge.windows import WindowSpec

TOLERANCE = 1e-4
"""In standard deviations of the reference array, as the fixtures' README says."""


@dataclass(frozen=True)
class Case:
    """One case of the fixtures."""

    folder: Path
    name: str

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.folder / f"{self.name}.json").read_text())
        return facts

    @cached_property
    def arrays(self) -> dict[str, NDArray[np.float32]]:
        with np.load(self.folder / f"{self.name}.npz") as file:
            return dict(file)

    @cached_property
    def fill(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("oracle_fill", self.folder / "oracle_fill.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def checkpoint(self) -> dict[str, Tensor]:
        """The filled state dict in the published file's own names, checked against its digest."""
        keys = json.loads((self.folder / self.facts["checkpoint_keys"]).read_text())["keys"]
        seed, profile = self.facts["seed"], self.facts["profile"]
        state: dict[str, Tensor] = self.fill.fill_checkpoint(keys, seed, profile)
        if self.facts["checkpoint_sha256"]:
            assert self.fill.checkpoint_sha256(state) == self.facts["checkpoint_sha256"]
        return state

    def signal(self) -> Tensor:
        """The input, checked against its digest."""
        recipe = self.facts["input"]
        x: Tensor = self.fill.make_signal(recipe["tag"], tuple(recipe["shape"]), recipe["amplitude"])
        assert self.fill.tensor_sha256(x) == recipe["sha256"]
        return x

    def tokens(self, position: str) -> Tensor:
        """What is written into the input of a block, checked against its digest."""
        recipe = self.facts["mid"][position]
        h: Tensor = self.fill.make_tokens(recipe["tag"], tuple(recipe["shape"]), recipe["scale"])
        assert self.fill.tensor_sha256(h) == recipe["sha256"]
        return h


def converted(
    model: str, loaded: dict[str, Any], window: WindowSpec, digest: str = "0" * 64, **options: str | int
) -> SplitEncoder:
    """The encoder that the product makes of what a published file holds."""
    published = published_model(model)
    tensors, architecture = published.convert(published.unwrap(loaded), window, **options)
    return published.encoder().build(window, architecture, tensors, digest)


def errors(case: Case, encoder: SplitEncoder, x: Tensor) -> dict[str, float]:
    """Each array's largest error in standard deviations of the reference array, from the front and the middle."""
    with torch.no_grad():
        taps = encoder.taps(x, lambda h: h)
        found: dict[str, Tensor] = {}
        for i in range(encoder.positions):
            for side, h in (("in", taps.inputs[i]), ("out", taps.outputs[i])):
                found |= _views(case, h, side, f".{i}", case.facts["row_index"].get(str(i), {}).get(side))
        found |= _views(case, taps.tokens, "final", "", None)
        for place in case.facts["mid"]:
            final = encoder.suffix(case.tokens(place), int(place))
            found |= {f"mid.{place}.{name}": value for name, value in _views(case, final, "final", "", None).items()}
    unknown = {name for name in case.arrays if name.rpartition(".")[2] not in case.facts.get("extras", {})}
    unknown -= {name for name in unknown if name.rpartition(".")[2].endswith("_index")}
    assert unknown <= found.keys(), f"not compared: {sorted(unknown - found.keys())}"
    return {name: _error(found[name], case.arrays[name]) for name in sorted(unknown)}


def _views(case: Case, h: Tensor, what: str, place: str, rows: list[int] | None) -> dict[str, Tensor]:
    views = {f"{what}_full{place}": h, f"{what}_pool{place}": h.mean(1)}
    if what == "final":
        views["final_tokens_sub"] = h[:, case.facts["final_row_index"]]
    elif rows is not None:
        views[f"{what}_rows{place}"] = h[0, rows]
    return views


def _error(found: Tensor, reference: NDArray[np.float32]) -> float:
    assert tuple(found.shape) == reference.shape
    return float(np.abs(found.numpy() - reference).max() / reference.std())


def filled(kind: type[SplitEncoder], window: WindowSpec, architecture: Settings, seed: int = 0) -> SplitEncoder:
    """An encoder with random weights, whatever its architecture."""
    generator = torch.Generator().manual_seed(seed)
    shapes = kind.skeleton(window, architecture).shapes()
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return kind.build(window, architecture, tensors, "0" * 64)


def assert_parity(case: Case, encoder: SplitEncoder, x: Tensor) -> None:
    """Every array of the case is within the tolerance, and every layout is the case's."""
    found = errors(case, encoder, x)
    worst = max(found, key=found.__getitem__)
    assert found[worst] <= TOLERANCE, f"{worst} is off by {found[worst]:.2g}"
    for i in range(encoder.positions):
        for side in ("in", "out"):
            assert list(encoder.layout(i, side)) == case.facts["shapes"][str(i)][side][1:]

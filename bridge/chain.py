"""Inference with the new modality alone, and the folder in which a trained bridge travels.

`new blocks <= m -> mean over tokens -> bridge -> old blocks >= l -> mean over tokens -> task head`. An exported
folder is complete: the bridge, the three frozen models with their cards, and `manifest.json` with the sha256 of every
file. Nothing of the old modality and no recording is needed to load it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from bridge.compute import Compute
from bridge.config import Settings
from bridge.encoders.cards import CARD, WEIGHTS, EncoderCard, HeadCard, read_card
from bridge.encoders.loading import load_encoder
from bridge.encoders.placed import PlacedEncoder
from bridge.encoders.protocol import Encoder, check_position, mean_over_tokens
from bridge.errors import ExportError, WeightsError
from bridge.files import cause, sync_to_disk
from bridge.hashing import sha256_file, sha256_json
from bridge.head import TaskHead, load_head
from bridge.job import Models
from bridge.prototype import PrototypeBridge, check_arrays
from bridge.shape import BridgeShape
from bridge.windows import Preprocessing, WindowSpec

MANIFEST, BRIDGE = "manifest.json", "bridge.safetensors"
MODELS = ("old_encoder", "new_encoder", "task_head")
"""The folders of the frozen models, in an export as in a run's models folder."""

BATCH = 64
"""Windows that run through the networks at a time, the same in evaluation and in inference; a `PlacedEncoder` cuts
them further where memory would not do."""


class InferenceChain:
    """The frozen networks and a bridge between them, from windows of the new modality to the task's classes."""

    def __init__(
        self,
        new_encoder: Encoder,
        bridge: PrototypeBridge,
        old_encoder: Encoder,
        head: TaskHead,
        m: int,
        l: int,  # noqa: E741
    ) -> None:
        """`m` is the input position (output of the new encoder's block), `l` the output position (input of the old
        one's).

        Raises `PositionError` on a position that an encoder lacks, `WeightsError` where the bridge fits neither.
        """
        self.new_encoder, self.bridge, self.old_encoder, self.head = new_encoder, bridge, old_encoder, head
        self.m, self.l = check_position(new_encoder, m), check_position(old_encoder, l)
        _check_fit(bridge.shape, (new_encoder.layout(m, "out")[1], *old_encoder.layout(l, "in")), (m, l))

    def features(self, x: Tensor | NDArray[np.float32]) -> Tensor:
        """What the bridge reads: the pooled output of the new encoder's block `m`, `(windows, d_new)`.

        `x` is `(windows, channels, samples)` of the new modality, preprocessed. Raises `WindowError` on another shape.
        """
        return _batched(lambda part: mean_over_tokens(self.new_encoder.prefix(part, self.m)), x)

    def tokens(self, x: Tensor | NDArray[np.float32]) -> Tensor:
        """The old encoder's final tokens as reached through the bridge, `(windows, tokens, width)`."""
        return _batched(self._final_tokens, self.features(x))

    def logits(self, x: Tensor | NDArray[np.float32]) -> Tensor:
        """The task head's logits, `(windows, classes)`."""
        return self.logits_from_features(self.features(x))

    def logits_from_features(self, h: Tensor | NDArray[np.float32]) -> Tensor:
        """Logits `(windows, classes)` from `h (windows, d_new)`, what `features` gives: evaluation starts from cached
        ones."""
        return _batched(lambda part: self.head(mean_over_tokens(self._final_tokens(part))), h)

    def predict(self, x: Tensor | NDArray[np.float32]) -> NDArray[np.int64]:
        """The class of each window, `(windows,)`, as an index into the head's classes."""
        predicted: NDArray[np.int64] = self.logits(x).argmax(dim=-1).numpy().astype(np.int64)
        return predicted

    def _final_tokens(self, h: Tensor) -> Tensor:
        return self.old_encoder.suffix(self.bridge(h), self.l)


class Manifest(Settings):
    """`manifest.json` of an exported bridge."""

    schema_: Literal["fedbridge.bridge/1"] = Field(default="fedbridge.bridge/1", alias="schema")
    job: str
    """Name of the job that trained it."""
    kept_round: int = Field(ge=0)
    input_position: int = Field(ge=0)
    output_position: int = Field(ge=0)
    kind: Literal["prototype", "factored"] = "prototype"
    """Whether B has a column for each token and prototype, or for each of `cosines` and prototype."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each array of the bridge: A, B, P, and the public constants that it has (mean, whitening, constant)."""
    tokens_old: int = Field(gt=0)
    cosines: int = Field(default=0, ge=0)
    """Cosines that span the token axis of a factored bridge; 0 for the other kind."""
    frozen_prototypes: bool = False
    """Whether the prototypes are public vectors that training left alone."""
    parameters: int = Field(gt=0)
    """Numbers that were trained."""
    classes: tuple[str, ...]
    new_window: WindowSpec
    old_window: WindowSpec
    new_preprocessing: Preprocessing
    old_preprocessing: Preprocessing
    models: Models
    """Digests of the frozen models."""
    files: dict[str, str]
    """sha256 of every other file of the folder, by path."""
    sha256: str = ""
    """Over the rest of this manifest, so that it can't be changed alone."""

    def bridge_shape(self) -> BridgeShape:
        """The sizes of the bridge."""
        rows, rank = self.shapes["A"]
        prototypes, width_old = self.shapes["P"]
        width_new, components = self.shapes.get("whitening", (rows, 0))
        return BridgeShape(
            width_new=width_new,
            rank=rank,
            tokens_old=self.tokens_old,
            prototypes=prototypes,
            width_old=width_old,
            cosines=self.cosines,
            components=components,
            constant="constant" in self.shapes,
            frozen_prototypes=self.frozen_prototypes,
        )

    @model_validator(mode="after")
    def _is_one_bridge(self) -> Manifest:
        if (self.kind == "factored") != (self.cosines > 0):
            raise ValueError(f"a bridge of kind {self.kind} does not have {self.cosines} cosines")
        if {name: len(size) for name, size in self.shapes.items() if name in ("A", "P")} != {"A": 2, "P": 2}:
            raise ValueError("shapes must hold A and P with two sizes each")
        if self.bridge_shape().arrays() != self.shapes:
            raise ValueError("the shapes are not those of one bridge")
        return self


def export_chain(
    folder: Path,
    *,
    models: Path,
    bridge: Mapping[str, NDArray[Any]],
    shape: BridgeShape,
    positions: tuple[int, int],
    job_name: str,
    kept_round: int,
) -> Manifest:
    """Write a complete inference folder in one rename, replacing what was there; return its manifest.

    `models` holds the folders `old_encoder`, `new_encoder` and `task_head`; `bridge` all arrays of `shape`;
    `positions` is `(m, l)`. Raises `WeightsError` where these don't fit each other, `ExportError` where the folder
    can't be written.
    """
    m, l = positions  # noqa: E741
    old, new = (read_card(models / name, EncoderCard) for name in MODELS[:2])
    head = read_card(models / "task_head", HeadCard)
    check_arrays(shape, bridge)
    _check_fit(shape, (new.layout(m, "out")[1], *old.layout(l, "in")), positions)
    manifest = Manifest(
        job=job_name,
        kept_round=kept_round,
        input_position=m,
        output_position=l,
        kind="factored" if shape.cosines else "prototype",
        shapes=shape.arrays(),
        tokens_old=shape.tokens_old,
        cosines=shape.cosines,
        frozen_prototypes=shape.frozen_prototypes,
        parameters=shape.parameters,
        classes=head.classes,
        new_window=new.window,
        old_window=old.window,
        new_preprocessing=new.preprocessing,
        old_preprocessing=old.preprocessing,
        models=Models(old_encoder=old.digest, new_encoder=new.digest, task_head=head.digest),
        files={},
    )
    try:
        return _write(folder, models, bridge, manifest)
    except OSError as error:
        raise ExportError(
            f"{folder}: the bridge can't be exported",
            why=cause(error),
            fix="free space, or choose a folder that can be written",
        ) from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported bridge, checked against its own hash. Raises `ExportError`."""
    path = folder / MANIFEST
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest.model_validate(plain)
    except OSError as error:
        raise ExportError(
            f"{path}: can't be read", why=error.strerror or "", fix="name the folder of an exported bridge"
        ) from error
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, f"it is no manifest of schema fedbridge.bridge/1: {str(error).splitlines()[0]}") from error
    # Over the file's own keys: a folder that was exported before a key existed is still whole.
    if _digest(plain) != manifest.sha256:
        raise _damaged(path, "its content does not hash to what it claims")
    return manifest


def load_chain(folder: Path, compute: Compute | None = None) -> InferenceChain:
    """The chain of an exported folder, after every file was checked against the manifest.

    With `compute`, the encoders run as it says. Raises `ExportError` that names the first missing or changed file.
    """
    manifest = read_manifest(folder)
    needed = {BRIDGE} | {f"{model}/{file}" for model in MODELS for file in (CARD, WEIGHTS)}
    for name in sorted(needed | set(manifest.files)):
        _verify(folder, name, manifest.files.get(name))
    bridge = PrototypeBridge(manifest.bridge_shape())
    bridge.load_arrays(safetensors.numpy.load_file(folder / BRIDGE))
    bridge.eval().requires_grad_(False)
    old, new, head = (folder / name for name in MODELS)
    encoders = [load_encoder(each) for each in (new, old)]
    if compute is not None:
        encoders = [PlacedEncoder(each, compute) for each in encoders]
    return InferenceChain(
        encoders[0],
        bridge,
        encoders[1],
        load_head(head),
        manifest.input_position,
        manifest.output_position,
    )


def _check_fit(shape: BridgeShape, wanted: tuple[int, int, int], positions: tuple[int, int]) -> None:
    """Raise `WeightsError` where a bridge does not go from the new width to the old tokens and width."""
    if (shape.width_new, shape.tokens_old, shape.width_old) != wanted:
        raise WeightsError(
            "the bridge does not fit between positions {} and {}".format(*positions),
            why=f"it goes from width {shape.width_new} to {shape.tokens_old} tokens x {shape.width_old}, the "
            f"encoders need {wanted[0]} to {wanted[1]} x {wanted[2]}",
            fix="use the bridge with the encoders and positions that it was trained for",
        )


def _batched(step: Callable[[Tensor], Tensor], x: Tensor | NDArray[np.float32]) -> Tensor:
    """Run `step` over at most `BATCH` rows at a time without gradients; no rows still tell the result's shape."""
    parts = (x[start : start + BATCH] for start in range(0, max(len(x), 1), BATCH))
    with torch.no_grad():
        # Arrays are copied part by part: cached ones are read-only maps of files.
        return torch.cat([step(p if isinstance(p, Tensor) else torch.tensor(p, dtype=torch.float32)) for p in parts])


def _write(folder: Path, models: Path, bridge: Mapping[str, NDArray[Any]], manifest: Manifest) -> Manifest:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left_over in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(left_over, ignore_errors=True)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        for name in MODELS:
            shutil.copytree(models / name, partial / name)
        tensors = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in bridge.items()}
        (partial / BRIDGE).write_bytes(safetensors.numpy.save(tensors))
        files = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*")) if path.is_file()}
        listed = manifest.model_copy(update={"files": {name: sha256_file(path) for name, path in files.items()}})
        sealed = listed.model_copy(update={"sha256": _digest(listed.model_dump(mode="json", by_alias=True))})
        text = json.dumps(sealed.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False)
        (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
        for path in (*files.values(), partial / MANIFEST):
            sync_to_disk(path)
        _replace(folder, partial)
    finally:
        for left_over in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)
    return sealed


def _replace(folder: Path, partial: Path) -> None:
    """Put `partial` where `folder` is; a folder can't be renamed onto a full one, so the old one steps aside."""
    aside = partial.with_suffix(".aside.partial")
    if folder.exists():
        folder.rename(aside)
    try:
        partial.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
    sync_to_disk(folder.parent)


def _verify(folder: Path, name: str, expected: str | None) -> None:
    pure, path = PurePosixPath(name), folder / name
    if expected is None:
        raise _damaged(folder / MANIFEST, f"it does not list {name}")
    if pure.is_absolute() or ".." in pure.parts:
        raise _damaged(folder / MANIFEST, f"it lists a file outside its folder: {name}")
    try:
        found = sha256_file(path)
    except OSError as error:
        raise _damaged(path, f"it can't be read: {error.strerror}") from error
    if found != expected:
        raise _damaged(path, f"its sha256 is {found[:16]}..., the manifest says {expected[:16]}...")


def _damaged(path: Path, why: str) -> ExportError:
    return ExportError(f"{path}: not the file that was exported", why=why, fix="copy the whole exported folder again")


def _digest(manifest: Mapping[str, Any]) -> str:
    return sha256_json({key: value for key, value in manifest.items() if key != "sha256"})

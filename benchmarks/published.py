"""Full-size published networks at the paper's settings: selection and a training epoch against naive variants.

    python -m benchmarks.published

LaBraM to HuBERT-ECG base at l = 2 and m = 7 on windows as in ISRUC-Sleep, PaPaGei to HuBERT-ECG base at l = 11 and
m = 7 on windows as in WESAD. Weights are random. The naive variants are those of `benchmarks.selection` (in the form
that runs a network once for each of its positions and keeps what the run gave) and of `benchmarks.training`; ours goes
through what a site computes with. Every variant has a process of its own, and all must come to the same result.

Memory is the largest resident memory of the process, and, behind the plus, what it is beyond the loaded libraries:
weights, windows and activations.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import selection, training
from benchmarks.setting import CLASSES, HEADER, in_child, load, measure, peak_mb, row, write
from benchmarks.training import Epoch
from bridge.compute import compute_on
from bridge.encoders.hubert_ecg import HubertEcgArchitecture, HubertEcgEncoder
from bridge.encoders.labram import LabramArchitecture, LabramEncoder
from bridge.encoders.loading import load_encoder
from bridge.encoders.papagei import PapageiArchitecture, PapageiEncoder
from bridge.encoders.placed import PlacedEncoder
from bridge.encoders.split import SplitEncoder
from bridge.head import TaskHead
from bridge.shape import BridgeShape
from bridge.windows import WindowSpec

GOALS = {"selection": 10.0, "training": 3.0, "memory": 2.0}
M, PATIENTS_PER_BATCH, WINDOWS_PER_PATIENT = 7, 4, 4
BATCH = PATIENTS_PER_BATCH * WINDOWS_PER_PATIENT
HUBERT_BASE = HubertEcgArchitecture(
    width=768,
    layers=12,
    heads=12,
    feed_forward=3072,
    filters=(512,) * 5,
    kernels=(10, 3, 3, 2, 2),
    strides=(4, 2, 2, 2, 2),
    place_kernel=128,
    place_groups=16,
)
VARIANTS = {"selection": ("keeping", "ours"), "training": ("naive", "frozen", "ours")}


@dataclass(frozen=True)
class Direction:
    """An old network, the length of windows, and the paper's bridge into the input of its block `l`."""

    title: str
    old: Callable[[], SplitEncoder]
    seconds: int
    l: int  # noqa: E741
    rank: int
    prototypes: int
    learning_rate: float

    def prepare(self, folder: Path, patients: int, windows: int) -> None:
        torch.manual_seed(0)
        ecg = WindowSpec(modality="ECG", channels=("ECG",), rate_hz=100, samples=self.seconds * 100)
        old = self.old().eval().requires_grad_(False)
        write(folder, old, HubertEcgEncoder(ecg, HUBERT_BASE), patients, windows, lambda x: spread_head(old, x))

    def epoch(self, old: SplitEncoder) -> Epoch:
        tokens, width = old.layout(self.l, "in")
        shape = BridgeShape(HUBERT_BASE.width, self.rank, tokens, self.prototypes, width)
        return Epoch(shape, M, self.learning_rate, PATIENTS_PER_BATCH, WINDOWS_PER_PATIENT)


def labram() -> SplitEncoder:
    channels = ("F3", "C3", "O1", "F4", "C4", "O2")
    spec = WindowSpec(modality="EEG", channels=channels, rate_hz=200, samples=30 * 200)
    return LabramEncoder(spec, LabramArchitecture(seconds=30))


def papagei() -> SplitEncoder:
    spec = WindowSpec(modality="PPG", channels=("PPG",), rate_hz=125, samples=60 * 125)
    return PapageiEncoder(spec, PapageiArchitecture())


DIRECTIONS = {
    "labram": Direction("LaBraM to HuBERT-ECG base", labram, 30, 2, 32, 300, 1e-5),
    "papagei": Direction("PaPaGei to HuBERT-ECG base", papagei, 60, 11, 32, 50, 1e-4),
}


def spread_head(old: SplitEncoder, x: torch.Tensor) -> TaskHead:
    """A random head that tells the windows apart; one on random features as they are gives all the same class."""
    with torch.no_grad():
        pooled = torch.cat([old.taps(part).outputs[-1] for part in x.split(8)])
        head = TaskHead(pooled.shape[1], CLASSES)
        head.linear.weight /= pooled.std(dim=0) + 1e-6
        head.linear.bias.copy_(-head.linear.weight @ pooled.mean(dim=0))
    return head


def libraries(*, hubert: bool) -> float:
    """Load what is loaded at first use, so that it does not count as added; the peak memory in MB so far."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.Adam([weight]).step()
    if hubert:
        import transformers.models.hubert.modeling_hubert  # noqa: F401
    return peak_mb()


def select(variant: str, folder: Path, repeats: int) -> dict[str, Any]:
    before, s = libraries(hubert=True), load(folder)
    with torch.inference_mode():
        figures, (scores, similarities) = measure(lambda: selection.VARIANTS[variant](s), repeats, before)
    return figures | {"scores": list(scores), "similarities": list(similarities)}


def train(direction: Direction, variant: str, folder: Path, repeats: int) -> dict[str, Any]:
    if variant == "ours":
        before, old = libraries(hubert=False), load_encoder(folder / "old_encoder")
        assert isinstance(old, SplitEncoder)
        epoch, placed = direction.epoch(old), PlacedEncoder(old, compute_on())
        figures, bridge = measure(lambda: training.ours(folder, placed, epoch, direction.l), repeats, before)
    else:
        before, s = libraries(hubert=True), load(folder)
        epoch = direction.epoch(s.old_encoder)
        s.old_encoder.requires_grad_(variant == "naive")
        figures, bridge = measure(lambda: training.naive(s, epoch, direction.l), repeats, before)
    start = epoch.start().arrays()
    moved = {name: (array - start[name]).ravel()[::97].tolist() for name, array in bridge.items()}
    return figures | {"moved": moved, "parameters": sum(array.size for array in bridge.values())}


def check_selection(found: dict[str, Any], ours: dict[str, Any]) -> None:
    for key in ("scores", "similarities"):
        np.testing.assert_allclose(found[key], ours[key], rtol=0, atol=5e-3, err_msg=f"the variants differ in {key}")
    if len(set(ours["scores"])) == 1:
        raise SystemExit("all positions score the same: nothing was compared")


def check_training(found: dict[str, Any], ours: dict[str, Any]) -> None:
    """Both bridges have moved by the same, to 2 % of the way."""
    for name, moved in ours["moved"].items():
        gap, way = (float(np.linalg.norm(each)) for each in (np.subtract(found["moved"][name], moved), moved))
        if not gap <= 0.02 * way:
            raise SystemExit(f"the variants differ in {name}: by {gap:.3g}, where it moved by {way:.3g}")


def compare(what: str, key: str, folder: Path, repeats: int) -> None:
    """Run all variants of one task, check that they agree, and print them."""
    names = {"keeping": "a run for every position", "naive": "naive", "frozen": "naive, frozen"}
    common = ("--direction", key, "--folder", str(folder), "--repeats", str(repeats))
    found = {v: in_child("benchmarks.published", "--child", f"{what}:{v}", *common) for v in VARIANTS[what]}
    for variant, figures in found.items():
        (check_selection if what == "selection" else check_training)(figures, found["ours"])
        print(row(f"  {names.get(variant, 'fedbridge')}", figures, found["ours"]), flush=True)
    naive, ours = found[VARIANTS[what][0]], found["ours"]
    ratios = {name: naive[name] / ours[name] for name in ("seconds", "peak_mb", "added_mb")}
    print(
        f"  goal: {GOALS[what]:g} x in time, {ratios['seconds']:.1f} x here; {GOALS['memory']:g} x in memory, "
        f"{ratios['peak_mb']:.1f} x here in all, {ratios['added_mb']:.1f} x beyond the libraries"
    )


def child(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    direction, (what, _, variant) = DIRECTIONS[options.direction], options.child.partition(":")
    if what == "prepare":
        direction.prepare(options.folder, options.windows // WINDOWS_PER_PATIENT, WINDOWS_PER_PATIENT)
        return {}
    if what == "cache":
        return training.fill_cache(options.folder, M)
    if what == "selection":
        return select(variant, options.folder, options.repeats)
    return train(direction, variant, options.folder, options.repeats)


def run(key: str, windows: int, repeats: int) -> None:
    direction = DIRECTIONS[key]
    with tempfile.TemporaryDirectory() as name:
        common = ("--direction", key, "--folder", name, "--windows", str(windows))
        in_child("benchmarks.published", "--child", "prepare", *common)
        print(f"{direction.title}, {windows} windows of {direction.seconds} s, l = {direction.l}, m = {M}, one thread")
        print(HEADER)
        print("Selection")
        compare("selection", key, Path(name), repeats)
        once = in_child("benchmarks.published", "--child", "cache", *common)
        print(f"Training epoch, batches of {BATCH}; the cache is filled once, in {once['seconds']:.2f} s")
        compare("training", key, Path(name), repeats)
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--direction", choices=sorted(DIRECTIONS), help="one direction alone")
    parser.add_argument("--windows", type=int, default=32, help=f"windows, a multiple of {BATCH} (default 32)")
    parser.add_argument("--repeats", type=int, default=1, help="timed repeats, the best counts (default 1)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options)))
        return
    if options.windows < BATCH or options.windows % BATCH:
        parser.error(f"--windows must be a multiple of {BATCH}, the size of a batch")
    for key in [options.direction] if options.direction else DIRECTIONS:
        run(key, options.windows, options.repeats)


if __name__ == "__main__":
    main()

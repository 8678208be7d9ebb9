"""One local training epoch for each output position l: cached targets and old blocks >= l, against no cache at all.

    python -m benchmarks.training

The naive variant is what a first version does in every step: the whole new network for the bridge's input (a hook at
m), the whole old network for the target, and the whole old network once more with a hook that overwrites the input of
block l. It comes in two forms: `naive` gives the optimiser the bridge's parameters alone and thinks no further, so
that autograd also computes gradients of the old network's weights, which nobody reads; `naive, frozen` has switched
them off. All variants take the same Adam steps on the same batches and end at the same bridge (checked).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.setting import ARCHITECTURE, HEADER, Setting, blocks_of, in_child, load, measure, prepare, row
from bridge.alignment import aligner
from bridge.encoders.protocol import Encoder
from bridge.job import AlignmentJob
from bridge.privacy import Batch, NoPrivacy, TrainPlan
from bridge.prototype import PrototypeBridge, initial_arrays
from bridge.shape import BridgeShape

GOAL = 2.0


@dataclass(frozen=True)
class Epoch:
    """What is trained, and on how many windows a step."""

    shape: BridgeShape
    m: int
    learning_rate: float
    patients_per_batch: int
    windows_per_patient: int

    def rows(self, windows: int) -> Iterator[np.ndarray]:
        """Every window once, `(patients, windows)` row numbers a batch."""
        size = self.patients_per_batch * self.windows_per_patient
        order = np.random.default_rng(0).permutation(windows)
        for first in range(0, windows - size + 1, size):
            yield np.sort(order[first : first + size]).reshape(self.patients_per_batch, self.windows_per_patient)

    def start(self) -> PrototypeBridge:
        bridge = PrototypeBridge(self.shape)
        bridge.load_arrays(initial_arrays(self.shape, seed=0))
        return bridge


COMPACT = Epoch(BridgeShape(ARCHITECTURE.width, 8, ARCHITECTURE.tokens, 32, ARCHITECTURE.width), 3, 1e-3, 8, 8)


def naive(s: Setting, epoch: Epoch, l: int) -> dict[str, np.ndarray]:  # noqa: E741
    bridge, reads, writes = epoch.start(), blocks_of(s.new_encoder)[epoch.m], blocks_of(s.old_encoder)[l]
    optimiser = torch.optim.Adam(bridge.parameters(), lr=epoch.learning_rate)
    for rows in epoch.rows(len(s.patients)):
        flat = rows.ravel()
        with torch.no_grad():
            target = s.old_encoder(s.old[flat])
            seen: list[Tensor] = []
            reading = reads.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
            s.new_encoder(s.new[flat])
            reading.remove()
        native = s.old_encoder.from_tokens(bridge(s.new_encoder.to_tokens(seen[0]).mean(dim=1)), l)

        def overwrite(_: nn.Module, __: tuple[Tensor, ...], native: Tensor = native) -> tuple[Tensor]:
            return (native,)

        writing = writes.register_forward_pre_hook(overwrite)
        reached = s.old_encoder(s.old[flat])
        writing.remove()
        cosine = nn.functional.cosine_similarity(reached.flatten(1), target.flatten(1))
        loss = (1 - cosine).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return bridge.arrays()


def ours(folder: Path, old_encoder: Encoder, epoch: Epoch, l: int) -> dict[str, np.ndarray]:  # noqa: E741
    """Neither the recordings nor the new network are needed once the cache is filled."""
    features = np.load(folder / "features.npy", mmap_mode="r")
    targets = np.load(folder / "targets.npy", mmap_mode="r")
    mask = torch.ones(epoch.patients_per_batch, epoch.windows_per_patient, dtype=torch.bool)
    rows = epoch.rows(len(features))
    batches = (Batch(torch.from_numpy(features[r]), torch.from_numpy(targets[r]), mask) for r in rows)
    plan = TrainPlan(learning_rate=epoch.learning_rate, align=aligner(AlignmentJob(), old_encoder, l))
    bridge = epoch.start()
    update = NoPrivacy().site_update(bridge, batches, plan).update
    return {name: array + update[name] for name, array in bridge.arrays().items()}


def fill_cache(folder: Path, m: int) -> dict[str, float]:
    """Compute once what every epoch of every l reads: in the product this is the pass that selection has paid
    already."""
    torch.set_num_threads(1)
    s, begin = load(folder), time.process_time()
    with torch.no_grad():
        features = torch.cat([s.new_encoder.taps(part).outputs[m] for part in s.new.split(64)])
        targets = torch.cat([s.old_encoder.taps(part).tokens for part in s.old.split(64)])
    np.save(folder / "features.npy", features.numpy())
    np.save(folder / "targets.npy", targets.numpy())
    return {"seconds": time.process_time() - begin}


def child(variant: str, folder: Path, l: int, repeats: int) -> dict[str, Any]:  # noqa: E741
    if variant == "cache":
        return fill_cache(folder, COMPACT.m)
    torch.set_num_threads(1)
    setting = load(folder)
    if variant == "naive":
        setting.old_encoder.requires_grad_(True)
    old_encoder = setting.old_encoder
    if variant == "ours":
        del setting

    def work() -> dict[str, np.ndarray]:
        return ours(folder, old_encoder, COMPACT, l) if variant == "ours" else naive(setting, COMPACT, l)

    figures, bridge = measure(work, repeats)
    return figures | {"bridge": {name: array.ravel()[::97].tolist() for name, array in bridge.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patients", type=int, default=50, help="patients of the site (default 50)")
    parser.add_argument("--windows", type=int, default=16, help="windows of each (default 16)")
    parser.add_argument("--repeats", type=int, default=2, help="timed repeats, the best counts (default 2)")
    parser.add_argument("--child", choices=("naive", "frozen", "ours", "cache"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--l", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.folder, options.l, options.repeats)))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options.patients, options.windows)
        common = ("--folder", name, "--repeats", str(options.repeats))
        once = in_child("benchmarks.training", "--child", "cache", *common)
        windows = f"{options.patients} patients x {options.windows} windows of 10 s"
        print(f"Training epoch, {windows}, m = {COMPACT.m}, one thread;")
        print(f"the cache is filled once in {once['seconds']:.2f} s, by the pass that selection takes anyway")
        print(HEADER)
        ratios: dict[str, list[float]] = {"naive": [], "frozen": []}
        for l in range(ARCHITECTURE.blocks):  # noqa: E741
            arguments = ("--l", str(l), *common)
            found = {v: in_child("benchmarks.training", "--child", v, *arguments) for v in ("naive", "frozen", "ours")}
            for variant, name_ in (("naive", "naive"), ("frozen", "naive, frozen"), ("ours", "fedbridge")):
                print(row(f"l = {l}  {name_}", found[variant], found["ours"]), flush=True)
            for variant, values in ratios.items():
                values.append(found[variant]["seconds"] / found["ours"]["seconds"])
                for key, array in found["ours"]["bridge"].items():
                    np.testing.assert_allclose(found[variant]["bridge"][key], array, rtol=0, atol=2e-3)
    lowest = ", ".join(f"{min(values):.1f} x against {variant}" for variant, values in ratios.items())
    print(f"goal: at least {GOAL:g} x for each l; lowest here {lowest}")


if __name__ == "__main__":
    main()

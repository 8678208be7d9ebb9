"""A private training step against the plain one, and the methods of summing clipped gradients against each other.

    python -m benchmarks.private_step

Both take Adam steps on the same batches of cached features and targets. `local` is the whole step of DP-SGD: patients'
gradients, clip, sum, noise, Adam. `ghost`, `materialised` and `loop` are its sum of clipped gradients alone, by each
method.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.setting import ARCHITECTURE, HEADER, in_child, load, measure, prepare, row
from benchmarks.training import RATE, M, epoch_rows, fill_cache
from bridge.alignment import aligner
from bridge.job import AlignmentJob
from bridge.privacy import Batch, LocalPrivacy, NoPrivacy, TrainPlan
from bridge.privacy.gradients import clipped_sum
from bridge.privacy.noise import NoiseSource
from bridge.prototype import PrototypeBridge, initial_arrays
from bridge.shape import BridgeShape

GOAL, CLIP = 1.5, 0.1
WIDTH, TOKENS = ARCHITECTURE.width, ARCHITECTURE.tokens
SHAPES = {
    "prototype": BridgeShape(WIDTH, 8, TOKENS, 32, WIDTH),
    "factored": BridgeShape(WIDTH, 8, TOKENS, 32, WIDTH, cosines=4, frozen_prototypes=True),
}
VARIANTS = ("plain", "local", "ghost", "materialised", "loop")


def child(variant: str, kind: str, folder: Path, l: int, repeats: int) -> dict[str, Any]:  # noqa: E741
    torch.set_num_threads(1)
    setting = load(folder)
    features = np.load(folder / "features.npy", mmap_mode="r")
    targets = np.load(folder / "targets.npy", mmap_mode="r")
    batches = []
    for rows in epoch_rows(len(features)):
        mask = torch.ones(rows.shape, dtype=torch.bool)
        batches.append(Batch(torch.from_numpy(features[rows]), torch.from_numpy(targets[rows]), mask))
    bridge = PrototypeBridge(SHAPES[kind])
    bridge.load_arrays(initial_arrays(SHAPES[kind], seed=0))
    align = aligner(AlignmentJob(), setting.old_encoder, l)

    def step() -> None:
        noise = NoiseSource.from_system()
        plan = TrainPlan(
            learning_rate=RATE,
            local_steps=len(batches),
            clip=CLIP,
            noise_multiplier=1.0,
            sampling_rate=0.2,
            divisor=8.0,
            align=align,
            noise=noise,
        )
        (LocalPrivacy() if variant == "local" else NoPrivacy()).site_update(bridge, batches, plan)

    def sums() -> None:
        for batch in batches:
            clipped_sum(bridge, batch, align, CLIP, variant)  # type: ignore[arg-type]

    work: Callable[[], None] = step if variant in ("plain", "local") else sums
    figures, _ = measure(work, repeats)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patients", type=int, default=40, help="patients of the site (default 40)")
    parser.add_argument("--windows", type=int, default=16, help="windows of each (default 16)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats, the best counts (default 3)")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=tuple(SHAPES), default="prototype", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--l", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.kind, options.folder, options.l, options.repeats)))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options.patients, options.windows)
        fill_cache(Path(name))
        steps = options.patients * options.windows // 64
        print(f"{steps} steps of 8 patients x 8 windows, m = {M}, one thread; ratios to the plain step")
        print(HEADER)
        ratios: list[float] = []
        for kind, shape in SHAPES.items():
            for l in (0, ARCHITECTURE.blocks // 2, ARCHITECTURE.blocks - 1):  # noqa: E741
                common = ("--folder", name, "--repeats", str(options.repeats), "--kind", kind, "--l", str(l))
                found = {v: in_child("benchmarks.private_step", "--child", v, *common) for v in VARIANTS}
                print(f"{kind}, {shape.parameters} parameters, l = {l}")
                for variant in VARIANTS:
                    print(row(f"  {variant}", found[variant], found["plain"]), flush=True)
                ratios.append(found["local"]["seconds"] / found["plain"]["seconds"])
    print(f"goal: at most {GOAL:g} x the plain step; largest here {max(ratios):.2f} x")


if __name__ == "__main__":
    main()

"""Selection of both positions: one tapped pass of each network against both networks run again for every position.

    python -m benchmarks.selection

Both variants compute the same scores with the same statistics (checked); what differs is how they come to the features.
The naive one is what a first version does: a forward hook at one position, the whole network run, and so for each
position.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.setting import CLASSES, HEADER, Setting, blocks_of, in_child, load, measure, prepare, row
from bridge.cka import similarity_scores
from bridge.compute import compute_on
from bridge.encoders.placed import PlacedEncoder
from bridge.encoders.protocol import Encoder
from bridge.encoders.split import SplitEncoder
from bridge.probe import probe_scores
from bridge.selection import choose_position

BATCH, FOLDS, GOAL = 64, 5, 4.0


def hooked(network: SplitEncoder, i: int, x: Tensor, *, side: str) -> tuple[Tensor, Tensor]:
    """Run the whole network over all windows; the pooled input or output of block `i`, and the final tokens pooled."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(network.to_tokens(inputs[0] if side == "in" else output).mean(dim=1))

    handle = blocks_of(network)[i].register_forward_hook(hook)
    final = torch.cat([network(part).mean(dim=1) for part in x.split(BATCH)])
    handle.remove()
    return torch.cat(seen), final


def naive(s: Setting) -> tuple[Any, Any]:
    scores, last = [], s.old_encoder.positions - 1
    for i in range(s.new_encoder.positions):
        features, _ = hooked(s.new_encoder, i, s.new, side="out")
        _, final = hooked(s.old_encoder, last, s.old, side="out")
        labels = s.head(final).argmax(dim=1).numpy()
        scores.append(probe_scores([features.numpy()], labels, s.patients, CLASSES, FOLDS, "key")[0])
    m = choose_position(scores)
    similarities = []
    for i in range(s.old_encoder.positions):
        chosen, _ = hooked(s.new_encoder, m, s.new, side="out")
        inputs, _ = hooked(s.old_encoder, i, s.old, side="in")
        similarities.append(similarity_scores(chosen.numpy(), [inputs.numpy()])[0])
    return np.array(scores), np.array(similarities)


def keeping(s: Setting) -> tuple[Any, Any]:
    """As `naive`, but what a run gave is kept: one run of a network for each of its positions."""
    features = [hooked(s.new_encoder, i, s.new, side="out")[0].numpy() for i in range(s.new_encoder.positions)]
    runs = [hooked(s.old_encoder, i, s.old, side="in") for i in range(s.old_encoder.positions)]
    labels = s.head(runs[-1][1]).argmax(dim=1).numpy()
    return judged(s, labels, features, [inputs.numpy() for inputs, _ in runs])


def judged(s: Setting, labels: Any, features: list[Any], inputs: list[Any]) -> tuple[Any, Any]:
    scores = probe_scores(features, labels, s.patients, CLASSES, FOLDS, "key")
    return scores, similarity_scores(features[choose_position(scores)], inputs)


def tapped(encoder: Encoder, x: Tensor) -> tuple[list[Any], list[Any]]:
    """Every position's pooled input and output, `(windows, width)` each, from one pass over the windows."""
    passes = [(taps.inputs, taps.outputs) for taps in map(encoder.taps, x.split(BATCH))]
    inputs, outputs = zip(*passes, strict=True)
    return pooled(inputs), pooled(outputs)


def pooled(passes: Sequence[tuple[Tensor, ...]]) -> list[Any]:
    return [torch.cat(parts).numpy() for parts in zip(*passes, strict=True)]


def ours(s: Setting) -> tuple[Any, Any]:
    compute = compute_on()
    _, features = tapped(PlacedEncoder(s.new_encoder, compute), s.new)
    inputs, outputs = tapped(PlacedEncoder(s.old_encoder, compute), s.old)
    labels = s.head(torch.from_numpy(outputs[-1])).argmax(dim=1).numpy()
    return judged(s, labels, features, inputs)


VARIANTS = {"naive": naive, "keeping": keeping, "ours": ours}


def child(variant: str, folder: Path, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    setting = load(folder)
    with torch.no_grad():
        figures, (scores, similarities) = measure(lambda: VARIANTS[variant](setting), repeats)
    return figures | {"scores": list(scores), "similarities": list(similarities)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patients", type=int, default=50, help="patients of the site (default 50)")
    parser.add_argument("--windows", type=int, default=16, help="windows of each (default 16, a job's default)")
    parser.add_argument("--repeats", type=int, default=2, help="timed repeats, the best counts (default 2)")
    parser.add_argument("--child", choices=sorted(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.folder, options.repeats)))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options.patients, options.windows)
        common = ("--folder", name, "--repeats", str(options.repeats))
        first, second = (in_child("benchmarks.selection", "--child", each, *common) for each in ("naive", "ours"))
    for key in ("scores", "similarities"):
        np.testing.assert_allclose(first[key], second[key], rtol=0, atol=5e-3, err_msg=f"the variants differ in {key}")
    print(f"Selection, {options.patients} patients x {options.windows} windows of 10 s, 5 + 5 positions, one thread")
    print(HEADER)
    print(row("a pass for every position", first, second))
    print(row("fedbridge: one tapped pass", second, second))
    print(f"goal: at least {GOAL:g} x")


if __name__ == "__main__":
    main()

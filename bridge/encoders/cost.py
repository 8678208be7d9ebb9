"""How much memory a network's pass takes: the most bytes that its tensors have at one time, measured while it runs.

Counted are the tensors that torch's operations make, as long as anything holds them: of a training pass, so, also what
the graph keeps for the backward pass. Weights and inputs were there before. What an operation needs inside itself and
gives back is not seen; `MARGIN` stands for that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MARGIN = 1.5
"""Bytes of a pass in units of those of its tensors."""


def inference_bytes(step: Callable[[], Any]) -> int:
    """Bytes that `step` needs without gradients, its results included."""
    with torch.no_grad(), _Living() as living:
        step()
    return int(MARGIN * living.peak)


def training_bytes(step: Callable[[Tensor], Tensor], h: Tensor) -> int:
    """Bytes that `step(h)` and its backward pass to `h` need together."""
    start = h.detach().requires_grad_()
    with torch.enable_grad(), _Living() as living:
        torch.autograd.grad(step(start).sum(), start)
    return int(MARGIN * living.peak)


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made while it is active, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            # A view shares the memory of what it is given, which is a weight's as often as not.
            if isinstance(each, Tensor) and _key(each) not in given | self._known:
                self._add(each)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

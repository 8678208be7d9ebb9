"""Bytes of a pass, against counts by hand."""

from __future__ import annotations

import torch

from bridge.encoders.cost import MARGIN, inference_bytes, training_bytes

NUMBERS = 1000
SIZE = 4 * NUMBERS


def test_what_is_let_go_no_longer_counts_and_views_never_do() -> None:
    x, weight = torch.randn(NUMBERS), torch.randn(NUMBERS, 1)

    def chain() -> torch.Tensor:
        h = x.view(10, -1)
        for _ in range(5):
            h = (h.exp()).t()  # two of them live at a time
        return h * weight.t().reshape(100, 10)

    assert inference_bytes(chain) == int(MARGIN * 2 * SIZE)


def test_results_that_are_kept_count_together() -> None:
    x = torch.randn(NUMBERS)
    assert inference_bytes(lambda: [x + i for i in range(7)]) == int(MARGIN * 7 * SIZE)
    assert inference_bytes(lambda: x) == 0


def test_training_counts_what_the_graph_keeps_and_the_way_back() -> None:
    h = torch.randn(1, NUMBERS)

    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = x.exp()  # each result is kept for the backward pass
        return x

    found = training_bytes(deep, h)
    # Six results and one gradient, a few single numbers beside.
    assert int(MARGIN * 7 * SIZE) <= found <= int(MARGIN * (7 * SIZE + 64))
    assert inference_bytes(lambda: deep(h)) == int(MARGIN * 2 * SIZE)
    assert h.grad is None

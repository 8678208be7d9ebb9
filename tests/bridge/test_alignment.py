"""Alignment losses against plain numpy loops, masks, negatives, and the start of training at zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bridge.alignment import NORM_FLOOR, aligner, alignment_loss
from bridge.encoders.compact import CompactEncoder
from bridge.errors import PositionError
from bridge.job import AlignmentJob
from bridge.privacy import Batch

MASK = torch.tensor([[True, True, True, False], [False, True, False, True], [False] * 4, [True, False, False, False]])
KINDS = ("cosine", "mse", "l1", "infonce")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(
    p: np.ndarray, t: np.ndarray, mask: np.ndarray, loss: str, negatives: str, temperature: float
) -> list[float]:
    """One patient, one window, one entry at a time."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * b).sum() / (np.sqrt((a**2).sum()) * np.sqrt((b**2).sum())))

    everyone = [(i, j) for i in range(len(mask)) for j in range(mask.shape[1]) if mask[i, j]]
    out = []
    for i in range(len(mask)):
        values = []
        for j in range(mask.shape[1]):
            if not mask[i, j]:
                continue
            if loss == "cosine":
                values.append(1 - cosine(p[i, j], t[i, j]))
            elif loss == "mse":
                values.append(sum(d * d for d in (p[i, j] - t[i, j]).ravel()) / p[i, j].size)
            elif loss == "l1":
                values.append(sum(abs(d) for d in (p[i, j] - t[i, j]).ravel()) / p[i, j].size)
            else:
                candidates = [pair for pair in everyone if negatives == "batch" or pair[0] == i]
                exponentials = [np.exp(cosine(p[i, j], t[pair]) / temperature) for pair in candidates]
                values.append(-np.log(np.exp(cosine(p[i, j], t[i, j]) / temperature) / sum(exponentials)))
        out.append(sum(values) / len(values) if values else 0.0)
    return out


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("negatives", ["batch", "patient"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_losses_equal_loops(loss: str, negatives: str, temperature: float) -> None:
    p, t = draw(1, 4, 4, 3, 5), draw(2, 4, 4, 3, 5)
    found = alignment_loss(p, t, MASK, loss=loss, negatives=negatives, temperature=temperature)
    expected = looped(p.numpy(), t.numpy(), MASK.numpy(), loss, negatives, temperature)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)
    assert expected[0] > 0.1


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("negatives", ["batch", "patient"])
def test_gradients_are_those_of_finite_differences_and_masked_windows_have_none(loss: str, negatives: str) -> None:
    p, t = draw(3, 4, 4, 2, 3).requires_grad_(), draw(4, 4, 4, 2, 3)

    def total(x: Tensor) -> Tensor:
        return alignment_loss(x, t, MASK, loss=loss, negatives=negatives, temperature=0.5)

    assert torch.autograd.gradcheck(total, (p,))
    (gradient,) = torch.autograd.grad(total(p).sum(), p)
    assert torch.equal(gradient[~MASK], torch.zeros_like(gradient[~MASK]))


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("negatives", ["batch", "patient"])
def test_a_patient_without_windows_costs_nothing(loss: str, negatives: str) -> None:
    p, t = draw(5, 3, 2, 2, 3).requires_grad_(), draw(6, 3, 2, 2, 3)
    nobody = torch.zeros(3, 2, dtype=torch.bool)
    found = alignment_loss(p, t, nobody, loss=loss, negatives=negatives)
    assert torch.equal(found, torch.zeros(3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found.sum(), p)
    assert torch.equal(gradient, torch.zeros_like(p))


@pytest.mark.parametrize("loss", KINDS)
def test_with_patient_negatives_another_patient_changes_nothing(loss: str) -> None:
    p, t = draw(7, 4, 4, 2, 3), draw(8, 4, 4, 2, 3)
    before = alignment_loss(p, t, MASK, loss=loss, negatives="patient")
    other_p, other_t, other_mask = p.clone(), t.clone(), MASK.clone()
    other_p[1] = draw(9, 4, 2, 3) * 50
    other_t[1] = draw(10, 4, 2, 3) * 50
    other_mask[1] = torch.tensor([True, False, True, False])
    after = alignment_loss(other_p, other_t, other_mask, loss=loss, negatives="patient")
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], rtol=0, atol=1e-14)
    assert after[1] != before[1]


def test_with_batch_negatives_every_unmasked_window_counts_and_no_masked_one() -> None:
    p, t = draw(11, 4, 4, 2, 3), draw(12, 4, 4, 2, 3)
    before = alignment_loss(p, t, MASK, loss="infonce", negatives="batch")
    seen, unseen = t.clone(), t.clone()
    seen[1, 1] = p[0, 0]
    unseen[1, 0] = p[0, 0]
    assert alignment_loss(p, seen, MASK, loss="infonce", negatives="batch")[0] > before[0] + 0.1
    assert torch.equal(alignment_loss(p, unseen, MASK, loss="infonce", negatives="batch"), before)


def test_one_window_has_no_patient_negatives() -> None:
    p, t = draw(13, 4, 4, 2, 3).requires_grad_(), draw(14, 4, 4, 2, 3)
    lone = alignment_loss(p, t, MASK, loss="infonce", negatives="patient")[3]
    assert lone.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(lone, p)[0].abs().max() < 1e-12


@pytest.mark.parametrize("loss", KINDS)
def test_identical_tokens_are_aligned(loss: str) -> None:
    t = draw(15, 4, 4, 2, 30)
    found = alignment_loss(t, t, MASK, loss=loss, temperature=0.01)
    np.testing.assert_allclose(found, 0.0, atol=1e-12)


def test_cosine_at_zero_points_to_the_target_with_a_bounded_gradient() -> None:
    t = draw(16, 1, 3, 4, 5)
    p = torch.zeros_like(t).requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    found = alignment_loss(p, t, mask)
    assert found.item() == 1.0
    (gradient,) = torch.autograd.grad(found.sum(), p)
    for j in range(3):
        length = t[0, j].norm()
        expected = -t[0, j] / (NORM_FLOOR * length**2) / 3
        torch.testing.assert_close(gradient[0, j], expected)


@pytest.mark.parametrize("loss", ["cosine", "infonce"])
def test_a_zero_target_has_finite_gradients(loss: str) -> None:
    for start in (0.0, 1.0):
        p = torch.full((1, 2, 2, 2), start).requires_grad_()
        found = alignment_loss(p, torch.zeros(1, 2, 2, 2), torch.ones(1, 2, dtype=torch.bool), loss=loss)
        (gradient,) = torch.autograd.grad(found.sum(), p)
        assert torch.isfinite(found).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", ["cosine", "mse", "infonce"])
def test_training_leaves_the_zero_start(loss: str) -> None:
    """As in the bridge: a zero matrix B; Adam must turn its output towards the targets within a round's steps."""
    features, t = draw(17, 4, 6, 8).float(), None
    b = torch.zeros(8, 12, requires_grad=True)
    t = (features @ draw(18, 8, 12).float()).unflatten(-1, (3, 4))
    optimiser = torch.optim.Adam([b], lr=0.05)
    mask = torch.ones(4, 6, dtype=torch.bool)
    losses = []
    for _ in range(100):
        value = alignment_loss((features @ b).unflatten(-1, (3, 4)), t, mask, loss=loss).mean()
        losses.append(value.item())
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert losses[-1] < 0.15 * losses[0]


def test_the_aligner_judges_at_the_final_layer_window_by_window(encoder: CompactEncoder) -> None:
    tokens = draw(19, 4, 4, 10, 16).float().requires_grad_()
    targets = draw(20, 4, 4, 10, 16).float()
    batch = Batch(features=torch.zeros(4, 4, 1), targets=targets, mask=MASK)
    found = aligner(AlignmentJob(), encoder, 1)(tokens, batch)
    for i in range(4):
        own = []
        for j in range(4):
            if MASK[i, j]:
                final = encoder.suffix(tokens[i, j][None], 1).flatten()
                own.append(1 - torch.nn.functional.cosine_similarity(final, targets[i, j].flatten(), dim=0))
        expected = torch.stack(own).mean() if own else torch.zeros(())
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), tokens)
    assert torch.isfinite(gradient).all()
    assert gradient[MASK].abs().amax(dim=(1, 2)).min() > 0
    assert gradient[~MASK].abs().max() == 0


def test_garbage_in_masked_windows_changes_nothing(encoder: CompactEncoder) -> None:
    tokens, targets = draw(21, 4, 4, 10, 16).float(), draw(22, 4, 4, 10, 16).float()
    align = aligner(AlignmentJob(loss="mse"), encoder, 2)
    before = align(tokens, Batch(torch.zeros(4, 4, 1), targets, MASK))
    tokens[~MASK] = torch.nan
    assert torch.equal(align(tokens, Batch(torch.zeros(4, 4, 1), targets, MASK)), before)


def test_the_aligner_at_the_bridge_layer_skips_the_suffix(encoder: CompactEncoder) -> None:
    tokens, targets = draw(23, 4, 4, 10, 16), draw(24, 4, 4, 10, 16)
    found = aligner(AlignmentJob(layer="bridge", loss="l1"), encoder, 0)(tokens, Batch(tokens, targets, MASK))
    assert torch.equal(found, alignment_loss(tokens, targets, MASK, loss="l1"))


def test_a_batch_of_nobody_gives_zero_that_can_be_differentiated(encoder: CompactEncoder) -> None:
    tokens = draw(25, 2, 3, 10, 16).float().requires_grad_()
    batch = Batch(torch.zeros(2, 3, 1), torch.zeros(2, 3, 10, 16), torch.zeros(2, 3, dtype=torch.bool))
    found = aligner(AlignmentJob(), encoder, 1)(tokens, batch)
    assert torch.equal(found, torch.zeros(2))
    assert torch.autograd.grad(found.sum(), tokens)[0].abs().max() == 0


def test_a_position_that_the_encoder_lacks_is_refused(encoder: CompactEncoder) -> None:
    with pytest.raises(PositionError, match="position 3"):
        aligner(AlignmentJob(), encoder, 3)

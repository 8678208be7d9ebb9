"""The loss between the old encoder's own tokens and those reached through the bridge."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from bridge.encoders.protocol import Encoder, check_position

if TYPE_CHECKING:
    from bridge.job import AlignmentJob
    from bridge.privacy.mechanism import Batch

Loss = Literal["cosine", "mse", "l1", "infonce"]
Negatives = Literal["batch", "patient"]
Align = Callable[[Tensor, "Batch"], Tensor]
"""From the bridge's tokens `(patients, windows, tokens, width)` and their batch to one loss a patient."""

NORM_FLOOR = 0.1
"""A prediction shorter than this share of its target is measured as if it were that long.

A bridge starts at B = 0: its output has no direction, and the plain cosine's gradient is infinite or, with the usual
tiny epsilon, so large that Adam's second moment remembers it for the rest of a round. With this floor the loss is
linear near zero, with a gradient of at most ten times that of a prediction as long as its target, and it is the plain
cosine elsewhere.
"""

_TINY = 1e-12


def alignment_loss(
    predicted: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    loss: Loss = "cosine",
    negatives: Negatives = "batch",
    temperature: float = 0.1,
) -> Tensor:
    """One loss a patient, `(patients,)`: the mean over the patient's unmasked windows, 0 where there is none.

    `predicted` and `target` are `(patients, windows, tokens, width)`, `mask` is `(patients, windows)`, True where a
    window exists. A window's tokens are flattened to one vector, then:

    - `cosine`: 1 - cos(predicted, target) (BioX-Bridge, section 3), see `NORM_FLOOR`;
    - `mse`, `l1`: mean squared or absolute difference over the vector's entries;
    - `infonce`: cross-entropy of picking the window's own target among candidates by cosine over `temperature`.
      Candidates are all unmasked windows of the batch (the paper), or with `negatives="patient"` those of the same
      patient alone, so that a patient's loss depends on that patient only; a patient with one window then has the
      loss 0.
    """
    p, t = predicted.flatten(2), target.flatten(2)
    if loss == "cosine":
        windows = 1.0 - _cosine(p, t)
    elif loss == "mse":
        windows = (p - t).square().mean(dim=-1)
    elif loss == "l1":
        windows = (p - t).abs().mean(dim=-1)
    elif negatives == "patient":
        windows = _infonce(p, t, mask, temperature)
    else:
        flat = _infonce(p.flatten(0, 1)[None], t.flatten(0, 1)[None], mask.flatten()[None], temperature)
        windows = flat.view(mask.shape)
    kept = torch.where(mask, windows, torch.zeros_like(windows))
    return kept.sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def aligner(spec: AlignmentJob, old_encoder: Encoder, l: int) -> Align:  # noqa: E741
    """What turns the bridge's tokens at position `l` into losses: at the final layer through the old suffix, or as
    they are.

    The batch's targets must be the old encoder's final tokens (`layer: final`) or its tokens at the input of `l`
    (`layer: bridge`). Masked windows never enter the suffix.
    """
    check_position(old_encoder, l)

    def align(tokens: Tensor, batch: Batch) -> Tensor:
        if not bool(batch.mask.any()):
            return tokens.flatten(1).sum(dim=1) * 0.0
        if spec.layer == "final":
            final = old_encoder.suffix(tokens[batch.mask], l)
            tokens = final.new_zeros(*batch.mask.shape, *final.shape[1:]).index_put((batch.mask,), final)
        return alignment_loss(
            tokens,
            batch.targets,
            batch.mask,
            loss=spec.loss,
            negatives=spec.negatives,
            temperature=spec.temperature,
        )

    return align


def _cosine(p: Tensor, t: Tensor) -> Tensor:
    """Cosine along the last axis, with the floor on the prediction's length; 0 where the target is zero."""
    target_square = t.square().sum(dim=-1).clamp(min=_TINY**2)
    length = torch.maximum(p.square().sum(dim=-1), NORM_FLOOR**2 * target_square).sqrt()
    return (p * t).sum(dim=-1) / (length * target_square.sqrt())


def _infonce(p: Tensor, t: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """`(groups, n)` losses from `(groups, n, features)`: each row picks its own target among its group's unmasked
    ones."""
    target_square = t.square().sum(dim=-1, keepdim=True).clamp(min=_TINY**2)
    length = torch.maximum(p.square().sum(dim=-1, keepdim=True), NORM_FLOOR**2 * target_square).sqrt()
    logits = (p / length) @ (t / target_square.sqrt()).transpose(1, 2) / temperature
    own = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)[None]
    # A masked row keeps its own column, so that no row is empty: its value is dropped later and its gradient stays
    # finite.
    logits = logits.masked_fill(~(mask[:, None, :] | own), -torch.inf)
    return torch.logsumexp(logits, dim=-1) - logits.diagonal(dim1=1, dim2=2)

"""Exchange weights that were dropped for weights that were kept, as long as that lowers the error
of the layer (SparseSwaps, arXiv:2512.10922). No weight changes.

With e what a row drops of w and g = e H, keeping p and dropping u instead changes e H e^T by

    w_p (w_p H_pp - 2 g_p) + w_u (w_u H_uu + 2 g_u) - 2 w_p w_u H_pu

Shapes: R outputs, C inputs, B rows at a time, S inputs a pair may come from, G such groups, K
candidates of each kind in a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 32
"""Of each kind, those that change least alone; among as few weights every pair is looked at."""
ELEMENTS = 1 << 22
"""Of the pairs looked at together, B * G * K * K: 32 MB."""
LEAST = 1e-12
"""Of a row's error, below which a change is rounding."""


def swapped(weight_RC: Tensor, keep_RC: Tensor, gram_CC: Tensor, most: int, size: int) -> Tensor:
    """The mask, (R, C), after up to ``most`` swaps in each row, the best one first.

    Pairs come from the same ``size`` neighbouring inputs, so that patterns N:M hold.
    """
    pairs = weight_RC.shape[1] // size * min(size, CANDIDATES) ** 2
    rows = max(1, ELEMENTS // pairs)
    parts = zip(weight_RC.double().split(rows), keep_RC.split(rows), strict=True)
    return torch.cat([_swap(weight, keep, gram_CC, most, size) for weight, keep in parts])


def _swap(weight_BC: Tensor, keep_BC: Tensor, gram_CC: Tensor, most: int, size: int) -> Tensor:
    keep_BC = keep_BC.clone()
    alone_BC = weight_BC.square() * gram_CC.diagonal()
    reach_BC = (weight_BC * ~keep_BC) @ gram_CC
    for _ in range(most):
        error_B = (weight_BC * ~keep_BC * reach_BC).sum(1)
        back_BC = (alone_BC - 2 * weight_BC * reach_BC).masked_fill(keep_BC, torch.inf)
        drop_BC = (alone_BC + 2 * weight_BC * reach_BC).masked_fill(~keep_BC, torch.inf)
        change_B, back_B, drop_B = _best(back_BC, drop_BC, weight_BC, gram_CC, size)
        rows = (change_B < -LEAST * error_B).nonzero().flatten()
        if not len(rows):
            break
        back, drop = back_B[rows], drop_B[rows]
        keep_BC[rows, back], keep_BC[rows, drop] = True, False
        reach_BC[rows] += weight_BC[rows, drop, None] * gram_CC[drop]
        reach_BC[rows] -= weight_BC[rows, back, None] * gram_CC[back]
    return keep_BC


def _best(
    back_BC: Tensor, drop_BC: Tensor, weight_BC: Tensor, gram_CC: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the least change by a swap, what comes back and what is dropped for it, (B)."""
    count = min(size, CANDIDATES)
    start_G1 = torch.arange(0, weight_BC.shape[1], size, device=weight_BC.device)[:, None]

    def candidates(cost_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cost_BGK, place_BGK = cost_BC.unflatten(1, (-1, size)).topk(count, largest=False)
        place_BGK = place_BGK + start_G1
        weight_BGK = weight_BC.gather(1, place_BGK.flatten(1)).view_as(cost_BGK)
        return cost_BGK, place_BGK, weight_BGK

    cost_p, p, w_p = (t[..., :, None] for t in candidates(back_BC))
    cost_u, u, w_u = (t[..., None, :] for t in candidates(drop_BC))
    change_BGKK = cost_p + cost_u - 2 * w_p * w_u * gram_CC[p, u]
    change_B, flat_B = change_BGKK.flatten(1).min(1)
    p, u = (t.expand_as(change_BGKK).flatten(1).gather(1, flat_B[:, None])[:, 0] for t in (p, u))
    return change_B, p, u

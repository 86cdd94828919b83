"""Curricula as pure functions of the training step, so checkpoints need not store them."""

import math

import torch
from torch import Tensor


def ect_stage(step: int, pretrain_steps: int, stage_steps: int) -> int:
    """ECT's stage at `step`: -1 for the first `pretrain_steps`, then 0, 1, 2, ... for `stage_steps` each."""
    return -1 if step < pretrain_steps else (step - pretrain_steps) // stage_steps


def ect_gap(sigma: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """The gap Delta t = t - r from `sigma` = t down to the target's level r (Geng et al. 2024, arXiv:2406.14548).

    r = max(0, t (1 - n(t) / q^(stage + 1))) with n(t) = 1 + k sigmoid(-b t). At stage -1 r is 0 for all t, so the
    target is the data, as in diffusion training. As the stage grows, Delta t shrinks to dt.

    Args:
        sigma: t, any shape.
        stage: -1 or more, see `ect_stage`.
        q: factor by which the gap shrinks at each stage, above 1.
        k: how much n(t) widens the gap at small t, at least 0.
        b: how fast this widening falls as t grows, at least 0.
    """
    n = 1 + k * torch.sigmoid(-b * sigma)
    return sigma * (n / q ** (stage + 1)).clamp(max=1)


def ct_scales(step: int, total_steps: int, s0: int = 2, s1: int = 150) -> int:
    """N(k), the number of levels in CT's grid at `step` of `total_steps` (Song et al. 2023, app. C).

    It grows from `s0` to `s1` + 1.
    """
    squared = step / total_steps * ((s1 + 1) ** 2 - s0**2) + s0**2
    return max(math.ceil(math.sqrt(squared) - 1), 1) + 1


def ct_target_decay(scales: int, s0: int = 2, mu0: float = 0.95) -> float:
    """mu(k) = mu0^(s0 / (scales - 1)), the EMA decay of CT's target network (Song et al. 2023, app. C).

    Args:
        scales: number of levels in the grid, at least 2.
        s0: that of `ct_scales`.
        mu0: the base of the decay, in (0, 1].
    """
    return math.exp(s0 * math.log(mu0) / (scales - 1))


def ict_scales(step: int, total_steps: int, s0: int = 10, s1: int = 1280) -> int:
    """N(k), the number of levels in iCT's grid at `step` of `total_steps` (Song & Dhariwal 2023, arXiv:2310.14189).

    It starts at `s0` + 1; N(k) - 1 doubles at even intervals up to `s1` (eq. 10).
    """
    interval = max(1, int(total_steps / (math.log2(s1 // s0) + 1)))
    return min(s0 * 2 ** (step // interval), s1) + 1

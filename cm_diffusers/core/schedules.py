"""Curricula as pure functions of the training step (so that nothing is checkpointed)."""

import math

import torch
from torch import Tensor


def ect_stage(step: int, pretrain_steps: int, stage_steps: int) -> int:
    """ECT's stage at `step`: -1 while pretraining, then 0, 1, 2 ... each of `stage_steps` steps."""
    return -1 if step < pretrain_steps else (step - pretrain_steps) // stage_steps


def ect_gap(sigma: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """The step Delta t = t - r from `sigma` = t down to the target's level r (Geng et al. 2024, arXiv:2406.14548).

    r = max(0, t (1 - n(t) / q^(stage + 1))) with n(t) = 1 + k sigmoid(-b t). At stage -1 this is r = 0 for all t, the
    target is the data, and training is that of a diffusion model; as the stage grows Delta t shrinks to dt.
    """
    n = 1 + k * torch.sigmoid(-b * sigma)
    return sigma * (n / q ** (stage + 1)).clamp(max=1)


def ct_scales(step: int, total_steps: int, s0: int = 2, s1: int = 150) -> int:
    """N(k), the number of levels of CT's grid at `step` of `total_steps` (Song et al. 2023, app. C): s0 ... s1 + 1."""
    squared = step / total_steps * ((s1 + 1) ** 2 - s0**2) + s0**2
    return max(math.ceil(math.sqrt(squared) - 1), 1) + 1


def ct_target_decay(scales: int, s0: int = 2, mu0: float = 0.95) -> float:
    """mu(k), the decay of CT's target average when the grid has `scales` levels (Song et al. 2023, app. C)."""
    return math.exp(s0 * math.log(mu0) / (scales - 1))


def ict_scales(step: int, total_steps: int, s0: int = 10, s1: int = 1280) -> int:
    """N(k) of iCT: s0 + 1, doubled at even intervals up to s1 + 1 (Song & Dhariwal 2023, arXiv:2310.14189, eq. 10)."""
    interval = max(1, int(total_steps / (math.log2(s1 // s0) + 1)))
    return min(s0 * 2 ** (step // interval), s1) + 1

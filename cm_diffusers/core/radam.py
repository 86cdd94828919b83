"""RAdam (Liu et al. 2019, arXiv:1908.03265) by the one-kernel step of Adam."""

import math
from collections.abc import Callable
from typing import Any

import torch


NO_DENOMINATOR = 2.0**60  # an epsilon beside which the square root of the second moment vanishes


def rectified(step: int, lr: float, beta2: float, eps: float) -> tuple[float, float]:
    """The learning rate and epsilon with which a step of Adam is a step of RAdam.

    RAdam multiplies Adam's step by r_t (algorithm 2 of the paper). While it can't estimate the variance, in the first
    5 steps for beta2 = 0.999, it leaves out the denominator. As in `torch.optim.RAdam`, epsilon is added before the
    bias correction of the second moment.

    Args:
        step: number of the step, from 1.
        lr: learning rate of RAdam.
        beta2: decay of the second moment.
        eps: epsilon of RAdam.
    """
    power = beta2**step
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * step * power / (1 - power)
    if length <= 5:
        return lr * NO_DENOMINATOR, NO_DENOMINATOR
    factor = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
    return lr * math.sqrt(factor), eps / math.sqrt(1 - power)


class RAdam(torch.optim.Adam):
    """RAdam with the signature and the steps of `torch.optim.RAdam`, to rounding.

    A step that is skipped by `found_inf`, as gradient scalers set it, counts for r_t.

    Args:
        params: parameters (any shape), or parameter groups.
        lr: learning rate, at least 0.
        betas: decays of the two moments, in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: weight of the L2 penalty, at least 0.
        fused: use one kernel for all parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        fused: bool = True,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused)
        for group in self.param_groups:
            group["taken"] = 0

    def step(self, closure: Callable | None = None) -> Any:
        """Take a step, and return the loss of `closure`, which computes it and the gradients anew if it is given.

        Args:
            closure: returns the loss.
        """
        settings = [(group["lr"], group["eps"]) for group in self.param_groups]
        for group, (lr, eps) in zip(self.param_groups, settings):
            group["taken"] += 1
            group["lr"], group["eps"] = rectified(group["taken"], lr, group["betas"][1], eps)
        try:
            return super().step(closure)
        finally:
            for group, (lr, eps) in zip(self.param_groups, settings):
                group["lr"], group["eps"] = lr, eps

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, also one of `torch.optim.RAdam`, which counts the steps of each tensor alone.

        Args:
            state_dict: from `state_dict`.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            if not group.setdefault("taken", 0):
                steps = (self.state[weight]["step"] for weight in group["params"] if weight in self.state)
                group["taken"] = int(max(steps, default=0))

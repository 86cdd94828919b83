"""In what precision networks compute: the method's choice, and the pass that Accelerate casts."""

import os
from typing import Any

import torch
from torch import nn

from cm_diffusers.objectives import Objective


UNSAID = (None, "no")  # "no" is also what accelerate launch hands on where nobody has said anything


def choose_precision(method: type[Objective], asked: str | None) -> tuple[str, str | None]:
    """What `Accelerator` is told for a run of `method`, and a warning where bf16 was insisted on and does harm.

    On a GPU a method that compares neighbours computes in fp16, which has the 11 bits that it needs, any other in
    bf16, which needs no scaling of the loss, if the GPU has it. Elsewhere all is float32.

    Args:
        method: the method.
        asked: what the run's settings say, None for nothing; then what the launcher was told counts.
    """
    told = asked
    if told is None and (launcher := os.environ.get("ACCELERATE_MIXED_PRECISION")) not in UNSAID:
        told = launcher
    if told is None:
        if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return "no", None
        return ("fp16" if method.compares_neighbours or not torch.cuda.is_bf16_supported() else "bf16"), None
    if told == "bf16" and method.compares_neighbours:
        return told, (
            f"{method.name} compares what a network makes of neighbouring noise levels, and bf16 rounds the difference"
            " away: the gradient's cosine with that in float32 was 0.81 in the last stage of ECT and 0.64 in that of"
            " iCT, with fp16 0.99 and 0.98. Leave --mixed_precision out (fp16 on a GPU), or give no for float32."
        )
    return told, None


class CastPass(nn.Module):
    """A network as it is trained: Accelerate casts this module's forward pass, and not that of the network itself.

    What calls the network itself computes in the precision of its weights, float32: tangents do, compiled or not.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @property
    def adapt_condition(self) -> Any:
        """`adapt_condition` of the network; there is none here where it has none."""
        return self.network.adapt_condition

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

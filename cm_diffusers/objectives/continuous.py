"""A shared part of the methods with tangents: a check before training that the network has tangents."""

from typing import Any

import torch
from torch import nn

from cm_diffusers.core.conditions import call_network, of_classes
from cm_diffusers.core.tangents import MODES, jvp, jvp_ready


JVP_MODES = list(MODES)


def check_tangents(network: nn.Module, mode: str, **second_time: str) -> None:
    """Check that a network has tangents, on two blank images.

    Args:
        network: a diffusers model.
        mode: as in `jvp`; "finite_difference" needs no check. Networks that need prompts show it in their first step.
        second_time: the name of the network's second time input, if it has one.

    Raises:
        NotDifferentiable: in mode "exact", the network has no forward derivative. The message names a remedy.
    """
    if mode == "finite_difference" or hasattr(network, "adapt_condition"):
        return
    parameter = next(network.parameters())
    config: Any = network.config
    size = config.sample_size
    shape = (2, config.in_channels, *((size, size) if isinstance(size, int) else size))
    x, t = torch.zeros(shape, dtype=parameter.dtype), torch.full((2,), 0.5, dtype=parameter.dtype)
    labels = torch.zeros(2, dtype=torch.long, device=parameter.device) if config.num_class_embeds else None
    condition = of_classes(labels)
    x, t = x.to(parameter.device), t.to(parameter.device)

    def function(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times = dict.fromkeys(second_time.values(), t / 2)
        return call_network(network, x, t, condition=condition, **times).sample

    with torch.random.fork_rng([]), jvp_ready(network):
        jvp(function, (x, t), (torch.ones_like(x), torch.ones_like(t)), mode)

"""What the methods with tangents share: whether a network has tangents is found out before training starts."""

from typing import Any

import torch
from torch import nn

from cm_diffusers.core.conditions import call_network, of_classes
from cm_diffusers.core.tangents import MODES, jvp, jvp_ready


JVP_MODES = list(MODES)


def check_tangents(network: nn.Module, mode: str, **second_time: str) -> None:
    """Take a tangent of two blank images.

    Args:
        network: a model of diffusers.
        mode: as in `jvp`.
        second_time: the name of the network's further time input, if it has one.

    Raises:
        NotDifferentiable: in mode "exact", for a network without forward derivative; the message says what to do.
    """
    if mode == "finite_difference":
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

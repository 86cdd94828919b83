"""Networks with frozen weights, such as the base below a low-rank adapter: copies share these weights."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def frozen_weights(network: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters of `network` without a gradient, by their `id`."""
    return {id(weight): weight for weight in network.parameters() if not weight.requires_grad}


def copied(network: nn.Module) -> nn.Module:
    """A copy of `network` with weights of its own, except for the frozen ones, which both networks share."""
    return copy.deepcopy(network, dict(frozen_weights(network)))


def changing_state(module: nn.Module, network: nn.Module) -> dict[str, Tensor]:
    """The state dict of `module`, tensors (any shape) by name, without weights that it shares with `network` frozen.

    Args:
        module: `network` itself, a copy by `copied`, or a module that shares nothing with it.
        network: the network in training.
    """
    state, shared = module.state_dict(), frozen_weights(network)
    if not any(id(weight) in shared for weight in module.parameters()):
        return state
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    return {name: value for name, value in state.items() if name in trained}


def load_changing_state(module: nn.Module, network: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the result of `changing_state`.

    Args:
        module: the module that gave the state, or one like it.
        network: the network in training.
        state: tensors (any shape) by name.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape differs.
    """
    expected = changing_state(module, network)
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise RuntimeError(f"The state lacks {missing[:3]} or has unknown entries {unknown[:3]}.")
    module.load_state_dict(state, strict=False)

"""The learned log-variance of a loss: a head of the network while it trains, left out of what is exported."""

from torch import nn


def with_log_variance(network: nn.Module) -> nn.Module:
    """`network`, with a head if it is one of those that can have it."""
    if hasattr(network, "add_log_variance_head"):
        network.add_log_variance_head()
    return network


def without_log_variance(network: nn.Module) -> nn.Module:
    """`network` without the head."""
    if hasattr(network, "remove_log_variance_head"):
        network.remove_log_variance_head()
    return network

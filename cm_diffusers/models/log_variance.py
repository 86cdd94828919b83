"""The learned log-variance of a loss: a head of the network during training, left out of exported models."""

from torch import nn


def with_log_variance(network: nn.Module) -> nn.Module:
    """Add the log-variance head to `network`, in place, if its class supports one."""
    if hasattr(network, "add_log_variance_head"):
        network.add_log_variance_head()
    return network


def without_log_variance(network: nn.Module) -> nn.Module:
    """Remove the log-variance head from `network`, in place, if its class supports one."""
    if hasattr(network, "remove_log_variance_head"):
        network.remove_log_variance_head()
    return network

"""Laws of the training noise level."""

from torch import Tensor


def lognormal(normal: Tensor, mean: float, std: float) -> Tensor:
    """sigma with ln(sigma) ~ N(mean, std^2), from unit `normal` draws (Karras et al. 2022, table 1)."""
    return (mean + std * normal).exp()

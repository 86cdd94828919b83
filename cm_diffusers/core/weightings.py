"""Loss weights, one per sample (B,)."""

from torch import Tensor


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """1 / c_out^2, which makes the network's own error count alike at all levels (Karras et al. 2022, table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def inverse_gap(gap: Tensor) -> Tensor:
    """1 / (t - r), the weight of iCT and ECT."""
    return 1 / gap


def snr_weight(sigma: Tensor) -> Tensor:
    """1 / sigma^2, the signal-to-noise ratio (Song et al. 2023, app. C)."""
    return sigma**-2


def karras_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """1 / sigma^2 + 1 / sigma_data^2: the same as EDM's, but for the last bit, which recorded losses have."""
    return sigma**-2 + sigma_data**-2

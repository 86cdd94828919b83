"""Loss weights, one per sample (B,)."""

from torch import Tensor


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """1 / c_out^2 at `sigma` (B,), which weighs the network's own error equally at all levels.

    `sigma_data` is the root mean square of the data (Karras et al. 2022, table 1).
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def inverse_gap(gap: Tensor) -> Tensor:
    """1 / (t - r) for the `gap` t - r (B,): the weight of iCT and ECT."""
    return 1 / gap


def snr_weight(sigma: Tensor) -> Tensor:
    """1 / `sigma`^2 (B,), the signal-to-noise ratio (Song et al. 2023, app. C)."""
    return sigma**-2


def karras_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """1 / sigma^2 + 1 / sigma_data^2 at `sigma` (B,).

    It differs from `edm_weight` with the same `sigma_data` in the last bit, on which recorded losses depend.
    """
    return sigma**-2 + sigma_data**-2

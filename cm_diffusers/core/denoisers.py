"""From a network's output to a denoiser D(x, sigma), the estimate of the clean data that every method speaks."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cm_diffusers.core.interpolants import append_dims
from cm_diffusers.core.time_labels import TIME_LABELS


def edm_scalings(sigma: Tensor, sigma_data: float, sigma_min: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in at `sigma`, any shape (Karras et al. 2022, table 1).

    With a floor `sigma_min` > 0 they are those of the consistency models (Song et al. 2023, arXiv:2303.01469, app. C),
    for which D(x, sigma_min) = x; with 0 they are EDM's own, for which D(x, 0) = x.
    """
    shifted = sigma - sigma_min
    norm = (sigma**2 + sigma_data**2).sqrt()
    c_skip = sigma_data**2 / (shifted**2 + sigma_data**2)
    c_out = shifted * sigma_data / norm
    return c_skip, c_out, 1 / norm


@dataclass(frozen=True)
class EDMDenoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, label(sigma)) for a network F.

    Args:
        network: called as `network(sample, label, class_labels=...)`, answering with a tensor in `.sample`.
        sigma_data: root mean square of the data.
        sigma_min: the level at which D is the identity.
        time_label: a key of `TIME_LABELS`.
    """

    network: Callable
    sigma_data: float
    sigma_min: float = 0.0
    time_label: str = "log_sigma"

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Denoise `x` (B, C, H, W), noised to `sigma` (B,); class labels (B,) where the network takes them."""
        c_skip, c_out, c_in = (append_dims(c, x) for c in edm_scalings(sigma, self.sigma_data, self.sigma_min))
        label = TIME_LABELS[self.time_label].from_sigma(sigma, self.sigma_data)
        output = self.network(c_in * x, label, class_labels=class_labels).sample
        return c_skip * x + c_out * output.to(x.dtype)

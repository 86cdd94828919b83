"""Small problems with exact answers: mixtures of Gaussians on the line.

Their posterior mean has a closed form, and on a line the probability-flow ODE keeps the order of points, so it maps
quantiles to quantiles: the exact consistency function, and every jump between noise levels, is the inverse of one
distribution function after another. Samples have the shape (B, 1, 1, 1), that of a grey image with one pixel.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from cm_diffusers.core.draws import Draws, derive_seed


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians on the line, with `sigma_data` 0.5 (its root mean square) where its terms say so."""

    means: tuple[float, ...]
    stds: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def sigma_data(self) -> float:
        second = sum(w * (m**2 + s**2) for m, s, w in zip(self.means, self.stds, self.weights))
        return float(second**0.5)

    def _terms(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By term, last: distance of x (B, ...) from each mean, variance of each term at sigma (B,), log weight."""
        means, stds, weights = (x.new_tensor(v) for v in (self.means, self.stds, self.weights))
        sigma = sigma.reshape(-1, *[1] * x.ndim).to(x)
        return x[..., None] - means, stds**2 + sigma**2, weights.log()

    def sample(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """Data (B, 1, 1, 1) from a uniform and a normal draw (B,) for each."""
        edges = uniform.new_tensor(self.weights).cumsum(0)
        term = torch.searchsorted(edges, uniform, right=True).clamp(max=len(edges) - 1)
        values = uniform.new_tensor(self.means)[term] + uniform.new_tensor(self.stds)[term] * normal
        return values.reshape(-1, 1, 1, 1)

    def denoised(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """E[x0 | x0 + sigma noise = x], the exact denoiser, for x (B, ...) and sigma (B,)."""
        distance, variance, log_weights = self._terms(x, sigma)
        posterior = (log_weights - variance.log() / 2 - distance**2 / (2 * variance)).softmax(-1)
        stds = x.new_tensor(self.stds)
        return (posterior * (x[..., None] - distance * (1 - stds**2 / variance))).sum(-1)

    __call__ = denoised

    def cumulative(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The distribution function of x0 + sigma noise."""
        distance, variance, log_weights = self._terms(x, sigma)
        return (log_weights.exp() * torch.special.ndtr(distance / variance.sqrt())).sum(-1)

    def jump(self, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Where the exact ODE leads from x (B, ...) at sigma to sigma_next (B,), in float64 by bisection."""
        x, sigma, sigma_next = x.double(), sigma.double(), sigma_next.double()
        upper = x > 0  # the side of 0 is folded so that the function keeps its precision in the upper tail
        mirror = Mixture(tuple(-m for m in self.means), self.stds, self.weights)
        quantile = torch.where(upper, mirror.cumulative(-x, sigma), self.cumulative(x, sigma))
        reach = max(abs(m) for m in self.means) + 10 * (max(self.stds) ** 2 + float(sigma_next.max()) ** 2) ** 0.5
        low, high = torch.full_like(x, -reach), torch.full_like(x, reach)
        for _ in range(80):
            middle = (low + high) / 2
            below = torch.where(
                upper,
                mirror.cumulative(-middle, sigma_next) > quantile,
                self.cumulative(middle, sigma_next) < quantile,
            )
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


TASKS = {
    "gaussian": Mixture((0.0,), (0.5,), (1.0,)),
    "bimodal": Mixture((-(0.2**0.5), 0.2**0.5), (0.05**0.5,) * 2, (0.5, 0.5)),
}


class ToyNetwork(nn.Module):
    """A multilayer perceptron with the call of a U-Net, for samples (B, 1, 1, 1) and bounded times (B,)."""

    def __init__(self, width: int = 128, layers: int = 3):
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, sample_size=1, num_class_embeds=None)
        self.register_buffer("frequencies", torch.tensor([1.0, 2.0, 4.0]), persistent=False)
        widths = [1 + 2 * len(self.frequencies), *[width] * layers]
        hidden = [part for a, b in zip(widths, widths[1:]) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 1))
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> SimpleNamespace:
        phases = timestep[:, None] * self.frequencies
        features = torch.cat([sample.flatten(1), phases.sin(), phases.cos()], 1)
        return SimpleNamespace(sample=self.layers(features).reshape(sample.shape))


class ToyDraws(Draws):
    """Draws of a whole batch from one stream: faster than a stream per row, which one process does not need."""

    def _draw(self, sampler, name: str, shape: tuple[int, ...]) -> Tensor:
        generator = self._generator.manual_seed(derive_seed(self.seed, name, self.step))
        return sampler(torch.empty(len(self.rows), *shape), generator=generator)

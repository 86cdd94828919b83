"""Toy problems: mixtures of Gaussians on the line, with exact answers, and shapes in the plane, without them.

The posterior mean of a mixture has a closed form. On a line the probability-flow ODE keeps the order of points, so it
maps quantiles to quantiles. Every exact jump between noise levels, such as the consistency function, is therefore one
distribution function followed by the inverse of another. Samples are images of one pixel with one or two channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from cm_diffusers.core.draws import Draws, SequentialDraws, derive_seed


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians on the line; `sigma_data` is its root mean square.

    Args:
        means: the mean of each component.
        stds: the standard deviation of each component.
        weights: the probability of each component; they sum to 1.
    """

    means: tuple[float, ...]
    stds: tuple[float, ...]
    weights: tuple[float, ...]
    dimensions = 1

    @property
    def sigma_data(self) -> float:
        second = sum(w * (m**2 + s**2) for m, s, w in zip(self.means, self.stds, self.weights))
        return float(second**0.5)

    def _terms(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By component (last): distance of x (B, ...) from its mean, its variance at sigma (B,), its log weight."""
        means, stds, weights = (x.new_tensor(v) for v in (self.means, self.stds, self.weights))
        sigma = sigma.reshape(-1, *[1] * x.ndim).to(x)
        return x[..., None] - means, stds**2 + sigma**2, weights.log()

    def scaled(self, sigma_data: float = 0.5) -> "Mixture":
        """The same mixture, scaled to the root mean square `sigma_data`."""
        factor = sigma_data / self.sigma_data
        return Mixture(tuple(factor * m for m in self.means), tuple(factor * s for s in self.stds), self.weights)

    def sample(self, draws: Draws) -> Tensor:
        """Data (B, 1, 1, 1), one sample per row of `draws`."""
        uniform, normal = draws.uniform("term"), draws.normal("data")
        edges = uniform.new_tensor(self.weights).cumsum(0)
        term = torch.searchsorted(edges, uniform, right=True).clamp(max=len(edges) - 1)
        values = uniform.new_tensor(self.means)[term] + uniform.new_tensor(self.stds)[term] * normal
        return values.reshape(-1, 1, 1, 1)

    def denoised(self, x: Tensor, sigma: Tensor, condition: Any = None) -> Tensor:
        """E[x0 | x0 + sigma noise = x], the exact denoiser, for `x` (B, ...) and `sigma` (B,).

        `condition` is ignored; it lets a mixture take the place of a teacher.
        """
        distance, variance, log_weights = self._terms(x, sigma)
        posterior = (log_weights - variance.log() / 2 - distance**2 / (2 * variance)).softmax(-1)
        stds = x.new_tensor(self.stds)
        return (posterior * (x[..., None] - distance * (1 - stds**2 / variance))).sum(-1)

    __call__ = denoised

    def density(self, x: Tensor) -> Tensor:
        """The density of x0 at `x` (B, ...)."""
        distance, variance, log_weights = self._terms(x, x.new_zeros(()))
        return (log_weights - distance**2 / (2 * variance) - (2 * math.pi * variance).log() / 2).exp().sum(-1)

    def cumulative(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The distribution function of x0 + sigma noise at `x` (B, ...), for `sigma` (B,)."""
        distance, variance, log_weights = self._terms(x, sigma)
        return (log_weights.exp() * torch.special.ndtr(distance / variance.sqrt())).sum(-1)

    def jump(self, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The end at `sigma_next` of the exact ODE from `x` (B, ...) at `sigma`, both (B,): float64, by bisection."""
        x, sigma, sigma_next = x.double(), sigma.double(), sigma_next.double()
        upper = x > 0  # points above 0 are mirrored, so that the distribution function is precise in the upper tail
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


@dataclass(frozen=True)
class Shape:
    """Noisy points of a shape in the plane.

    Args:
        points: the shape, a function from two uniform draws (B,) in [0, 1) to x and y (B,).
        square: mean square per coordinate, without noise, in the scale of `points`.
        noise: standard deviation of the noise, in the scale of `points`.
        sigma_data: root mean square per coordinate, to which samples are scaled.
    """

    points: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    square: float
    noise: float = 0.0
    sigma_data: float = 0.5
    dimensions = 2

    def sample(self, draws: Draws) -> Tensor:
        """Data (B, 2, 1, 1), one sample per row of `draws`."""
        points = torch.stack(self.points(*draws.uniform("place", (2,)).unbind(1)), 1)
        points = points + self.noise * draws.normal("data", (2,))
        return (self.sigma_data / (self.square + self.noise**2) ** 0.5 * points).reshape(-1, 2, 1, 1)


def _moons(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two interlocking half circles of radius 1, an upper and a lower one."""
    side, angle = torch.where(v < 0.5, 1.0, -1.0), math.pi * u
    return side * (angle.cos() - 0.5), side * (angle.sin() - 0.25)


def _checkerboard(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The eight fields of one colour on a four-by-four board over [-1, 1]^2."""
    column, pair = (4 * u).floor(), 2 * v
    return 2 * u - 1, (2 * pair.floor() + column % 2 + pair % 1) / 2 - 1


def _spiral(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A spiral of one and a half turns with about the same density everywhere."""
    radius = u.sqrt()
    angle = 3 * math.pi * radius
    return radius * angle.cos(), radius * angle.sin()


TASKS: dict[str, Mixture | Shape] = {
    "gaussian": Mixture((0.0,), (0.5,), (1.0,)),
    "bimodal": Mixture((-(0.2**0.5), 0.2**0.5), (0.05**0.5,) * 2, (0.5, 0.5)),
    # the four problems of mbreuss/consistency_trajectory_models_toy_task, scaled
    "single_gaussian": Mixture((1.0,), (0.2,), (1.0,)).scaled(),
    "two_gmm": Mixture((-1.5, 1.5), (0.3, 0.3), (0.5, 0.5)).scaled(),
    "uneven_two_gmm": Mixture((-1.5, 1.5), (0.3, 0.2), (0.7, 0.3)).scaled(),
    "three_gmm": Mixture((-1.5, 0.0, 1.5), (0.2, 0.2, 0.2), (1 / 3, 1 / 3, 1 / 3)).scaled(),
    "moons": Shape(_moons, 0.65625 - 0.5 / math.pi, noise=0.05),
    "checkerboard": Shape(_checkerboard, 1 / 3),
    "spiral": Shape(_spiral, 1 / 4, noise=0.02),
}


@dataclass
class ToyOutput(BaseOutput):
    """The output of `ToyNetwork`: `sample` (B, C, 1, 1)."""

    sample: Tensor


class ToyNetwork(ModelMixin, ConfigMixin):
    """A multilayer perceptron with the call of a U-Net, for samples (B, C, 1, 1) and bounded times, () or (B,).

    Args:
        in_channels: C.
        two_times: whether the network takes a second time; its weights start at zero.
        width: width of the hidden layers.
        depth: number of hidden layers.
        sample_size, num_class_embeds: the entries of a U-Net's config that pipelines read.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        two_times: bool = False,
        width: int = 128,
        depth: int = 3,
        sample_size: int = 1,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 2.0, 4.0]), persistent=False)
        features = 2 * len(self.frequencies)
        widths = [in_channels + features, *[width] * depth]
        hidden = [part for a, b in zip(widths, widths[1:]) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden)
        self.conv_out = nn.Linear(width, in_channels)  # CTM finds the last layer by this name, as in a U-Net
        nn.init.zeros_(self.conv_out.weight)
        if two_times:
            self.target = nn.Linear(features, width, bias=False)
            nn.init.zeros_(self.target.weight)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        target_timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> ToyOutput | tuple[Tensor]:
        """Apply the network.

        Args:
            sample: (B, C, 1, 1).
            timestep: () or (B,), bounded.
            target_timestep: the time to jump to, for a network with two times.
            class_labels: ignored.
            return_dict: whether to return a `ToyOutput` or a tuple.
        """
        h = self.layers[0](torch.cat([sample.flatten(1), self._features(timestep, sample)], 1))
        if target_timestep is not None:
            h = h + self.target(self._features(target_timestep, sample))
        output = self.conv_out(self.layers[1:](h)).reshape(sample.shape)
        return ToyOutput(sample=output) if return_dict else (output,)

    def _features(self, time: Tensor, sample: Tensor) -> Tensor:
        """sin and cos of a time, (B, features)."""
        phases = time.to(sample).expand(len(sample))[:, None] * self.frequencies
        return torch.cat([phases.sin(), phases.cos()], 1)


class ToyDraws(SequentialDraws):
    """Draws of a whole batch from one stream, which is faster; a single process does not need a stream per row."""

    def _draw(self, sampler, name: str, shape: tuple[int, ...]) -> Tensor:
        generator = self._generator.manual_seed(derive_seed(self.seed, name, self.step))
        return sampler(torch.empty(len(self.rows), *shape), generator=generator)

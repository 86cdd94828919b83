"""Exponential moving averages (EMA) of a network's weights: several at once, in float32 for weights of any dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cm_diffusers.core.frozen import changing_state


@dataclass(frozen=True)
class ConstantDecay:
    """The same `decay` at every step."""

    decay: float

    @property
    def name(self) -> str:
        return f"ema_{self.decay:g}"

    def __call__(self, images_seen: int, batch_size: int) -> float:
        return self.decay


@dataclass(frozen=True)
class HalfLife:
    """A half-life of `kimg` thousand images, but at most the share `rampup` of all images seen so far.

    The ramp keeps the random initial weights out of short runs (Karras et al. 2022, app. F.2: 500 kimg, 0.05); a
    `rampup` of 0 turns it off.
    """

    kimg: float
    rampup: float = 0.05

    @property
    def name(self) -> str:
        return f"ema_halflife_{self.kimg:g}kimg"

    def __call__(self, images_seen: int, batch_size: int) -> float:
        half_life = min(self.kimg * 1000, self.rampup * images_seen) if self.rampup else self.kimg * 1000
        return 0.5 ** (batch_size / max(half_life, 1e-8))


class EMA:
    """Averages of `module`'s parameters, one per profile; buffers are copied. Frozen parameters have no average.

    Args:
        module: the network whose weights are averaged.
        profiles: decay rules with distinct names; the average of the first is exported.
    """

    def __init__(self, module: nn.Module, profiles: list):
        self.module = module
        self.profiles = {profile.name: profile for profile in profiles}
        weights = changing_state(module, module)
        named = module.named_parameters(remove_duplicate=False)  # as in a state dict
        self._weights = {name: weight for name, weight in named if weight.requires_grad}
        self._buffers = {name: buffer for name, buffer in module.named_buffers() if name in weights}
        self.shadows = {name: {k: self._shadow(v) for k, v in weights.items()} for name in self.profiles}

    @staticmethod
    def _shadow(value: Tensor) -> Tensor:
        return value.detach().to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)

    @torch.no_grad()
    def update(self, images_seen: int, batch_size: int) -> None:
        """Update the averages after an optimiser step on `batch_size` images; `images_seen` includes these."""
        weights = [weight.detach().float() for weight in self._weights.values()]
        for name, profile in self.profiles.items():
            shadow = self.shadows[name]
            torch._foreach_lerp_([shadow[n] for n in self._weights], weights, 1 - profile(images_seen, batch_size))
            for n, buffer in self._buffers.items():
                shadow[n].copy_(buffer)

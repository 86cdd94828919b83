"""Consistency trajectory models, CTM (Kim et al. 2023, arXiv:2310.02279).

The network has two times: one call jumps along a trajectory of the ODE from t to any s <= t, and for s = t it is a
denoiser. CD compares two jumps to the data. CTM compares two jumps to any s, which an average of the network
continues to the data, and adds the losses of a diffusion model and of a discriminator. The point at u comes from the
ODE of a teacher or of the model's own denoiser, or from the data.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.core.arrays import in_float64, on_device
from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.denoisers import TrajectoryDenoiser
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.interpolants import VE
from cm_diffusers.core.karras import karras_sigma, karras_sigmas
from cm_diffusers.core.noise_levels import linear_law, lognormal
from cm_diffusers.models import PatchDiscriminator, TwoTimeModel
from cm_diffusers.objectives.adversarial import Adversary
from cm_diffusers.objectives.balance import Cut, Part, balanced, last_layer
from cm_diffusers.objectives.base import Batch, Loss, Objective, Summary
from cm_diffusers.objectives.consistency import distance, move_towards, moving_target, teacher_step
from cm_diffusers.objectives.ctm_options import CTMOptions
from cm_diffusers.objectives.diffusion import denoising_error
from cm_diffusers.objectives.spec import PROCESS_STUDENTS, ModelSpec
from cm_diffusers.pipelines import CTMPipeline
from cm_diffusers.schedulers import CTMScheduler


class CTM(Objective):
    """E[ d(G-(G(x_t, t, s), s, 0), G-(sg G(x_u, u, s), s, 0)) ] + L_DSM + L_GAN; sigma_min stands for 0.

    G- is the average of the network (the target network); the gradient of the estimate flows through its frozen jump.
    The network itself makes the target's first jump, as in the authors' code; in the paper the average does. A
    `discriminator` returns logits (B, n) for images; None builds a small one if `gan_weight` is above 0.

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import CTM, Batch, ModelSpec
        >>> spec, options = ModelSpec(sigma_data=0.5), CTM.Options(solver_steps=2)
        >>> unet = CTM.adapt(build_unet("tiny", (8, 8), channels=1), spec)  # with a second time input
        >>> method = CTM(unet, spec, options, total_steps=1000)  # or with a teacher
        >>> method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4))).total.backward()
        >>> method.after_step(0)  # after the step of an optimiser: moves the target network
    """

    name = "ctm"
    Options = CTMOptions
    two_times = has_target = compares_neighbours = True
    passes = 2  # a jump, and the denoiser
    native_predictions = PROCESS_STUDENTS
    sigma_min = floor = 0.002
    terms = ("ctm", "dsm", "dsm_weight", "gan", "gan_weight", "discriminator")
    summary = Summary(
        what="jumps between any two levels",
        target="itself at u < t, no gradient; both go on by an average",
        times="t, u, s on a Karras grid, u after k steps",
        distance="pseudo-Huber (LPIPS)",
        weight="1",
        paper="[Kim et al. 2023](https://arxiv.org/abs/2310.02279)",
    )

    def __init__(self, *args: Any, discriminator: nn.Module | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.floor = self.sigma_min  # stands for clean data whatever the network predicts
        self.target = self.auxiliary["target"] = moving_target(self.network)
        self.sigmas = karras_sigmas(self.options.num_scales, self.sigma_min, self.spec.sigma_max)
        if self.options.gan_weight:
            if discriminator is None:
                config: Any = self.network.config
                discriminator = PatchDiscriminator(config.in_channels, config.num_class_embeds)
            self.adversary = Adversary(discriminator, self.options, self.fakes)

    @classmethod
    def adapt(cls, network: nn.Module, spec: ModelSpec) -> nn.Module:
        settings: Any = network.config
        if isinstance(network, TwoTimeModel) or settings.get("two_times"):
            return network
        return TwoTimeModel.from_network(network, spec.frequency)

    def denoiser(self, network: Callable | None = None) -> TrajectoryDenoiser:
        return self.spec.trajectories(self.model if network is None else network, self.floor)

    def times(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Random levels from t down to u, (k + 1, B), and s <= u (B,), by `draws`: all triples of the grid occur."""
        n = len(self.sigmas)
        law = linear_law(self.options.solver_steps).cumsum(0).tolist()
        k = 1 + min(bisect_right(law, draws.shared("k").item()), len(law) - 1)
        first = (in_float64(draws.uniform("t")) * (n - k)).long()
        last = first + k + (in_float64(draws.uniform("s")) * (n - first - k)).long()
        sigmas = on_device(self.sigmas, first.device)
        return sigmas[first + torch.arange(k + 1, device=first.device)[:, None]], sigmas[last]

    def point_at_u(self, x: Tensor, levels: Tensor, *, x0: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """The point at u = levels[-1] of the trajectory through `x` (B, ...) at t = levels[0].

        Args:
            x: the noisy samples at t.
            levels: the levels (k + 1, B) from t down to u.
            x0: the data (B, ...).
            noise: the unit normal noise (B, ...) in `x`.
            condition: B rows.
        """
        if self.options.trajectory == "data":
            return VE().add_noise(x0, noise, levels[-1])
        denoise = self.denoiser(self.target).denoise if self.teacher is None else self.teacher
        for t, u in zip(levels, levels[1:]):
            x = teacher_step(denoise, x, t=t, u=u, condition=condition, solver=self.options.solver)
        return x

    def jump(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """The model's jump G(x, t, s) of `x` (B, ...) from `t` to `s`, both (B,), under `condition` and `draws`."""
        with draws.dropout():
            return self.denoiser().jump(x, t, s, condition)

    def jump_on(self, x_s: Tensor, s: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """G-(x_s, s, 0): the jump of `x_s` (B, ...) from `s` (B,) to the data by the target network.

        `condition` has B rows; `draws` tie the dropout masks.
        """
        with draws.dropout():
            return self.denoiser(self.target)(x_s, s, condition)

    def diffusion_loss(self, x0: Tensor, condition: Condition, draws: Draws) -> tuple[Tensor, Tensor]:
        """EDM's loss (B,) of the denoiser g(x, t, t) on data `x0` (B, ...), and its noise levels (B,).

        The levels are log-normal for half of the samples and high for the others. `condition` has B rows; `draws` are
        the random numbers of the step.
        """
        high = karras_sigma(0.7 * draws.uniform("dsm_ramp"), self.sigma_min, self.spec.sigma_max)
        low = lognormal(draws.normal("dsm_sigma"), self.options.p_mean, self.options.p_std)
        sigma = torch.where(draws.uniform("dsm_half") < 0.5, low, high).to(x0)
        x = VE().add_noise(x0, draws.normal("dsm_noise", x0.shape[1:]), sigma)
        with draws.dropout():
            denoised = self.denoiser().denoise(x, sigma, condition)
        return denoising_error(denoised, x0, sigma, self.spec), sigma

    def fakes(self, batch: Batch, draws: Draws) -> Tensor:
        """The model's estimates alone (B, C, H, W), for a training step of the discriminator.

        They start from the noised samples of `batch`, with the random numbers of `draws`.
        """
        levels, s = (value.to(batch.samples) for value in self.times(draws))
        x_t = VE().add_noise(batch.samples, draws.normal("noise", batch.samples.shape[1:]), levels[0])
        x_s = self.jump(x_t, levels[0], s, batch.condition, draws)
        return self.jump_on(x_s, s, batch.condition, draws)

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x0, condition = batch.samples, batch.condition
        options = self.options
        if draws.step < options.pretrain_steps:
            return Loss.mean(*self.diffusion_loss(x0, condition, draws))
        levels, s = (value.to(x0) for value in self.times(draws))
        t, u, noise = levels[0], levels[-1], draws.normal("noise", x0.shape[1:])
        x_t = VE().add_noise(x0, noise, t)
        with torch.no_grad(), draws.dropout():  # without a teacher the trajectory is the model's own
            x_u = self.point_at_u(x_t, levels, x0=x0, noise=noise, condition=condition)
            target = self.jump_on(self.jump(x_u, u, s, condition, draws), s, condition, draws)
        cut = Cut.at(self.jump(x_t, t, s, condition, draws))
        estimate = self.jump_on(cut.leaf, s, condition, draws)
        ctm = distance(options.distance, estimate, target, options.huber_c)
        others = []
        if options.dsm_weight:
            dsm = self.diffusion_loss(x0, condition, draws)[0]
            others.append(Part("dsm", dsm, options.dsm_weight, (0.0, 1e4)))
        if self.adversary and self.adversary.is_on(draws.step):
            gan = self.adversary.generator_loss(estimate, condition, draws)
            others.append(Part("gan", gan, options.gan_weight, (0.01, 10.0), cut))
        layer = last_layer(self.network) if options.balance == "adaptive" else None
        total, terms = balanced(Part("ctm", ctm, cut=cut), others, layer, self.average)
        return Loss(total, ctm.detach(), t, terms)

    def after_step(self, step: int) -> None:
        move_towards(self.target, self.network, self.options.mu)

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        spec = self.spec
        levels = {"sigma_min": self.sigma_min, "sigma_max": spec.sigma_max, "sigma_data": spec.sigma_data}
        scheduler = CTMScheduler(num_train_timesteps=self.options.num_scales, **levels, **spec.input_config)
        return CTMPipeline(network, scheduler)

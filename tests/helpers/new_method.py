"""A method that is no part of the package: twelve lines, of which `cm_diffusers.objectives` gives the rest."""

from cm_diffusers.core.distances import l2
from cm_diffusers.core.interpolants import VE
from cm_diffusers.core.noise_levels import lognormal
from cm_diffusers.objectives import Loss, Objective
from cm_diffusers.objectives.base import Summary
from cm_diffusers.objectives.consistency import consistency_pipeline, estimate_and_target
from cm_diffusers.objectives.options import Options


class Halving(Objective):
    """E[ |D(x_t, t) - sg D(x_{t/2}, t/2)|^2 ], ln t ~ N(-1, 1.4^2)."""

    name, Options, sigma_min, floor = "halving", Options, 0.002, 0.002
    summary = Summary("a fixed gap", "itself at t / 2", "ln t ~ N(-1, 1.4^2)", "L2", "1", "none")

    def loss(self, batch, draws):
        noise = draws.normal("noise", batch.samples.shape[1:])
        t = lognormal(draws.normal("sigma"), -1.0, 1.4).clamp(min=2 * self.sigma_min)
        x_t, x_u = (VE().add_noise(batch.samples, noise, level) for level in (t, t / 2))
        both, told = {"student": self.denoiser(), "target": self.denoiser()}, {"condition": batch.condition}
        estimate, target = estimate_and_target(**both, **told, x_t=x_t, t=t, x_u=x_u, u=t / 2, draws=draws)
        return Loss.mean(l2(estimate, target), t)

    def pipeline(self, network):
        return consistency_pipeline(network, self.spec, self.sigma_min, num_train_timesteps=41)

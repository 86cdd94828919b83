"""Latent consistency distillation: its levels and solver are diffusers', a Gaussian is exact, guidance is drawn."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from torch import nn

from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.denoisers import Guided
from cm_diffusers.core.draws import Draws
from cm_diffusers.objectives import LCM, Batch, ModelSpec


TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPEC = ModelSpec(0.5, "timestep", prediction="epsilon", noise_schedule=TABLE)
SPREAD = 0.3  # standard deviation of the data, whose mean is the condition


class Told(nn.Module):
    """A network that keeps the condition of its last call, and predicts noise 0."""

    def __init__(self, guidance=None):
        super().__init__()
        self.weight, self.config = nn.Parameter(torch.zeros(())), SimpleNamespace(time_cond_proj_dim=guidance)

    def forward(self, sample, timestep, **entries):
        self.entries = entries
        return SimpleNamespace(sample=self.weight * sample)


def teacher(x, sigma, condition):
    """The exact denoiser of N(mean, SPREAD^2)."""
    mean, sigma = condition.entries["mean"][:, None], sigma[:, None]
    return mean + SPREAD**2 / (SPREAD**2 + sigma**2) * (x - mean)


def consistency(x, sigma, condition):
    """The exact consistency function of N(mean, SPREAD^2)."""
    mean, sigma = condition.entries["mean"][:, None], sigma[:, None]
    return mean + SPREAD / (SPREAD**2 + sigma**2).sqrt() * (x - mean)


def guided(scale=1.0):
    return Guided(teacher, scale, {"mean": torch.tensor(0.0)})


def make(teacher=teacher, network=None, **options):
    method = LCM(network or Told(), SPEC, LCM.Options(**options), total_steps=10, teacher=teacher)
    method.denoiser = lambda network=None: consistency
    return method


def batch(rows=64):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(rows, generator=generator)
    samples = mean[:, None] + SPREAD * torch.randn(rows, 24, generator=generator)
    return Batch(samples, Condition({"mean": mean}))


def draws(rows=64):
    return Draws(seed=0, step=0, rows=range(rows))


def test_the_levels_are_those_that_diffusers_lcm_scheduler_can_choose():
    stock = LCMScheduler(**TABLE)
    stock.set_timesteps(50)
    times = stock.timesteps.flip(0).long()
    assert times.tolist() == list(range(19, 1000, 20))
    abar = DDPMScheduler(**TABLE).alphas_cumprod.double()
    expected = ((1 - abar) / abar).sqrt()
    torch.testing.assert_close(make().sigmas, torch.cat([expected[:1], expected[times]]), rtol=1e-9, atol=0)


def test_a_step_of_the_teacher_is_that_of_diffusers_ddim_scheduler(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "cm_diffusers.objectives.lcm.estimate_and_target",
        lambda **call: seen.update(call) or (call["x_u"], call["x_u"]),
    )
    make(guided(), w_min=2.0, w_max=8.0).loss(batch(), draws())
    scale = 2 + 6 * draws().uniform("guidance")
    stock = DDIMScheduler(**TABLE, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False)
    stock.set_timesteps(50)
    condition = batch().condition
    null = Condition({"mean": torch.zeros(64)})
    for i in range(64):
        x, t = seen["x_t"][i : i + 1], seen["t"][i : i + 1]
        time = SPEC.process.time(t.double()).round().long().item()
        rows = [part.rows(slice(i, i + 1)) for part in (condition, null)]
        noise = [(x - teacher(x, t, row)) / t for row in rows]
        noise = noise[1] + scale[i] * (noise[0] - noise[1])
        alpha = (1 + t**2) ** -0.5
        after = stock.step(noise, time, alpha * x).prev_sample
        u = seen["u"][i]
        expected = after * (1 + u**2).sqrt()
        torch.testing.assert_close(seen["x_u"][i : i + 1], expected, rtol=1e-4, atol=1e-4)


def test_the_loss_of_the_exact_consistency_function_vanishes_with_the_steps_of_the_solver():
    losses = [make(num_ddim_timesteps=n, distance="l2").loss(batch(), draws()).total.item() for n in (25, 100, 400)]
    assert losses[0] > 8 * losses[1] > 64 * losses[2]  # a step's squared error falls as n^-4, at most levels
    method = make(num_ddim_timesteps=400, distance="l2")
    method.denoiser = lambda network=None: teacher  # a diffusion model is not consistent
    assert method.loss(batch(), draws()).total > 20 * losses[2]


def test_a_scale_of_1_is_no_guidance_and_others_are():
    plain, one = make().loss(batch(), draws()), make(guided(), w_max=1.0).loss(batch(), draws())
    torch.testing.assert_close(plain.per_sample, one.per_sample, rtol=1e-4, atol=1e-6)
    assert make(guided(4.0)).loss(batch(), draws()).total > 1.5 * plain.total


@pytest.mark.parametrize("channels", [None, 8])
def test_a_network_with_a_guidance_input_receives_the_drawn_scale(channels):
    network = Told(channels)
    method = LCM(network, SPEC, LCM.Options(w_min=3.0, w_max=5.0), total_steps=10, teacher=guided())
    method.loss(batch(), draws()).total.backward()
    assert ("guidance" in network.entries) == (channels is not None)
    if channels:
        scale = network.entries["guidance"]
        assert scale.shape == (64,) and 3 <= scale.min() < scale.max() <= 5


def test_at_the_lowest_level_the_end_of_the_teacher_s_step_is_the_target():
    method = make(num_ddim_timesteps=2, distance="l2")
    lowest = method.sigmas[0].float()

    def undefined_there(x, sigma, condition):
        return torch.where((sigma == lowest)[:, None], torch.nan, consistency(x, sigma, condition))

    expected = method.loss(batch(), draws()).per_sample
    method.denoiser = lambda network=None: undefined_there
    assert torch.equal(method.loss(batch(), draws()).per_sample, expected) and expected.isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"w_min": 3.0}, "w_min 3 needs --w_max"),
        ({"w_min": 3.0, "w_max": 2.0}, "w_max must be at least w_min, 3; got 2"),
        ({"num_ddim_timesteps": 1}, "num_ddim_timesteps must lie in"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LCM.Options(**options)


def test_drawn_scales_need_a_teacher_with_null_rows():
    with pytest.raises(ValueError, match="w_max needs a teacher with null rows"):
        make(w_max=3.0)

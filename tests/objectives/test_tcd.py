"""Trajectory consistency distillation: its jumps are diffusers' TCD scheduler's, straight trajectories are exact."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, TCDScheduler
from torch import nn

from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.denoisers import Guided
from cm_diffusers.core.draws import Draws
from cm_diffusers.models import build_unet
from cm_diffusers.objectives import TCD, Batch, ModelSpec
from tests.helpers.stock_pipelines import randomised


TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPEC = ModelSpec(0.5, "timestep", prediction="epsilon", noise_schedule=TABLE)
SPREAD = 0.3  # standard deviation of the data, whose mean is the condition


class Noise(nn.Module):
    """A network that predicts noise w x, with one weight."""

    def __init__(self):
        super().__init__()
        self.weight, self.config = nn.Parameter(torch.tensor(0.5)), SimpleNamespace(time_cond_proj_dim=None)

    def forward(self, sample, timestep, **entries):
        return SimpleNamespace(sample=self.weight * sample)


def gaussian(spread):
    """The exact denoiser of N(mean, spread^2)."""

    def denoise(x, sigma, condition):
        mean, sigma = condition.entries["mean"][:, None], sigma[:, None]
        return mean + spread**2 / (spread**2 + sigma**2) * (x - mean)

    return denoise


def trajectory(x, t, s, condition):
    """The point at s of the trajectory of N(mean, SPREAD^2) through x at t."""
    mean = condition.entries["mean"][:, None]
    return mean + ((SPREAD**2 + s**2) / (SPREAD**2 + t**2)).sqrt()[:, None] * (x - mean)


def make(denoiser=None, teacher=gaussian(SPREAD), spec=SPEC, **options):
    method = TCD(Noise(), spec, TCD.Options(**options), total_steps=10, teacher=teacher)
    if denoiser is not None:
        method.denoiser = lambda network=None: denoiser
    return method


def batch(rows=64):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(rows, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, 24, generator=generator, dtype=torch.float64)
    return Batch(mean[:, None] + SPREAD * noise, Condition({"mean": mean}))


def draws(rows=range(64)):
    return Draws(seed=0, step=0, rows=rows)


def jumps_of(method, rows=range(64)):
    """The levels (t, s) and (u, s) of the two jumps in a loss, each (B,)."""
    seen, jump = [], method.jump
    method.jump = lambda x, denoised, sigma, s: seen.append((sigma, s)) or jump(x, denoised, sigma, s)
    samples = batch(max(rows) + 1)
    chosen = slice(min(rows), max(rows) + 1)
    method.loss(Batch(samples.samples[chosen], samples.condition.rows(chosen)), draws(rows))
    return seen


def test_both_jumps_lead_to_one_level_among_all_up_to_that_of_the_target():
    method = make(gaussian(SPREAD), num_ddim_timesteps=8)
    (t, s), (u, same) = jumps_of(method, range(4096))
    assert torch.equal(s, same) and torch.isin(s, method.sigmas).all() and torch.isin(u, method.sigmas).all()
    n, m = torch.searchsorted(method.sigmas, u), torch.searchsorted(method.sigmas, s)
    assert torch.equal(torch.searchsorted(method.sigmas, t), n + 1)
    pairs = torch.stack([n, m], 1).unique(dim=0)
    assert pairs.tolist() == [[i, j] for i in range(8) for j in range(i + 1)]
    share = (m + 0.5) / (n + 1)  # its mean is 1/2 for uniform m
    assert (share.mean() - 0.5).abs() < 4 * share.std() / 4096**0.5


def test_the_level_of_a_row_depends_on_its_place_in_the_global_batch_alone():
    method = make(gaussian(SPREAD))
    (t, s), _ = jumps_of(method)
    (t_half, s_half), _ = jumps_of(make(gaussian(SPREAD)), range(32, 64))
    assert torch.equal(t[32:], t_half) and torch.equal(s[32:], s_half)


def test_straight_trajectories_have_no_loss():
    point = gaussian(0.0)
    exact = make(point, teacher=point, distance="l2").loss(batch(), draws()).per_sample
    assert exact.max() < 1e-24
    curved = make(gaussian(SPREAD), distance="l2").loss(batch(), draws()).per_sample
    assert curved.mean() > 1e-4  # a diffusion model is not consistent


@pytest.fixture
def exact_jumps(monkeypatch):
    """Replaces the jumps by those of the exact trajectories, which a network of one time cannot have."""
    condition = batch().condition
    monkeypatch.setattr(TCD, "jump", lambda self, x, denoised, t, s: trajectory(x, t, s, condition))


def test_the_loss_of_the_exact_trajectories_is_the_error_of_the_teacher_s_solver(exact_jumps, monkeypatch):
    losses = [
        make(gaussian(SPREAD), num_ddim_timesteps=n, distance="l2").loss(batch(), draws()).total.item()
        for n in (25, 100, 400)
    ]
    assert losses[0] > 8 * losses[1] > 64 * losses[2]  # a step's squared error falls as n^-4, at most levels
    monkeypatch.setattr(
        "cm_diffusers.objectives.lcm.teacher_step",
        lambda teacher, x, *, t, u, condition, solver: trajectory(x, t, u, condition),
    )
    assert make(gaussian(SPREAD), distance="l2").loss(batch(), draws()).per_sample.max() < 1e-24


@pytest.mark.parametrize("spec", [SPEC, ModelSpec(0.5), ModelSpec(0.5, "flow_time", prediction="flow")])
def test_a_jump_of_no_length_is_the_point_in_the_scale_of_the_process(spec):
    x, sigma = batch().samples, torch.logspace(-2, 1, 64, dtype=torch.float64)
    expected = spec.process.add_noise(torch.zeros_like(x), x / sigma[:, None], sigma)
    end = make(spec=spec).jump(x, torch.full_like(x, 1e3), sigma, sigma)
    torch.testing.assert_close(end, expected, rtol=1e-12, atol=0)


def test_where_the_target_has_no_way_to_go_it_is_the_end_of_the_teacher_s_step():
    method = make(gaussian(SPREAD), num_ddim_timesteps=8)
    _, (u, s) = jumps_of(method)
    expected = method.loss(batch(), draws()).per_sample
    method.denoiser = lambda network=None: gaussian(SPREAD) if network is None else gaussian(9.0)
    same = method.loss(batch(), draws()).per_sample == expected
    assert torch.equal(same, u == s) and (u == method.sigmas[0]).any() and same.any() and not same.all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_a_jump_and_noise_are_the_step_of_diffusers_tcd_scheduler(prediction, gamma):
    spec = replace(SPEC, prediction=prediction)
    stock = TCDScheduler(**TABLE, prediction_type=prediction)
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    stock.set_timesteps(4)
    method, after = make(spec=spec), [*stock.timesteps[1:].tolist(), 0]
    for i, (time, next_time) in enumerate(zip(stock.timesteps.tolist(), after)):
        t, s, r = spec.process.sigma(
            torch.tensor([[time], [int((1 - gamma) * next_time)], [next_time]], dtype=torch.float64)
        )
        x_t, output, noise = torch.randn(3, 1, 24, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        step = stock.step(output, time, x_t, eta=gamma, generator=torch.Generator().manual_seed(7))
        x = x_t / spec.process.alpha(t)
        denoised = spec.denoiser(lambda *_, answer=output: SimpleNamespace(sample=answer))(x, t)
        x_s = method.jump(x, denoised, t, s)
        torch.testing.assert_close(step.pred_noised_sample, x_s, rtol=1e-10, atol=1e-10)
        if next_time > 0:
            noise = torch.randn(1, 24, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
            x_r = x_s / spec.process.alpha(s) + (r**2 - s**2).sqrt() * noise
            torch.testing.assert_close(step.prev_sample, spec.process.alpha(r) * x_r, rtol=1e-10, atol=1e-10)


def test_diffusers_own_pipeline_samples_an_image_model_by_these_jumps():
    unet = randomised(build_unet("tiny", (8, 8), channels=1)).eval()
    spec = replace(SPEC, prediction="v_prediction")
    pipe = DDPMPipeline(unet, TCDScheduler(**TABLE, prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    image = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=1, output_type="pt").images
    method, process = TCD(unet, spec, TCD.Options(), 10, teacher=gaussian(SPREAD)), spec.process
    t, s = process.sigma(torch.tensor([999.0, 0.0], dtype=torch.float64)).float()[:, None].expand(2, 2)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / process.alpha(t)[:, None, None, None]
    with torch.no_grad():
        end = method.jump(x, method.denoiser()(x, t), t, s)
    torch.testing.assert_close(image, (end / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    assert ((image > 0) & (image < 1)).float().mean() > 0.5


def test_a_scale_of_1_is_no_guidance_and_others_are():
    teacher = gaussian(SPREAD)
    null = {"mean": torch.zeros((), dtype=torch.float64)}
    plain = make(teacher).loss(batch(), draws())
    one = make(teacher, Guided(teacher, 1.0, null), w_max=1.0).loss(batch(), draws())
    torch.testing.assert_close(plain.per_sample, one.per_sample, rtol=1e-9, atol=1e-12)
    assert make(teacher, Guided(teacher, 4.0, null)).loss(batch(), draws()).total > 1.2 * plain.total


def test_only_the_student_receives_a_gradient_and_the_target_follows_it():
    teacher = SPEC.denoiser(Noise())
    method = TCD(Noise(), SPEC, TCD.Options(distance="l2", mu=0.5), total_steps=10, teacher=teacher)
    weight, loss = method.network.weight, method.loss(batch(), draws())
    loss.total.backward()
    assert weight.grad != 0 and method.target.weight.grad is None and teacher.network.weight.grad is None

    def total(value):  # the target stays as it is
        weight.data.fill_(value)
        return method.loss(batch(), draws()).total.item()

    slope = (total(0.501) - total(0.499)) / 0.002
    assert weight.grad.item() == pytest.approx(slope, rel=1e-3)
    weight.data.fill_(0.7)
    method.after_step(0)
    assert method.target.weight.item() == pytest.approx(0.6)


def test_a_distance_between_images_is_refused_as_jumps_end_at_noisy_ones():
    with pytest.raises(ValueError, match="distance must be one of pseudo_huber, l2; got 'lpips'"):
        TCD.Options(distance="lpips")

"""sCM and MeanFlow against closed forms: data N(0, sigma_data^2), whose consistency function is known."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from cm_diffusers.core.denoisers import (
    EDMDenoiser,
    ProcessDenoiser,
    as_trigflow,
    flow_denoiser,
    trigflow_denoiser,
    trigflow_velocity,
    vp_as_trigflow,
)
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.interpolants import VP
from cm_diffusers.core.tangents import NotDifferentiable
from cm_diffusers.objectives import OBJECTIVES, Batch, ModelSpec
from cm_diffusers.objectives.mean_flow import MeanFlow, MeanFlowOptions
from cm_diffusers.objectives.scm import SCD, SCT, SCDOptions, SCTOptions


SIGMA_DATA = 0.5
TRIGFLOW = ModelSpec(SIGMA_DATA, "angle", prediction="trigflow")


class Closed(nn.Module):
    """A network defined by a formula, with one parameter for the gradient."""

    def __init__(self, formula):
        super().__init__()
        self.formula, self.scale = formula, nn.Parameter(torch.ones((), dtype=torch.float64))
        self.config = SimpleNamespace(in_channels=1, sample_size=2, num_class_embeds=None)

    def forward(self, sample, timestep, target_timestep=None, class_labels=None):
        times = (timestep,) if target_timestep is None else (timestep, target_timestep)
        times = [time.reshape(-1, 1, 1, 1).to(sample) for time in times]
        return SimpleNamespace(sample=self.scale * self.formula(sample, *times))


def consistent(x, t):
    """The exact F for the consistency function f(x_t, t) = x_t."""
    return -(t / 2).tan() * x


def exact_denoiser(x, sigma, class_labels=None):
    return x * (SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2)).reshape(-1, 1, 1, 1)


def batch(n=4096):
    generator = torch.Generator().manual_seed(3)
    return Batch(SIGMA_DATA * torch.randn(n, 1, 2, 2, generator=generator, dtype=torch.float64))


def options(cls, **settings):
    return cls(**{"tangent_norm": "none", "tangent_warmup_steps": 0, **settings})


def test_tangent_of_the_exact_solution_is_zero_with_the_velocity_of_the_teacher():
    settings = options(SCDOptions, pretrained_teacher_model="given")
    teacher = type("Teacher", (), {"__call__": staticmethod(exact_denoiser), "sigma_data": SIGMA_DATA})()
    objective = SCD(Closed(consistent), TRIGFLOW, settings, 100, teacher=teacher)
    loss = objective.loss(batch(), Draws(0, 5, range(4096)))
    assert loss.per_sample.max() < 1e-10
    loss.total.backward()
    assert abs(objective.network.scale.grad) < 1e-6


def test_tangent_of_the_exact_solution_has_mean_zero_with_the_velocity_of_the_data():
    objective = SCT(Closed(consistent), TRIGFLOW, options(SCTOptions), 100)
    loss = objective.loss(batch(), Draws(0, 5, range(4096)))
    assert loss.per_sample.mean() > 0.01  # the tangent is cos(t) times the velocity, which differs between pairs
    loss.total.backward()
    spread = loss.per_sample.mean().sqrt() / 4096**0.5
    assert abs(objective.network.scale.grad) < 10 * spread


def test_a_wrong_solution_has_a_gradient_in_the_mean():
    settings = options(SCDOptions, pretrained_teacher_model="given")
    teacher = type("Teacher", (), {"__call__": staticmethod(exact_denoiser), "sigma_data": SIGMA_DATA})()
    objective = SCD(Closed(lambda x, t: 0.5 * consistent(x, t)), TRIGFLOW, settings, 100, teacher=teacher)
    loss = objective.loss(batch(), Draws(0, 5, range(4096)))
    loss.total.backward()
    assert loss.per_sample.mean() > 1e-3 and objective.network.scale.grad < -1e-3  # the scale must rise


def test_without_warm_up_the_gradient_is_cos_squared_times_that_of_diffusion():
    """At warm-up 0: F - F- - g with g = -cos^2(t) (sigma_data F- - v), against |sigma_data F - v|^2."""
    network = Closed(lambda x, t: 0.3 * x + 0.1 * t)
    objective = SCT(network, TRIGFLOW, options(SCTOptions, tangent_warmup_steps=1000), 2000)
    data, draws = batch(64), Draws(0, 0, range(64))
    objective.loss(data, draws).total.backward()
    gradient = network.scale.grad.clone()

    network.scale.grad = None
    sigma = (-1.0 + 1.4 * draws.normal("sigma")).exp()
    t = (sigma / SIGMA_DATA).atan().reshape(-1, 1, 1, 1)
    z = SIGMA_DATA * draws.normal("noise", (1, 2, 2))
    x_t = t.cos() * data.samples + t.sin() * z
    v = t.cos() * z - t.sin() * data.samples
    error = SIGMA_DATA * network(x_t / SIGMA_DATA, t.flatten()).sample - v
    (t.cos() ** 2 * error**2 / SIGMA_DATA).mean().backward()
    torch.testing.assert_close(gradient, network.scale.grad, rtol=1e-5, atol=1e-9)


def test_gradient_is_that_of_the_weighted_product_of_f_and_its_derivative():
    """grad of 1/2 |F - F- - g|^2 = grad of w f . df/dt with the prior w = 1 / (sigma_data tan t) (identity 6)."""
    torch.manual_seed(0)
    network = Closed(lambda x, t: 0.3 * x + 0.2 * t * x.sin())
    objective = SCT(network, TRIGFLOW, options(SCTOptions), 100)
    data, draws = batch(32), Draws(0, 7, range(32))
    objective.loss(data, draws).total.backward()
    gradient = network.scale.grad.clone()

    sigma = (-1.0 + 1.4 * draws.normal("sigma")).exp().double()
    t = (sigma / SIGMA_DATA).atan()
    x0, z = data.samples, (SIGMA_DATA * draws.normal("noise", (1, 2, 2))).double()

    def f(s):
        s4 = s.reshape(-1, 1, 1, 1)
        x = s4.cos() * x0 + s4.sin() * z
        return s4.cos() * x - s4.sin() * SIGMA_DATA * network(x / SIGMA_DATA, s).sample

    network.scale.grad = None
    h = 1e-6
    with torch.no_grad():
        derivative = (f(t + h) - f(t - h)) / (2 * h)
    prior = (1 / (SIGMA_DATA * t.tan())).reshape(-1, 1, 1, 1)
    (prior * f(t) * derivative).mean().backward()
    torch.testing.assert_close(gradient, 2 * network.scale.grad, rtol=1e-4, atol=1e-8)


def test_prior_one_over_sigma_is_an_option():
    data, draws = batch(16), Draws(0, 5, range(16))
    one, inverse = (
        SCT(Closed(consistent), TRIGFLOW, options(SCTOptions, prior_weight=weight), 100).loss(data, draws)
        for weight in ("one", "inverse_sigma")
    )
    torch.testing.assert_close(inverse.per_sample, one.per_sample / one.sigma)


def test_warm_up_grows_to_one():
    objective = SCT(Closed(consistent), TRIGFLOW, SCTOptions(tangent_warmup_steps=100), 1000)
    assert [objective.warmup(step) for step in (0, 50, 100, 1000)] == [0, 0.5, 1, 1]
    assert options(SCTOptions).tangent_warmup_steps == 0
    assert SCT(Closed(consistent), TRIGFLOW, options(SCTOptions), 1000).warmup(1) == 1


def test_any_denoiser_is_a_trigflow_velocity():
    """EDM, TrigFlow and flow networks with the same denoiser have the same velocity (identities 3 and 4)."""
    x, t = torch.randn(5, 1, 2, 2, dtype=torch.float64), torch.tensor([0.05, 0.4, 0.9, 1.3, 1.56]).double()
    trig = Closed(lambda x, t: 0.4 * x.tanh() + 0.1 * t)
    edm = Closed(lambda x, t: -(0.4 * x.tanh() + 0.1 * t))

    def flow(x, s):  # the same network's F in the scale of linear flow
        sigma = s / (1 - s)
        angle = (sigma / SIGMA_DATA).atan()
        x_trig = x * (1 + sigma) * angle.cos()
        denoised = angle.cos() * x_trig - angle.sin() * SIGMA_DATA * trig(x_trig / SIGMA_DATA, angle.flatten()).sample
        return (x - denoised) / s

    expected = SIGMA_DATA * trig(x / SIGMA_DATA, t).sample
    denoisers = (
        trigflow_denoiser(trig, SIGMA_DATA),
        EDMDenoiser(edm, SIGMA_DATA, time_label="angle"),
        flow_denoiser(Closed(flow), SIGMA_DATA),
    )
    for denoiser in denoisers:
        torch.testing.assert_close(trigflow_velocity(denoiser, x, t, SIGMA_DATA), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
def test_a_flow_model_is_a_trigflow_model_after_a_change_of_variables(time_scale):
    flow = Closed(lambda x, t: (1.3 * x).sin() + 0.4 * (t / time_scale))
    x, sigma = torch.randn(6, 1, 2, 2).double(), torch.tensor([0.0, 1e-3, 0.2, 1.0, 20.0, 80.0]).double()
    as_flow = flow_denoiser(flow, time_scale=time_scale)
    as_trig = trigflow_denoiser(as_trigflow(flow, SIGMA_DATA, time_scale), SIGMA_DATA)
    torch.testing.assert_close(as_trig(x, sigma), as_flow(x, sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_vp_model_is_a_trigflow_model_after_a_change_of_variables(prediction, sigma_data):
    network = Closed(lambda x, t: (1.3 * x).sin() + 0.4 * (t / 999).cos())
    process = VP(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod)
    x, sigma = torch.randn(6, 1, 2, 2).double(), torch.tensor([0.03, 0.1, 0.2, 1.0, 7.0, 14.6]).double()
    as_vp = ProcessDenoiser(network, process, prediction=prediction, sigma_data=sigma_data)
    as_trig = trigflow_denoiser(vp_as_trigflow(network, process, prediction, sigma_data), sigma_data)
    torch.testing.assert_close(as_trig(x, sigma), as_vp(x, sigma), rtol=1e-9, atol=1e-9)


def test_velocity_of_gaussian_data_is_zero_in_trigflow():
    x, t = torch.randn(3, 1, 2, 2, dtype=torch.float64), torch.tensor([0.1, 0.8, 1.5]).double()
    velocity = trigflow_velocity(exact_denoiser, x, t, SIGMA_DATA)
    torch.testing.assert_close(velocity, 0 * x, rtol=0, atol=1e-12)


# --- MeanFlow ------------------------------------------------------------------------------------------------


def average_velocity(x, t, r):
    """u of linear flow for N(0, 1/4) data: x_r / x_t = s(r) / s(t) with s(t)^2 = (1 - t)^2 / 4 + t^2."""

    def s(time):
        return ((1 - time) ** 2 / 4 + time**2).sqrt()

    gap = (t - r).clamp(min=1e-9)
    slope = (5 * t - 1) / 4 / s(t) ** 2  # the slope of ln s
    return torch.where(t - r > 1e-9, x * (1 - s(r) / s(t)) / gap, x * slope)


def test_golden_number_of_mean_flow():
    x, t, r = (torch.tensor(value, dtype=torch.float64).reshape(1, 1, 1, 1) for value in (1.0, 0.8, 0.3))
    assert average_velocity(x, t, r).item() == pytest.approx(0.85645625, abs=1e-8)
    assert average_velocity(x, t, t).item() == pytest.approx(1.15384615, abs=1e-8)


def mean_flow(formula, **settings):
    spec = ModelSpec(1.0, "flow_time", prediction="flow")
    return MeanFlow(Closed(formula), spec, MeanFlowOptions(power=0.0, **settings), 100)


def test_exact_average_velocity_has_no_gradient_in_the_mean():
    objective = mean_flow(average_velocity, equal_times=0.0, p_mean=0.0, p_std=1.0)
    loss = objective.loss(batch(), Draws(0, 5, range(4096)))
    loss.total.backward()
    wrong = mean_flow(lambda x, t, r: 0.8 * average_velocity(x, t, r), equal_times=0.0, p_mean=0.0, p_std=1.0)
    wrong.loss(batch(), Draws(0, 5, range(4096))).total.backward()
    spread = 10 * loss.per_sample.mean().sqrt() / 4096**0.5
    assert abs(objective.network.scale.grad) < spread < abs(wrong.network.scale.grad)


def test_with_equal_times_it_is_flow_matching():
    formula = lambda x, t, r: 0.7 * x + 0.1 * t + 3 * (t - r) * x  # noqa: E731
    objective = mean_flow(formula, equal_times=1.0)
    data, draws = batch(64), Draws(0, 5, range(64))
    loss = objective.loss(data, draws)
    t, r = objective.times(draws)
    assert torch.equal(t, r)
    noise = draws.normal("noise", (1, 2, 2))
    t4 = t.reshape(-1, 1, 1, 1)
    u = objective.network((1 - t4) * data.samples + t4 * noise, t, r).sample
    torch.testing.assert_close(loss.per_sample, (u - (noise - data.samples)).flatten(1).square().sum(1))


def test_times_are_sorted_and_equal_as_often_as_asked():
    objective = mean_flow(average_velocity, equal_times=0.3)
    t, r = objective.times(Draws(0, 0, range(10_000)))
    assert (t >= r).all() and (r > 0).all() and (t < 1).all()
    assert (t == r).double().mean().item() == pytest.approx(0.3, abs=0.015)


def test_one_jump_from_noise_is_the_exact_flow():
    x, sigma = torch.randn(6, 1, 2, 2, dtype=torch.float64), torch.tensor([0.01, 0.1, 0.5, 1, 10, 80]).double()
    denoised = mean_flow(average_velocity).denoiser()(x, sigma)
    factor = (SIGMA_DATA / (SIGMA_DATA**2 + sigma**2).sqrt()).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(denoised, factor * x, rtol=1e-7, atol=1e-9)


# --- refused -------------------------------------------------------------------------------------------------


class WithBatchNorm(Closed):
    def __init__(self):
        super().__init__(consistent)
        self.norm = nn.BatchNorm2d(1)


@pytest.mark.parametrize("name", ["sct", "mean_flow"])
def test_a_network_without_tangents_is_refused_at_once(name):
    cls = OBJECTIVES[name]
    spec = TRIGFLOW if name == "sct" else ModelSpec(1.0, "flow_time", prediction="flow")
    with pytest.raises(NotDifferentiable, match="norm is a BatchNorm2d"):
        cls(WithBatchNorm().train(), spec, cls.Options(), 100)
    cls(WithBatchNorm().train(), spec, cls.Options(jvp_mode="finite_difference"), 100)


@pytest.mark.parametrize(
    "settings", [{"p_std": 0}, {"tangent_warmup_steps": -1}, {"tangent_c": 0}, {"p_mean": math.inf}]
)
def test_impossible_values_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must lie in"):
        SCTOptions(**settings)


@pytest.mark.parametrize("settings", [{"tangent_norm": "l1"}, {"prior_weight": "two"}, {"jvp_mode": "forward"}])
def test_unknown_choices_are_refused_in_python_too(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got {value!r}"):
        SCT(Closed(consistent), TRIGFLOW, SCTOptions(**settings), 100)

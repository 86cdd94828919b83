import math

import numpy as np
import pytest
import torch
from diffusers import SCMScheduler

from cm_diffusers import MultistepConsistencyScheduler, TrigFlowScheduler
from cm_diffusers.core.interpolants import TrigFlow
from cm_diffusers.core.karras import karras_sigmas
from cm_diffusers.core.solvers import heun_step


SHAPE = (2, 3, 4, 4)
SOLVERS = ["consistency", "euler", "heun"]
ODE_SOLVERS = ["euler", "heun"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(n=None, sigmas=None, timesteps=None, **config):
    scheduler = TrigFlowScheduler(**config)
    scheduler.set_timesteps(n, sigmas=sigmas, timesteps=timesteps)
    return scheduler


def network_output(x, t):
    return torch.sin(3 * x + t)


def sample(scheduler, dtype=torch.float32, model=network_output, start=None):
    """A whole run on the scheduler's levels; returns all samples."""
    if start is None:
        start = torch.randn(SHAPE, dtype=dtype, generator=generator())
    x, noise, path = start * scheduler.init_noise_sigma, generator(1), []
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t.to(dtype))
        x = scheduler.step(output, t, x, noise, return_dict=False)[0]
        path.append(x)
    return torch.stack(path)


# --- levels


def test_angles_in_numbers():
    levels = [800, 80, 5, 2, 1.526, 1, 0.821, 0.5, 0.02, 0.002]
    angles = [1.57017133, 1.56454641, 1.47112767, 1.32581767, 1.25416585, 1.10714872, 1.02377567, math.pi / 4]
    angles += [0.03997869, 0.00399998]
    assert make(sigmas=levels, sigma_max=800.0).timesteps.tolist() == pytest.approx(angles, rel=0, abs=1e-8)
    assert make(timesteps=[1.3, 1.1]).sigmas.tolist() == pytest.approx([1.80105122, 0.98237983, 0], rel=0, abs=1e-8)
    assert make(sigmas=[80], sigma_data=1.0).timesteps.item() == pytest.approx(1.55829698, rel=0, abs=1e-8)


def test_default_levels_of_consistency_models():
    assert make(1).timesteps.tolist() == pytest.approx([1.56454641], rel=0, abs=1e-8)
    assert make(2).timesteps.tolist() == pytest.approx([1.56454641, 1.10630137], rel=0, abs=1e-8)
    for n in range(1, 41):
        scheduler = make(n)
        assert len(scheduler.timesteps) == n == scheduler.num_inference_steps == len(scheduler.sigmas) - 1
        np.testing.assert_allclose(scheduler.timesteps**2, math.atan(160) ** 2 * (1 - np.arange(n) / n), rtol=1e-14)
        assert scheduler.sigmas[-1] == 0 and scheduler.sigmas[0] == pytest.approx(80, rel=1e-12)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_default_levels_of_diffusion_models(solver):
    karras = [80, 17.5278320, 2.51521898, 0.169752756, 0.002]
    scheduler = make(5, solver=solver)
    levels = [*karras, 0] if solver == "euler" else [80, *np.repeat(karras[1:], 2), 0]
    assert scheduler.sigmas.tolist() == pytest.approx(levels, rel=1e-8, abs=0)
    assert scheduler.num_inference_steps == 5 and len(scheduler.timesteps) == (5 if solver == "euler" else 9)
    torch.testing.assert_close(scheduler.timesteps, (scheduler.sigmas[:-1] / 0.5).atan(), rtol=1e-14, atol=0)


def test_angles_round_trip():
    scheduler, sigmas = TrigFlowScheduler(sigma_data=0.7), np.append(np.logspace(-3, 3, 30), np.inf)
    np.testing.assert_allclose(scheduler.timestep_to_sigma(scheduler.sigma_to_timestep(sigmas)), sigmas, rtol=1e-11)


@pytest.mark.parametrize("infinite", [{"sigmas": [math.inf, 0.8]}, {"timesteps": [math.pi / 2, math.atan(1.6)]}])
@pytest.mark.parametrize("solver", SOLVERS)
def test_sampling_may_start_from_pure_noise(infinite, solver):
    scheduler = make(**infinite, solver=solver)
    assert scheduler.sigmas[0] == math.inf and scheduler.timesteps[0] == math.pi / 2
    assert scheduler.init_noise_sigma == scheduler.config.sigma_data
    assert sample(scheduler).isfinite().all()


@pytest.mark.parametrize("angle", [1.5708, float(np.float32(math.pi / 2))])
def test_rounded_half_pi_is_half_pi(angle):
    assert make(timesteps=[angle, 1.3]).timesteps[0] == math.pi / 2


def test_noise_at_the_start_is_that_of_the_first_level():
    assert make(1).init_noise_sigma == pytest.approx(80 * math.cos(math.atan(160)), rel=1e-12)
    assert make(timesteps=[0.3]).init_noise_sigma == pytest.approx(0.5 * math.sin(0.3), rel=1e-15)


# --- the same samples as other schedulers


@pytest.mark.parametrize("angles", [[1.57], [1.5, 1.1], [1.5, 1.1, 0.4, 0.01]])
def test_samples_are_those_of_the_stock_scheduler(angles):
    ours, theirs = make(timesteps=angles, clip_denoised=False), SCMScheduler()
    theirs.set_timesteps(len(angles), timesteps=[*angles, 0.0], max_timesteps=None, intermediate_timesteps=None)
    x, noise, path = torch.randn(SHAPE, generator=generator()) * ours.init_noise_sigma, generator(1), []
    for t in theirs.timesteps[:-1]:  # theirs takes sigma_data F, and keeps angles in float32
        x = theirs.step(0.5 * network_output(x / 0.5, t), t, x, noise).prev_sample
        path.append(x)
    torch.testing.assert_close(sample(ours), torch.stack(path), rtol=0, atol=2e-6)


@pytest.mark.parametrize("config", [{}, {"clip_denoised": False}, {"sigma_data": 0.8, "sigma_max": 60.0}])
@pytest.mark.parametrize("sigmas", [[60], [60, 0.8], [50, 5, 0.8, 0.01]])
def test_samples_are_those_of_an_edm_network_of_the_opposite_sign(config, sigmas):
    ours = make(sigmas=sigmas, **config)
    theirs = MultistepConsistencyScheduler(time_label="angle", sigma_min=0.0, **config)
    theirs.set_timesteps(sigmas=sigmas)
    expected = sample(theirs, torch.float64, model=lambda x, t: -network_output(x, t))
    cos = torch.tensor([*ours.timesteps[1:].cos(), 1.0]).reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(sample(ours, torch.float64), cos * expected, rtol=1e-12, atol=1e-13)


# --- steps


def test_noise_between_the_steps():
    scheduler = make(timesteps=[1.5, 1.1])
    x, output = torch.randn(2, *SHAPE, dtype=torch.float64)
    step = scheduler.step(output, scheduler.timesteps[0], x, generator(1))
    noise = torch.randn(SHAPE, dtype=torch.float64, generator=generator(1))
    expected = math.cos(1.1) * step.pred_original_sample + math.sin(1.1) * 0.5 * noise
    torch.testing.assert_close(step.prev_sample, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_estimates_are_clamped_for_consistency_models_unless_told_otherwise(solver):
    x = torch.full((1, 1, 2, 2), 3.0)
    for clip in (True, False):
        scheduler = make(timesteps=[0.5], solver=solver, clip_denoised=clip)
        largest = 1.0 if clip and solver == "consistency" else 3 * math.cos(0.5) + 1.5 * math.sin(0.5)
        step = scheduler.step(-x, scheduler.timesteps[0], x)
        assert step.pred_original_sample.max().item() == pytest.approx(largest)
        assert torch.equal(step.prev_sample, step.pred_original_sample)


def test_euler_turns_the_sample():
    x, output = torch.randn(2, *SHAPE, dtype=torch.float64)
    scheduler = make(timesteps=[1.3, 0.9], solver="euler")
    step = scheduler.step(output, scheduler.timesteps[0], x)
    torch.testing.assert_close(step.prev_sample, math.cos(0.4) * x - math.sin(0.4) * 0.5 * output)
    torch.testing.assert_close(step.pred_original_sample, math.cos(1.3) * x - math.sin(1.3) * 0.5 * output)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_solvers_are_exact_for_data_of_one_point(solver):
    point, noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    scheduler = make(timesteps=[1.57, 1.0, 0.2], solver=solver)
    start = (math.cos(1.57) * point + math.sin(1.57) * 0.5 * noise) / scheduler.init_noise_sigma
    path = sample(scheduler, torch.float64, network_of(lambda x, sigma: point), start)
    expected = math.cos(0.2) * point + math.sin(0.2) * 0.5 * noise
    torch.testing.assert_close(path[-2], expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(path[-1], point, rtol=1e-11, atol=1e-11)


def mixture(mean=0.4472136, std=0.2236068):
    """The exact VE denoiser of data 1/2 N(-mean, std^2) + 1/2 N(mean, std^2)."""

    def denoise(x, sigma):
        variance = std**2 + sigma**2
        return (std**2 * x + sigma**2 * mean * (mean * x / variance).tanh()) / variance

    return denoise


def network_of(denoise):
    """The network F whose denoiser is `denoise`, for sigma_data 0.5."""

    def network(x, t):
        denoised = denoise(0.5 * x / t.cos(), 0.5 * t.tan())
        return (t.cos() * x - 2 * denoised) / t.sin()

    return network


def solve(solver, angles, denoise, x):
    """The sample at the last of `angles`, by `solver` from `x` at the first."""
    scheduler = make(timesteps=angles, solver=solver)
    path = sample(scheduler, torch.float64, network_of(denoise), x / scheduler.init_noise_sigma)
    return path[-2]  # the last step goes to 0


def test_paths_of_a_mixture_in_numbers():
    angle = math.atan(160)
    for x, t, end, at_half in (
        (0.3, 1.0, 0.41635274, 0.35581955),
        (0.6, 1.3, 0.61217312, 0.62154666),
        (-0.7, 0.8, -0.66491603, -0.69435771),
        (0.05, angle, 0.13898284, 0.06866749),
        (1.0, angle, 0.82514116, 0.91609504),
    ):
        x = torch.tensor([x]).double()
        assert solve("heun", np.linspace(t, 0.5, 401), mixture(), x).item() == pytest.approx(at_half, abs=1e-6)
        assert solve("heun", np.linspace(t, 1e-6, 901), mixture(), x).item() == pytest.approx(end, abs=1e-6)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("data", [{}, {"mean": 0.9, "std": 0.1}, {"mean": 0.0, "std": 2.0}])
def test_orders_of_the_solvers(solver, order, data):
    denoise, start = mixture(**data), torch.linspace(-1, 1, 20).double()
    exact = solve("heun", np.linspace(1.5, 0.3, 2001), denoise, start)
    errors = [
        (solve(solver, np.linspace(1.5, 0.3, n + 1), denoise, start) - exact).norm().item() for n in (80, 160, 320)
    ]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert orders == pytest.approx([order, order], abs=0.06)


@pytest.mark.parametrize("data", [{}, {"mean": 0.9, "std": 0.1}, {"mean": 0.1, "std": 0.02}, {"mean": 0, "std": 2.0}])
def test_18_levels_are_as_accurate_as_those_of_karras(data):
    denoise, start = mixture(**data), torch.linspace(-1, 1, 20).double()
    grid = karras_sigmas(18)
    exact = solve("heun", (2 * karras_sigmas(1001)).atan(), denoise, start)
    ours = solve("heun", (2 * grid).atan(), denoise, start)
    theirs = start / math.cos(math.atan(160))
    for now, then in zip(grid[:-1, None], grid[1:, None]):
        theirs = heun_step(denoise, theirs, now, then)
    errors = [(x - exact).norm() / len(x) ** 0.5 for x in (ours, theirs * math.cos(math.atan(0.004)))]
    assert errors[0] < 0.9 * errors[1]


# --- Heun's calls


def test_heun_says_where_a_step_begins():
    scheduler, x = make(timesteps=[1.5, 1.0, 0.5], solver="heun"), torch.randn(SHAPE)
    assert scheduler.timesteps.tolist() == [1.5, 1.0, 1.0, 0.5, 0.5]
    begins = []
    for t in scheduler.timesteps:
        begins.append(scheduler.state_in_first_order)
        x = scheduler.step(x, t, x).prev_sample
    assert begins == [True, False, True, False, True] and scheduler.state_in_first_order


def test_heun_begins_in_the_middle_with_a_whole_step():
    scheduler, x = make(timesteps=[1.5, 1.0, 0.5], solver="heun"), torch.randn(SHAPE)
    scheduler.scale_model_input(x, 1.0)
    assert scheduler.step_index == 2
    scheduler = make(timesteps=[1.5, 1.0, 0.5], solver="heun")
    with pytest.raises(ValueError, match="even index"):
        scheduler.set_begin_index(1)
    scheduler.set_begin_index(2)
    path, whole = [x], make(timesteps=[1.0, 0.5], solver="heun")
    for t, s in zip(scheduler.timesteps[2:], whole.timesteps):
        output = torch.sin(path[-1])
        path.append(scheduler.step(output, t, path[-1]).prev_sample)
        assert torch.equal(whole.step(output, s, path[-2]).prev_sample, path[-1])


def test_new_levels_forget_a_step_that_was_begun():
    scheduler, x = make(5, solver="heun"), torch.randn(SHAPE)
    scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(5)
    assert scheduler.state_in_first_order and scheduler.step_index is None


@pytest.mark.parametrize("configured, asked, order", [("heun", "euler", 1), ("euler", "heun", 2)])
def test_a_solver_for_these_levels_only(configured, asked, order):
    scheduler = TrigFlowScheduler(solver=configured)
    scheduler.set_timesteps(4, solver=asked)
    expected = sample(make(4, solver=asked))
    assert scheduler.order == order and torch.equal(sample(scheduler), expected)
    scheduler.set_timesteps(4)
    assert scheduler.order != order and scheduler.config.solver == configured


# --- refused


@pytest.mark.parametrize(
    "configured, asked, reason",
    [
        *(("consistency", solver, "no velocity to follow") for solver in ODE_SOLVERS),
        *((solver, "consistency", "can't jump") for solver in ODE_SOLVERS),
        ("heun", "dpm", "consistency, euler, heun; got 'dpm'"),
    ],
)
def test_solvers_that_do_not_fit_the_model(configured, asked, reason):
    scheduler = TrigFlowScheduler(solver=configured)
    with pytest.raises(ValueError, match=reason):
        scheduler.set_timesteps(4, solver=asked)
    assert scheduler.solver == configured


@pytest.mark.parametrize("solver, n", [("consistency", 0), ("consistency", -1), ("euler", 1), ("heun", 1)])
def test_too_few_steps(solver, n):
    with pytest.raises(ValueError, match=f"at least {1 if solver == 'consistency' else 2}, got {n}"):
        make(n, solver=solver)


@pytest.mark.parametrize(
    "levels, message",
    [
        *(({"sigmas": []}, "non-empty"), ({"sigmas": [80, math.nan]}, "list of numbers")),
        *(({"sigmas": [1, 80]}, "fall strictly"), ({"sigmas": [math.inf, math.inf]}, "fall strictly")),
        *(({"sigmas": [80, 0]}, "above 0"), ({"sigmas": [80, -1]}, "above 0")),
        *(({"sigmas": [81]}, "exceed sigma_max=80.0"), ({"timesteps": []}, "non-empty")),
        *(({"timesteps": [0.3, 1.1]}, "fall strictly"), ({"timesteps": [1.1, 0.0]}, "above 0")),
        *(({"timesteps": [math.inf]}, "angles in"), ({"timesteps": [math.nan]}, "list of numbers")),
        ({"timesteps": [80.0, 0.8]}, r"angles in \(0, pi/2\]; pass noise levels as `sigmas`. Got 80."),
    ],
)
def test_bad_levels(levels, message):
    with pytest.raises(ValueError, match=message):
        make(**levels)


@pytest.mark.parametrize(
    "config, message",
    [
        *(({"solver": "dpm"}, "solver"), ({"sigma_min": 0.0}, "sigma_min"), ({"sigma_min": 80.0}, "sigma_min")),
        *(({"sigma_max": math.inf}, "sigma_max"), ({"sigma_data": 0.0}, "sigma_data")),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        TrigFlowScheduler(**config)


# --- noise at any level


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_added_at_the_level_of_each_sample(dtype):
    scheduler = TrigFlowScheduler(sigma_data=0.7)
    x, noise = torch.randn(2, 4, 2, 4, 4, dtype=dtype)
    sigmas = torch.tensor([0.003, 0.77, 80.0, math.inf], dtype=torch.float64)
    process = TrigFlow(0.7)
    expected = process.add_noise(x.double(), noise.double(), sigmas).to(dtype)
    for given in ({"sigmas": sigmas}, {"timesteps": process.time(sigmas)}):
        noisy = scheduler.add_noise(x, noise, **given)
        assert noisy.dtype == dtype
        torch.testing.assert_close(noisy, expected)


def test_noise_of_one_level_for_all_samples():
    scheduler, (x, noise) = TrigFlowScheduler(), torch.randn(2, 3, 2, 4, 4)
    expected = math.cos(1.1) * x + math.sin(1.1) * 0.5 * noise
    torch.testing.assert_close(scheduler.add_noise(x, noise, torch.tensor(1.1)), expected)
    torch.testing.assert_close(scheduler.add_noise(x, noise, 1.1), expected)

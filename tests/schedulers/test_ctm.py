import math

import numpy as np
import pytest
import torch

from cm_diffusers import CTMScheduler, MultistepConsistencyScheduler
from cm_diffusers.core.denoisers import EDMDenoiser
from cm_diffusers.core.interpolants import VE
from cm_diffusers.core.parameterisation import edm_scalings
from cm_diffusers.core.solvers import heun_step


SHAPE = (2, 3, 4, 4)
RULES = ["paper", "official"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(n=None, sigmas=None, timesteps=None, gamma=None, **config):
    scheduler = CTMScheduler(**config)
    scheduler.set_timesteps(n, sigmas=sigmas, timesteps=timesteps, gamma=gamma)
    return scheduler


def network_output(x, t, s):
    return torch.sin(3 * x + 0.01 * t + 0.02 * s)


def sample(scheduler, dtype=torch.float64, model=network_output, start=None):
    """A whole run on the scheduler's levels; returns all samples, including the first."""
    x = torch.randn(SHAPE, dtype=dtype, generator=generator()) * scheduler.init_noise_sigma if start is None else start
    noise, path = generator(1), [x]
    for t, s in zip(scheduler.timesteps, scheduler.target_timesteps):
        output = model(scheduler.scale_model_input(x, t), t, s)
        x = scheduler.step(output, t, x, noise, return_dict=False)[0]
        path.append(x)
    return torch.stack(path)


def exact_network(scheduler, data_std):
    """The output F(c_in x, t, s), s != t, for the exact jumps x sqrt((s^2 + d^2) / (t^2 + d^2)) of data N(0, d^2)."""

    def network(scaled, t, s):
        t, s = (torch.from_numpy(np.asarray(scheduler.timestep_to_sigma(label.numpy()))) for label in (t, s))
        c_skip, c_out, c_in = edm_scalings(t, scheduler.config.sigma_data)
        x = scaled / c_in
        goal = x * ((s**2 + data_std**2) / (t**2 + data_std**2)).sqrt()
        return ((goal - s / t * x) / (1 - s / t) - c_skip * x) / c_out

    return network


# --- levels


def test_levels_in_numbers():
    two = make(2)
    assert two.sigmas.tolist() == pytest.approx([80, 2.2404398, 0.002], rel=1e-7)
    assert two.timesteps.tolist() == pytest.approx([1095.5066587, 250 * math.log(2.2404398)], rel=1e-7)
    assert two.target_sigmas.tolist() == pytest.approx([2.2404398, 0.002], rel=1e-7)
    assert two.target_timesteps.tolist() == pytest.approx([201.66804, -1553.65202], abs=1e-5)
    angles = make(sigmas=[80, 0.821], time_label="angle", sigma_min=0.0)
    assert angles.timesteps.tolist() == pytest.approx([1.56454641, 1.02377567], abs=1e-8)
    assert angles.target_timesteps.tolist() == pytest.approx([1.02377567, 0], abs=1e-8)


@pytest.mark.parametrize("config", [{}, {"rho": 5.0, "sigma_max": 60.0, "num_train_timesteps": 11}])
def test_levels_are_those_of_multistep_consistency_sampling(config):
    total = config.get("num_train_timesteps", 40)
    for n in range(1, total + 1):
        ours, theirs = make(n, **config), MultistepConsistencyScheduler(**config)
        theirs.set_timesteps(n)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-13, atol=0)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-13, atol=0)
        assert ours.num_inference_steps == n == len(ours.timesteps) == len(ours.target_timesteps)
        assert ours.target_sigmas[-1] == ours.sigmas[-1] == 0.002
    assert len(ours) == total


def test_karras_levels_reach_the_floor_itself():
    for n, sigma_max in ((2, None), (5, None), (19, 3.0)):
        levels = CTMScheduler().karras_sigmas(n, sigma_max)
        assert len(levels) == n and (np.diff(levels) < 0).all()
        assert levels[0] == pytest.approx(sigma_max or 80, rel=1e-14) and levels[-1] == 0.002
    assert CTMScheduler().karras_sigmas(5)[1:4] == pytest.approx([17.5278320, 2.51521898, 0.169752756], rel=1e-8)


def test_labels_round_trip():
    sigmas = np.logspace(-3, 2, 30)
    for label in ("log_sigma", "angle"):
        scheduler = CTMScheduler(time_label=label)
        np.testing.assert_allclose(
            scheduler.timestep_to_sigma(scheduler.labels(torch.from_numpy(sigmas)).numpy()), sigmas, rtol=1e-11
        )
        assert scheduler.labels(0.5).shape == () and scheduler.labels(0.5).dtype == torch.float64


# --- gamma


@pytest.mark.parametrize(
    "rule, gamma, target, std",
    [
        ("paper", 0.5, 0.71100686, 0.4105),
        ("official", 0.5, 0.71127481, 0.41003555),
        ("official", 0.89, 0.37543167, 0.73013153),
        *((rule, 0.0, 0.821, 0.0) for rule in RULES),
        *((rule, 1.0, 0.002, 0.82099756) for rule in RULES),
    ],
)
def test_gamma_in_numbers(rule, gamma, target, std):
    scheduler = make(sigmas=[80, 0.821], gamma=gamma, gamma_rule=rule, clip_denoised=False)
    assert scheduler.target_sigmas.tolist() == pytest.approx([target, 0.002], rel=1e-7, abs=1e-8)
    x, output = torch.randn(2, *SHAPE, dtype=torch.float64)
    step = scheduler.step(output, scheduler.timesteps[0], x, generator(1))
    noise = torch.randn(SHAPE, dtype=torch.float64, generator=generator(1))
    expected = scheduler.jump(output, x, 80.0, scheduler.target_sigmas[0]) + std * noise
    torch.testing.assert_close(step.prev_sample, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_the_noise_makes_up_for_the_jump_below_the_level(rule):
    for gamma in (0.0, 1e-9, 0.3, 0.7, 0.999999, 1.0):
        scheduler = make(sigmas=[80, 5, 0.3, 0.0021], gamma=gamma, gamma_rule=rule)
        variance = scheduler.target_sigmas**2 + scheduler._noise_stds**2
        torch.testing.assert_close(variance, scheduler.sigmas[1:] ** 2, rtol=1e-14, atol=0)
        assert (scheduler.target_sigmas >= 0.002).all() and scheduler._noise_stds[-1] == 0


def test_gamma_0_is_a_chain_of_jumps_and_draws_nothing():
    scheduler, state = make(sigmas=[80, 5, 0.3], clip_denoised=False), torch.get_rng_state()
    x = torch.randn(SHAPE, dtype=torch.float64, generator=generator()) * 80
    path, levels = [x], scheduler.sigmas
    for i in range(3):
        scaled = path[-1] / (levels[i] ** 2 + 0.25).sqrt()
        output = network_output(scaled, *scheduler.labels(levels[i : i + 2]))
        path.append(scheduler.jump(output, path[-1], levels[i], levels[i + 1]))
    torch.testing.assert_close(sample(scheduler), torch.stack(path), rtol=1e-13, atol=1e-13)
    noise = generator(1)
    scheduler.set_timesteps(3)
    scheduler.step(x, scheduler.timesteps[0], x, noise)
    assert torch.equal(noise.get_state(), generator(1).get_state()) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("config", [{}, {"clip_denoised": False}, {"sigma_data": 0.8, "sigma_max": 60.0}])
@pytest.mark.parametrize("sigmas", [[60], [60, 0.8], [50, 5, 0.8, 0.01]])
def test_gamma_1_is_multistep_consistency_sampling(rule, config, sigmas):
    config = {"time_label": "angle", "sigma_min": 0.0, **config}
    ours = sample(make(sigmas=sigmas, gamma=1.0, gamma_rule=rule, **config), model=lambda x, t, s: (3 * x + t).sin())
    theirs = MultistepConsistencyScheduler(**config)
    theirs.set_timesteps(sigmas=sigmas)
    x, noise = ours[0], generator(1)
    for t, mine in zip(theirs.timesteps, ours[1:]):
        x = theirs.step((3 * theirs.scale_model_input(x, t) + t).sin(), t, x, noise).prev_sample
        torch.testing.assert_close(mine, x, rtol=1e-12, atol=1e-13)


def test_gamma_of_the_configuration_holds_unless_told_otherwise():
    scheduler = make(sigmas=[80, 0.821], gamma_rule="official")
    assert scheduler.gamma == 0
    other = CTMScheduler(gamma=0.5)
    for gamma, used in ((None, 0.5), (0.0, 0.0), (1, 1.0), (None, 0.5)):
        other.set_timesteps(2, gamma=gamma)
        assert other.gamma == used and other.config.gamma == 0.5


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_gamma_outside_its_range(gamma):
    for build in (lambda: CTMScheduler(gamma=gamma), lambda: make(2, gamma=gamma)):
        with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got"):
            build()


# --- jumps


def test_a_jump_to_where_one_is_changes_nothing():
    scheduler = CTMScheduler()
    x, output = torch.randn(2, *SHAPE)
    for sigma in (0.0, 0.002, 0.5, 1 / 3, 7.7, 80.0):
        assert torch.equal(scheduler.jump(1e3 * output, x, sigma, sigma), x)


@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
def test_a_jump_is_that_of_core(sigma_data):
    scheduler = CTMScheduler(sigma_data=sigma_data)
    sigma, sigma_to = (torch.tensor(s).double() for s in ([80, 80, 0.821, 0.3, 1], [0.002, 0.5, 0, 0.2, 5]))
    x, output = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    c_skip, c_out, c_in = (c.reshape(-1, 1, 1, 1) for c in edm_scalings(sigma, sigma_data))
    expected = VE().jump(x, c_skip * x + c_out * output, sigma, sigma_to)
    torch.testing.assert_close(scheduler.jump(output, x, sigma, sigma_to), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scheduler.precondition_inputs(x, sigma), c_in * x)
    for i in range(5):  # one level for all
        one = scheduler.jump(output[i : i + 1], x[i : i + 1], float(sigma[i]), float(sigma_to[i]))
        torch.testing.assert_close(one, expected[i : i + 1], rtol=1e-12, atol=1e-12)


def test_jumps_in_float32_lose_nothing_up_or_down():
    scheduler = CTMScheduler()
    x, output = torch.randn(2, 100, 1, 4, 4)
    for sigma, sigma_to in ((80, 0.002), (0.002, 80), (0, 80), (80, 0), (1, 1.0001)):
        start = x * math.hypot(sigma, 0.5)
        exact = scheduler.jump(output.double(), start.double(), sigma, sigma_to)
        error = (scheduler.jump(output, start, sigma, sigma_to) - exact).abs().max()
        assert error < 3e-7 * exact.abs().max()


def test_the_velocity_is_the_slope_of_a_jump():
    scheduler = CTMScheduler()
    x, output = torch.randn(2, *SHAPE, dtype=torch.float64)
    for sigma in (0.002, 0.821, 80.0):
        slope = (scheduler.jump(output, x, sigma, 0.0) - x) / -sigma
        torch.testing.assert_close(scheduler.velocity(output, x, sigma), slope, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scheduler.velocity(output, x, 0.0), -output)


def test_a_step_of_heun_from_velocities_is_that_of_core():
    scheduler, sigma, sigma_to = CTMScheduler(), torch.tensor([5.0]).double(), torch.tensor([2.0]).double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)

    class Output:
        def __init__(self, sample):
            self.sample = sample

    def network(scaled, label, class_labels=None):
        return Output(torch.sin(scaled + 0.01 * label))

    def slope(x, sigma):
        output = network(scheduler.precondition_inputs(x, sigma), scheduler.labels(sigma)).sample
        return scheduler.velocity(output, x, sigma), output

    first, output = slope(x, sigma)
    second, _ = slope(scheduler.jump(output, x, sigma, sigma_to), sigma_to)
    expected = heun_step(EDMDenoiser(network, 0.5), x, sigma, sigma_to)
    torch.testing.assert_close(x - 3 * (first + second) / 2, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("data_std", [0.5, 0.2, 1.5])
@pytest.mark.parametrize("config", [{}, {"time_label": "angle", "sigma_min": 0.0}])
@pytest.mark.parametrize("steps", [{"n": 1}, {"n": 7}, {"n": 39}, {"sigmas": [80, 1, 0.9999]}])
def test_any_jumps_of_the_exact_model_of_gaussian_data_end_at_the_same_point(data_std, config, steps):
    scheduler = make(**steps, clip_denoised=False, **config)
    path = sample(scheduler, model=exact_network(scheduler, data_std))
    stds = (scheduler.sigmas**2 + data_std**2).sqrt().reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(path, path[0] * stds / stds[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_exact_model_samples_the_data_for_any_gamma(rule, gamma):
    scheduler = make(sigmas=[80, 2, 0.4], gamma=gamma, gamma_rule=rule, clip_denoised=False)
    start = torch.randn(200000, 1, dtype=torch.float64, generator=generator()) * math.hypot(80, 0.3)
    path = sample(scheduler, model=exact_network(scheduler, 0.3), start=start)
    stds = (scheduler.sigmas**2 + 0.3**2).sqrt()
    assert path.std((1, 2)).tolist() == pytest.approx(stds.tolist(), rel=0.01)


# --- estimates


def test_what_a_jump_to_the_floor_gives_is_clamped_unless_told_otherwise():
    x, output = torch.full((2, 1, 1, 2, 2), 3.0)
    for clip in (True, False):
        scheduler = make(sigmas=[5, 0.5], clip_denoised=clip)
        first = scheduler.step(output, scheduler.timesteps[0], 5 * x)
        exact = scheduler.jump(output, 5 * x, 5, 0.002)
        assert exact.min() > 1
        assert torch.equal(first.pred_original_sample, exact.clamp(max=1) if clip else exact)
        assert torch.equal(first.prev_sample, scheduler.jump(output, 5 * x, 5, 0.5))  # with any clip_denoised
        last = scheduler.step(output, scheduler.timesteps[1], x)
        assert torch.equal(last.prev_sample, last.pred_original_sample)
        assert (last.prev_sample.max() == 1) == clip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label", ["log_sigma", "angle"])
def test_noise_is_added_at_the_level_of_each_sample(label, dtype):
    scheduler = CTMScheduler(time_label=label)
    x, noise = torch.randn(2, 3, 2, 4, 4, dtype=dtype)
    sigmas = torch.tensor([0.003, 0.77, 80.0], dtype=torch.float64)
    expected = x + sigmas.to(dtype).reshape(3, 1, 1, 1) * noise
    assert torch.equal(scheduler.add_noise(x, noise, sigmas=sigmas), expected)
    torch.testing.assert_close(scheduler.add_noise(x, noise, scheduler.labels(sigmas)), expected)
    torch.testing.assert_close(scheduler.add_noise(x, noise, sigmas=0.5), x + 0.5 * noise)


# --- configuration


@pytest.mark.parametrize(
    "config, message",
    [
        *(({"time_label": "sigma"}, "time_label"), ({"gamma_rule": "code"}, "'paper' or 'official', got 'code'")),
        *(
            ({"sigma_min": -1}, "sigma_min"),
            ({"sigma_min": 80.0}, "sigma_min"),
            ({"sigma_max": math.inf}, "sigma_max"),
        ),
        *(({"sigma_min": 0.0}, "above 0 for the time_label 'log_sigma'"), ({"sigma_data": 0.0}, "sigma_data")),
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        CTMScheduler(**config)


@pytest.mark.parametrize("n", [0, 41])
def test_number_of_steps_outside_the_grid(n):
    with pytest.raises(ValueError, match=r"\[1, num_train_timesteps=40\]"):
        make(n)


def test_a_saved_scheduler_is_the_same_scheduler(tmp_path):
    config = {"gamma": 0.7, "gamma_rule": "official", "upward": True, "num_train_timesteps": 18, "sigma_min": 0.01}
    scheduler = CTMScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    again = CTMScheduler.from_pretrained(tmp_path)
    assert all(again.config[name] == value for name, value in config.items())
    for one in (scheduler, again):
        one.set_timesteps(5)
    assert torch.equal(sample(again), sample(scheduler))
    assert again.gamma == 0.7 and len(again) == 18

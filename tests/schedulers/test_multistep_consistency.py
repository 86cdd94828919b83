import json
import math

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler

from cm_diffusers import MultistepConsistencyScheduler


STEPS = [1, 2, 3, 4, 7, 40]
SHAPE = (2, 3, 4, 4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network_output(x, t):
    return torch.sin(x + 0.01 * t.to(x.dtype))


def sample(scheduler, dtype=torch.float32, start=None, model=network_output):
    """A whole run on the scheduler's levels; returns all samples."""
    start = start or scheduler.init_noise_sigma
    x, noise, path = torch.randn(SHAPE, dtype=dtype, generator=generator()) * start, generator(1), []
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, noise, return_dict=False)[0]
        path.append(x)
    return torch.stack(path)


def make(n=None, sigmas=None, timesteps=None, **config):
    scheduler = MultistepConsistencyScheduler(**config)
    scheduler.set_timesteps(n, sigmas=sigmas, timesteps=timesteps)
    return scheduler


def assert_same_samples(ours, theirs, **run):
    """Assert that samples agree bit for bit, except after the last of several steps.

    The stock scheduler keeps its last level in float32 and subtracts its floor in float64, so it adds noise of the
    size of that rounding (7e-7) after the last step. Ours adds none.
    """
    mine, expected = sample(ours, **run), sample(theirs, **run)
    if len(mine) > 1:
        draws, floor = generator(1), theirs.config.sigma_min
        noise = [torch.randn(SHAPE, generator=draws) for _ in mine][-1] * theirs.config.s_noise
        mine[-1] += noise * (torch.tensor(floor) ** 2 - floor**2) ** 0.5
    assert torch.equal(mine, expected)


def stock(n=None, timesteps=None, **config):
    scheduler = CMStochasticIterativeScheduler(**config)
    scheduler.set_timesteps(n, timesteps=timesteps)
    return scheduler


# --- the same numbers as the stock scheduler


@pytest.mark.parametrize("n", STEPS)
def test_levels_and_labels_are_those_of_the_stock_scheduler(n):
    ours, theirs = make(n), stock(n)
    assert torch.equal(ours.sigmas.float(), theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.num_inference_steps == n
    assert ours.init_noise_sigma == pytest.approx(theirs.init_noise_sigma, rel=1e-15)


@pytest.mark.parametrize("n", STEPS)
def test_scaled_inputs_are_those_of_the_stock_scheduler(n):
    ours, theirs, x = make(n), stock(n), torch.randn(2, 3, 4, 4)
    assert torch.equal(
        ours.scale_model_input(x, ours.timesteps[-1]), theirs.scale_model_input(x, theirs.timesteps[-1])
    )


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize(
    "config", [{}, {"sigma_min": 0.0}, {"clip_denoised": False, "s_noise": 1.005, "sigma_data": 0.7}]
)
def test_samples_are_those_of_the_stock_scheduler(n, config):
    assert_same_samples(make(n, **config), stock(n, **config))


@pytest.mark.parametrize("indices", [[22, 0], [38, 22, 0], [17], [38, 20, 10, 5, 1]])
def test_given_levels_do_what_the_stock_grid_indices_do(indices):
    theirs = stock(timesteps=indices)
    ours = make(sigmas=theirs.sigmas[:-1].tolist())
    assert torch.equal(ours.sigmas.float(), theirs.sigmas)
    torch.testing.assert_close(
        ours.timesteps, theirs.timesteps, rtol=0, atol=1e-4
    )  # the stock scheduler rounds sigma, not the label

    # the stock scheduler starts from sigma_max, whatever the levels
    assert_same_samples(ours, theirs, start=80.0, model=lambda x, t: x.sin())


def test_levels_and_labels_in_numbers():
    assert make(2).sigmas.tolist() == pytest.approx([80, 2.2404398, 0.002], rel=1e-7)
    two = make(sigmas=[80, 1.3823680])
    assert two.timesteps.tolist() == pytest.approx([1095.507, 80.949], abs=1e-3)
    assert make(sigmas=[80, 0.8], time_label="angle").timesteps.tolist() == pytest.approx(
        [1.56454641, math.atan(1.6)], abs=1e-8
    )


# --- levels


@pytest.mark.parametrize("sigma_min", [0.002, 0.0])
@pytest.mark.parametrize("time_label", ["log_sigma", "angle"])
def test_every_number_of_steps_falls_from_sigma_max_to_sigma_min(sigma_min, time_label):
    for n in range(1, 41):
        scheduler = make(n, sigma_min=sigma_min, time_label=time_label)
        sigmas, labels = scheduler.sigmas, scheduler.timesteps
        assert len(labels) == n == len(sigmas) - 1
        assert sigmas.isfinite().all() and labels.isfinite().all()
        assert sigmas[0] == pytest.approx(80, rel=1e-14) and sigmas[-1] == sigma_min
        assert (sigmas[:-1].diff() < 0).all() and (labels.diff() < 0).all()
        assert sigmas[-2] > sigma_min or n == 40


@pytest.mark.parametrize("time_label", ["log_sigma", "angle"])
def test_angle_and_log_labels_round_trip(time_label):
    scheduler = MultistepConsistencyScheduler(time_label=time_label)
    sigmas = np.logspace(-3, 2, 30)
    back = scheduler.timestep_to_sigma(scheduler.sigma_to_timestep(sigmas))
    np.testing.assert_allclose(back, sigmas, rtol=1e-11)


def test_sampling_starts_from_noise_of_the_first_given_level():
    assert make(sigmas=[20, 1]).init_noise_sigma == 20


@pytest.mark.parametrize("n", [0, -1, 41])
def test_number_of_steps_outside_the_grid(n):
    with pytest.raises(ValueError, match="num_train_timesteps=40"):
        make(n)


@pytest.mark.parametrize(
    "sigmas, message",
    [
        *(([], "non-empty"), ([80, math.nan], "finite"), ([math.inf, 1], "finite"), ([1, 80], "fall strictly")),
        *(([80, 1, 1], "fall strictly"), ([80, 0.002], "above sigma_min=0.002"), ([80, -1], "above sigma_min")),
    ],
)
def test_bad_levels(sigmas, message):
    with pytest.raises(ValueError, match=message):
        make(sigmas=sigmas)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("indices", [[22, 0], [39, 22, 0]])
def test_grid_indices_are_refused_with_the_levels_that_they_mean(kind, indices):
    scheduler = MultistepConsistencyScheduler()
    with pytest.raises(ValueError, match="Pass `sigmas`") as error:
        scheduler.set_timesteps(timesteps=kind(indices))
    named = str(error.value).split("sigmas=")[1].rstrip(".")
    meant = stock(timesteps=indices).sigmas.tolist()
    assert json.loads(named) == pytest.approx([s for s in meant if s > 0.00201], rel=1e-6)
    scheduler.set_timesteps(sigmas=json.loads(named))


def test_indices_beyond_the_grid_are_refused_without_levels():
    with pytest.raises(ValueError, match="not grid indices") as error:
        make(timesteps=[999, 0])
    assert "sigmas=" not in str(error.value)


@pytest.mark.parametrize(
    "config, message",
    [
        *(({"time_label": "sigma"}, "time_label"), ({"renoise": "half"}, "renoise"), ({"sigma_min": -1}, "sigma_min")),
        *(({"sigma_min": 80.0}, "sigma_min"), ({"num_train_timesteps": 1}, "num_train_timesteps")),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        MultistepConsistencyScheduler(**config)


# --- steps


@pytest.mark.parametrize("sigma_min", [0.002, 0.5, 0.0])
def test_renoising_with_and_without_the_floor(sigma_min):
    added = {}
    for renoise in ("floor", "full"):
        scheduler = make(sigmas=[80, 0.8], sigma_min=sigma_min, renoise=renoise)
        x, output = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64, generator=generator())
        step = scheduler.step(output, scheduler.timesteps[0], x, generator(1))
        added[renoise] = step.prev_sample - step.pred_original_sample
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=generator(1))
    torch.testing.assert_close(added["full"], 0.8 * noise)
    torch.testing.assert_close(added["floor"], added["full"] * math.sqrt(1 - (sigma_min / 0.8) ** 2))


def test_without_a_floor_the_denoiser_is_that_of_edm():
    scheduler = make(sigmas=[2.0, 0.5], sigma_min=0.0, clip_denoised=False)
    x, output = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    scheduler.set_begin_index(1)
    denoised = scheduler.step(output, scheduler.timesteps[1], x).pred_original_sample
    torch.testing.assert_close(denoised, 0.5 * x + 0.125**0.5 * output)


def test_estimates_are_clamped_unless_told_otherwise():
    x = torch.full((1, 1, 2, 2), 3.0)
    for clip, largest in ((True, 1.0), (False, 0.5 * 3 + 0.125**0.5 * 3)):
        scheduler = make(sigmas=[0.5], sigma_min=0.0, clip_denoised=clip)
        assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.max().item() == pytest.approx(largest)


def test_float64_samples_are_as_accurate_as_their_dtype():
    scheduler = make(sigmas=[80, 0.8], clip_denoised=False)
    x, output = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    c_skip, c_out = 0.25 / (79.998**2 + 0.25), 79.998 * 0.5 / math.sqrt(80**2 + 0.25)
    denoised = scheduler.step(output, scheduler.timesteps[0], x).pred_original_sample
    torch.testing.assert_close(denoised, c_skip * x + c_out * output, rtol=1e-13, atol=1e-15)


def test_labels_in_float32_are_found():
    scheduler, x = make(3), torch.randn(1, 1, 4, 4)
    expected = x / math.hypot(scheduler.sigmas[1], 0.5)
    torch.testing.assert_close(scheduler.scale_model_input(x, scheduler.timesteps[1].float()), expected)


# --- noise at any level


@pytest.mark.parametrize("time_label", ["log_sigma", "angle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_added_at_the_level_of_each_sample(time_label, dtype):
    scheduler = MultistepConsistencyScheduler(time_label=time_label)
    x, noise = torch.randn(2, 3, 2, 4, 4, dtype=dtype)
    sigmas = torch.tensor([0.003, 0.77, 80.0], dtype=torch.float64)
    expected = x + sigmas.to(dtype).reshape(3, 1, 1, 1) * noise
    assert torch.equal(scheduler.add_noise(x, noise, sigmas=sigmas), expected)
    labels = torch.from_numpy(scheduler.sigma_to_timestep(sigmas.numpy()))
    by_label = scheduler.add_noise(x, noise, labels)
    assert by_label.dtype == dtype
    torch.testing.assert_close(by_label, expected)


def test_noise_of_one_level_for_all_samples():
    scheduler, (x, noise) = MultistepConsistencyScheduler(), torch.randn(2, 3, 2, 4, 4)
    assert torch.equal(scheduler.add_noise(x, noise, sigmas=torch.tensor(0.5)), x + 0.5 * noise)
    torch.testing.assert_close(scheduler.add_noise(x, noise, torch.tensor(0.0)), x + noise)


def test_noise_is_that_of_the_stock_scheduler_on_its_grid():
    ours, theirs, (x, noise) = make(3), stock(3), torch.randn(2, 3, 2, 4, 4)
    torch.testing.assert_close(
        ours.add_noise(x, noise, ours.timesteps), theirs.add_noise(x, noise, theirs.timesteps), rtol=1e-6, atol=1e-5
    )


# --- configuration


CONFIG = {"sigma_min": 0.0, "sigma_data": 0.7, "time_label": "angle", "renoise": "full", "num_train_timesteps": 11}


def test_a_saved_scheduler_is_the_same_scheduler(tmp_path):
    scheduler = MultistepConsistencyScheduler(**CONFIG)
    scheduler.save_pretrained(tmp_path)
    again = MultistepConsistencyScheduler.from_pretrained(tmp_path)
    assert all(again.config[name] == value for name, value in CONFIG.items())
    for one in (scheduler, again):
        one.set_timesteps(5)
    assert torch.equal(sample(again), sample(scheduler))
    assert len(again) == 11


def test_the_configuration_of_the_stock_scheduler_is_understood():
    config = {"num_train_timesteps": 151, "sigma_max": 60.0, "sigma_data": 0.6, "rho": 5.0, "s_noise": 1.01}
    ours = MultistepConsistencyScheduler.from_config(CMStochasticIterativeScheduler(**config).config)
    ours.set_timesteps(5)
    assert_same_samples(ours, stock(5, **config))

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from cm_diffusers import CTMScheduler
from cm_diffusers.core.conditions import of_classes
from cm_diffusers.core.denoisers import (
    EDMDenoiser,
    ProcessDenoiser,
    TrajectoryDenoiser,
    to_denoised,
    trigflow_denoiser,
)
from cm_diffusers.core.interpolants import VP, LinearFlow
from cm_diffusers.core.parameterisation import edm_scalings
from cm_diffusers.core.time_labels import TIME_LABELS
from cm_diffusers.core.weightings import edm_weight, inverse_gap


def scalings(sigma, sigma_min=0.0):
    return [c.item() for c in edm_scalings(torch.tensor(sigma, dtype=torch.float64), 0.5, sigma_min)]


def random_network(sample, label, class_labels=None):
    return SimpleNamespace(sample=torch.randn_like(sample))


@pytest.mark.parametrize(
    "sigma, expected", [(0.5, (0.5, 0.35355339, 1.41421356)), (80.0, (3.9060974e-5, 0.49999023, 0.01249976))]
)
def test_edm_scalings(sigma, expected):
    assert scalings(sigma) == pytest.approx(expected, rel=1e-6)


def test_scalings_with_the_floor_of_the_consistency_models():
    assert scalings(0.5, 0.002)[:2] == pytest.approx((0.50200400, 0.35213918), rel=1e-7)
    assert scalings(80.0, 0.002)[1] == pytest.approx(0.49997773, rel=1e-7)
    assert scalings(0.002, 0.002)[:2] == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time_label", TIME_LABELS)
@pytest.mark.parametrize("sigma_min", [0.0, 0.002])
def test_denoiser_is_the_identity_at_its_floor_whatever_the_network_says(sigma_min, time_label, dtype):
    x = 3 * torch.randn(4, 1, 8, 8, dtype=dtype)
    denoise = EDMDenoiser(random_network, 0.5, sigma_min, time_label)
    assert torch.equal(denoise(x, torch.full((4,), sigma_min, dtype=dtype)), x)
    assert not torch.equal(denoise(x, torch.full((4,), 0.1, dtype=dtype)), x)


def test_denoiser_feeds_scaled_input_label_and_class():
    seen = {}

    def network(sample, label, class_labels=None):
        seen.update(sample=sample, label=label, class_labels=class_labels)
        return SimpleNamespace(sample=torch.ones_like(sample))

    x, sigma = torch.randn(2, 3, 4, 4).double(), torch.tensor([0.5, 80.0]).double()
    classes = torch.tensor([3, 1])
    denoised = EDMDenoiser(network, 0.5)(x, sigma, of_classes(classes))
    torch.testing.assert_close(seen["sample"][0], x[0] * 1.4142135623730951)
    assert seen["label"].tolist() == pytest.approx([250 * math.log(0.5), 250 * math.log(80)])
    assert seen["class_labels"] is classes
    torch.testing.assert_close(denoised[0], 0.5 * x[0] + 0.125**0.5)


# --- trajectory models


def two_time_network(sample, label, target_timestep, class_labels=None):
    """A smooth function of all its inputs."""
    times = (label / 300).sin() + (target_timestep / 200).cos() + class_labels
    return SimpleNamespace(sample=(sample + times.reshape(-1, 1, 1, 1)).sin())


def gaussian_trajectories(sigma_data, std):
    """A network with labels 250 ln(sigma) whose jumps and denoiser are exact for data N(0, std^2)."""

    def network(sample, label, target_timestep, class_labels=None):
        t, s = ((value / 250).exp().reshape(-1, 1, 1, 1) for value in (label, target_timestep))
        c_skip, c_out, c_in = edm_scalings(t, sigma_data)
        x = sample / c_in
        if torch.equal(t, s):
            g = std**2 / (t**2 + std**2) * x
        else:
            g = (x * ((s**2 + std**2) / (t**2 + std**2)).sqrt() - s / t * x) / (1 - s / t)
        return SimpleNamespace(sample=(g - c_skip * x) / c_out)

    return network


LEVELS = torch.tensor([0.002, 0.01, 1 / 3, 0.8, 7.0, 80.0], dtype=torch.float64)
CLASSES = torch.arange(6)
CONDITION = of_classes(CLASSES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time_label", ["log_sigma", "angle"])
def test_a_jump_to_where_one_is_changes_nothing_whatever_the_network_says(time_label, dtype):
    x, sigma = 3 * torch.randn(6, 1, 8, 8, dtype=dtype), LEVELS.to(dtype)
    model = TrajectoryDenoiser(lambda x, t, target_timestep: random_network(x, t), 0.5, 0.01, time_label)
    assert torch.equal(model.jump(x, sigma, sigma), x)
    changed = [not torch.equal(after, before) for after, before in zip(model(x, sigma), x)]
    assert changed == [True, False, True, True, True, True]


@pytest.mark.parametrize("time_label", ["log_sigma", "angle"])
def test_jumps_are_those_of_the_scheduler(time_label):
    x, target = LEVELS.reshape(-1, 1, 1, 1) * torch.randn(6, 1, 4, 4).double(), LEVELS.flip(0)
    scheduler = CTMScheduler(sigma_data=0.7, time_label=time_label)
    model = TrajectoryDenoiser(two_time_network, 0.7, scheduler.config.sigma_min, time_label)

    def output(target):
        network_input = scheduler.precondition_inputs(x, LEVELS)
        return two_time_network(network_input, scheduler.labels(LEVELS), scheduler.labels(target), CLASSES).sample

    floor = torch.full((6,), 0.002, dtype=torch.float64)
    for moved, s in ((model.jump(x, LEVELS, target, CONDITION), target), (model(x, LEVELS, CONDITION), floor)):
        torch.testing.assert_close(moved, scheduler.jump(output(s), x, LEVELS, s), rtol=1e-12, atol=1e-12)
    by_velocity = x - LEVELS.reshape(-1, 1, 1, 1) * scheduler.velocity(output(LEVELS), x, LEVELS)
    torch.testing.assert_close(model.denoise(x, LEVELS, CONDITION), by_velocity, rtol=1e-12, atol=1e-11)


def test_a_jump_is_equation_9():
    x, t, s = torch.randn(6, 1, 4, 4).double(), LEVELS, LEVELS.flip(0) / 2
    c_skip, c_out, c_in = (c.reshape(-1, 1, 1, 1) for c in edm_scalings(t, 0.5))
    g = c_skip * x + c_out * two_time_network(c_in * x, 250 * t.log(), 250 * s.log(), CLASSES).sample
    share = (s / t).reshape(-1, 1, 1, 1)
    moved = TrajectoryDenoiser(two_time_network, 0.5).jump(x, t, s, CONDITION)
    torch.testing.assert_close(moved, share * x + (1 - share) * g, rtol=1e-10, atol=1e-10)


SCHEDULE = {"beta_schedule": "linear"}
ABAR = DDPMScheduler(**SCHEDULE).alphas_cumprod.double()
PROCESSES = {"flow": (LinearFlow(), {"time_scale": 1000.0}), "epsilon": (VP(ABAR), {"noise_schedule": SCHEDULE})}
PROCESSES["v_prediction"] = (VP(ABAR), {"noise_schedule": SCHEDULE})


@pytest.mark.parametrize("prediction", PROCESSES)
def test_jumps_of_other_predictions_are_equation_9_and_those_of_the_scheduler(prediction):
    """g is `to_denoised` of the network's output on the network's own process."""
    process, config = PROCESSES[prediction]
    x, t, s = torch.randn(6, 1, 4, 4).double(), LEVELS, LEVELS.flip(0) / 2
    time_scale = config.get("time_scale", 1.0)
    model = TrajectoryDenoiser(two_time_network, 0.5, 0.002, "", prediction, process, time_scale)
    x_t = process.alpha(t).reshape(-1, 1, 1, 1) * x
    output = two_time_network(x_t, time_scale * process.time(t), time_scale * process.time(s), CLASSES).sample
    g = to_denoised(prediction, output, x_t, t, process)
    share = (s / t).reshape(-1, 1, 1, 1)
    moved = model.jump(x, t, s, CONDITION)
    torch.testing.assert_close(moved, share * x + (1 - share) * g, rtol=1e-9, atol=1e-9)
    assert model.jump(x, t, t, CONDITION).equal(x)

    scheduler = CTMScheduler(sigma_data=0.5, prediction=prediction, **config)
    torch.testing.assert_close(scheduler.precondition_inputs(x, t), x_t)
    np.testing.assert_allclose(scheduler.labels(t), time_scale * process.time(t), rtol=1e-9)
    torch.testing.assert_close(scheduler.jump(output, x, t, s), moved, rtol=1e-9, atol=1e-9)
    slope = (x - scheduler.jump(output, x, t, torch.zeros_like(t))) / t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(scheduler.velocity(output, x, t), slope, rtol=1e-9, atol=1e-9)


def test_jumps_and_denoiser_of_a_gaussian():
    model, t = TrajectoryDenoiser(gaussian_trajectories(0.5, 0.3), 0.5), LEVELS[1:]
    x, s = t.reshape(-1, 1, 1, 1) * torch.randn(5, 1, 4, 4).double(), LEVELS[:-1]

    def exact(s):
        return x * ((s**2 + 0.09) / (t**2 + 0.09)).sqrt().reshape(-1, 1, 1, 1)

    torch.testing.assert_close(model.jump(x, t, s), exact(s), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x, t), exact(torch.full_like(t, 0.002)), rtol=1e-9, atol=1e-9)
    denoised = 0.09 / (t**2 + 0.09).reshape(-1, 1, 1, 1) * x
    torch.testing.assert_close(model.denoise(x, t), denoised, rtol=1e-9, atol=1e-9)


# --- networks with their own process


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
def test_a_trigflow_network_is_edm_s_of_the_opposite_sign_on_the_same_input(sigma_data):
    """c_in is cos(t) / sigma_data: the network gets x_t / sigma_data, of variance 1 for data of std sigma_data."""
    seen = []

    def network(sample, label, class_labels=None, sign=1):
        seen.append((sample, label, class_labels))
        return SimpleNamespace(sample=sign * (sample + label.reshape(-1, 1, 1, 1)).sin())

    def opposite(*args, **kwargs):
        return network(*args, **kwargs, sign=-1)

    x = (LEVELS**2 + sigma_data**2).sqrt().reshape(-1, 1, 1, 1) * torch.randn(6, 1, 4, 4).double()
    ours = trigflow_denoiser(network, sigma_data)(x, LEVELS, CONDITION)
    theirs = EDMDenoiser(opposite, sigma_data, time_label="angle")(x, LEVELS, CONDITION)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[0][0], x / (LEVELS**2 + sigma_data**2).sqrt().reshape(-1, 1, 1, 1))
    assert all(classes is CLASSES for _, _, classes in seen)


def test_a_sample_beyond_the_process_is_shrunk_onto_its_highest_level():
    """Above a table, D(x, sigma) = D(x sigma_max / sigma, sigma_max). Below it the network gets time 0."""
    process, times = VP(ABAR), []

    def network(sample, time, class_labels=None):
        times.append(time)
        return SimpleNamespace(sample=sample.cos())

    model, highest = ProcessDenoiser(network, process, "epsilon"), process.sigma_max
    x = torch.randn(2, 1, 4, 4).double()
    beyond = model(x, torch.tensor([2 * highest, 1e9]).double())
    shares = torch.tensor([0.5, highest / 1e9]).double().reshape(2, 1, 1, 1)
    torch.testing.assert_close(beyond, model(shares * x, torch.tensor([highest, highest]).double()))
    model(x, torch.tensor([0.0, process.sigma(torch.zeros(1).double()).item() / 2]).double())
    assert times[0].tolist() == [len(ABAR) - 1] * 2 and times[2].tolist() == [0, 0]


# --- time labels and weights


def test_angle_labels_are_those_of_trigflow():
    levels = {
        **{0.002: 0.00399998, 0.02: 0.03997869, 0.5: 0.78539816, 0.821: 1.02377567, 1: 1.10714872, 1.526: 1.25416585},
        **{2: 1.32581767, 5: 1.47112767, 80: 1.56454641, 800: 1.57017133},
    }
    angles = TIME_LABELS["angle"].from_sigma(torch.tensor([*levels], dtype=torch.float64), 0.5)
    torch.testing.assert_close(angles, torch.tensor([*levels.values()]).double(), rtol=0, atol=1e-8 + 6e-8)
    back = TIME_LABELS["angle"].to_sigma(torch.tensor([1.1, 1.3], dtype=torch.float64), 0.5)
    assert back.tolist() == pytest.approx([0.98237983, 1.80105122], rel=1e-8)


@pytest.mark.parametrize("name", TIME_LABELS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_time_labels_round_trip(name, sigma_data):
    sigma = torch.logspace(-4, 3, 100, dtype=torch.float64)
    label = TIME_LABELS[name].from_sigma(sigma, sigma_data)
    assert (label.diff() > 0).all()
    torch.testing.assert_close(TIME_LABELS[name].to_sigma(label, sigma_data), sigma, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["angle", "flow_time"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounded_time_labels_end_at_infinite_sigma(name, dtype):
    """In float32, pi / 2 is rounded to a number above pi / 2, whose tangent is negative."""
    label = TIME_LABELS[name].from_sigma(torch.tensor([1e30]), 0.5).to(dtype)
    assert label.item() == {"angle": float(np.float32(math.pi / 2)), "flow_time": 1.0}[name]
    assert TIME_LABELS[name].to_sigma(label, 0.5).item() == math.inf
    assert TIME_LABELS[name].to_sigma(torch.zeros(1, dtype=dtype), 0.5).item() == 0


@pytest.mark.parametrize("name", TIME_LABELS)
def test_time_labels_are_finite_at_zero(name):
    assert TIME_LABELS[name].from_sigma(torch.zeros(3), 0.5).isfinite().all()


def test_edm_weight():
    sigma = torch.tensor([0.002, 0.02, 0.1, 0.5, 1, 5], dtype=torch.float64)
    assert edm_weight(sigma, 0.5).tolist() == pytest.approx([250004, 2504, 104, 8, 5, 4.04], rel=1e-12)


def test_edm_weight_is_the_inverse_square_of_c_out():
    sigma = torch.logspace(-3, 2, 30, dtype=torch.float64)
    torch.testing.assert_close(edm_weight(sigma, 0.7), edm_scalings(sigma, 0.7)[1] ** -2, rtol=1e-13, atol=0)


def test_inverse_gap():
    assert inverse_gap(torch.tensor([0.5, 4.0])).tolist() == [2, 0.25]

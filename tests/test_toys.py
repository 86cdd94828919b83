"""The exact solutions of the toy problems, and training, which finds them."""

import json
import math
import re

import pytest
import torch

from cm_diffusers.core.parameterisation import edm_scalings
from cm_diffusers.core.solvers import heun_step
from cm_diffusers.objectives import OBJECTIVES, ModelSpec
from cm_diffusers.toys import TASKS, Mixture, Shape, ToyDraws, ToyNetwork, ToyOutput, trajectories
from tests.helpers.breadth import narrowed
from tests.helpers.scripts import load_script


MIXTURES = {name: task for name, task in TASKS.items() if isinstance(task, Mixture)}
SHAPES = {name: task for name, task in TASKS.items() if isinstance(task, Shape)}
SAMPLERS = ["data", "one_step", "two_steps", "gamma_0.5", "euler_10"]
# x, t, posterior mean, consistency function, jump to t = 0.5, in TrigFlow's scale
BIMODAL = [
    (0.3, 1.0, 0.19153963, 0.41635274, 0.35581955),
    (0.6, 1.3, 0.16417903, 0.61217312, 0.62154666),
    (-0.7, 0.8, -0.49464864, -0.66491603, -0.69435771),
    (-0.7, 0.5, -0.58608186, None, None),
    (1.0, 1.5, 0.07066098, None, None),
    (0.05, math.atan(160), 0.00031250, 0.13898284, 0.06866749),
    (1.0, math.atan(160), 0.00624983, 0.82514116, 0.91609504),
]


@pytest.mark.parametrize("x, t, denoised, consistent, halfway", BIMODAL)
def test_golden_numbers_of_the_bimodal_task(x, t, denoised, consistent, halfway):
    task, t = TASKS["bimodal"], torch.tensor([t], dtype=torch.float64)
    sigma = 0.5 * t.tan()
    x = torch.tensor([x], dtype=torch.float64) / t.cos()
    assert task.denoised(x, sigma).item() == pytest.approx(denoised, abs=1e-8)
    if consistent is not None:
        assert task.jump(x, sigma, 0 * sigma).item() == pytest.approx(consistent, abs=1e-8)
        there = 0.5 * torch.full_like(t, 0.5).tan()
        assert task.jump(x, sigma, there).item() * math.cos(0.5) == pytest.approx(halfway, abs=1e-8)


@pytest.mark.parametrize("task", MIXTURES.values(), ids=MIXTURES)
def test_jumps_are_those_of_the_ode(task):
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    sigmas = torch.linspace(1.5, 0.1, 400, dtype=torch.float64)
    end = x
    for now, then in zip(sigmas, sigmas[1:]):
        end = heun_step(task.denoised, end, now.expand(13), then.expand(13))
    jumped = task.jump(x, sigmas[:1].expand(13), sigmas[-1:].expand(13))
    torch.testing.assert_close(jumped, end, rtol=1e-4, atol=1e-5)


def test_gaussian_is_what_theory_says():
    task, x, sigma = TASKS["gaussian"], torch.randn(5, 1, 1, 1, dtype=torch.float64), torch.rand(5).double() + 0.1
    factor = 0.25 / (0.25 + sigma**2)
    torch.testing.assert_close(task.denoised(x, sigma), factor.reshape(-1, 1, 1, 1) * x)
    torch.testing.assert_close(task.jump(x, sigma, 0 * sigma), factor.sqrt().reshape(-1, 1, 1, 1) * x)


@pytest.mark.parametrize("name", TASKS)
def test_samples_have_the_moments_of_the_task(name):
    task, draws = TASKS[name], ToyDraws(0, 0, range(200_000))
    samples = task.sample(draws)
    assert samples.shape == (200_000, task.dimensions, 1, 1)
    assert task.sigma_data == pytest.approx(0.5)
    assert samples.square().mean().item() == pytest.approx(0.25, abs=0.003)
    if name in MIXTURES:
        mean = sum(w * m for m, w in zip(task.means, task.weights))
        assert samples.mean().item() == pytest.approx(mean, abs=0.005)
        assert task.cumulative(samples, torch.zeros(200_000)).mean().item() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("task", MIXTURES.values(), ids=MIXTURES)
def test_density_is_the_slope_of_the_distribution_function(task):
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    cumulative = task.cumulative(x, x.new_zeros(()))
    slope = torch.gradient(cumulative, spacing=(x,))[0]
    torch.testing.assert_close(task.density(x)[1:-1], slope[1:-1], rtol=0, atol=1e-3)
    assert task.density(x).sum().item() * 0.001 == pytest.approx(1, abs=1e-6)


def test_the_tasks_of_the_line_have_the_shapes_of_their_names():
    factor = 0.5 / (1.5**2 + 0.3**2) ** 0.5
    assert TASKS["two_gmm"].means == pytest.approx((-1.5 * factor, 1.5 * factor))
    assert TASKS["two_gmm"].stds == pytest.approx((0.3 * factor, 0.3 * factor))
    assert TASKS["uneven_two_gmm"].weights == (0.7, 0.3)
    assert TASKS["uneven_two_gmm"].stds[0] / TASKS["uneven_two_gmm"].stds[1] == pytest.approx(1.5)
    assert TASKS["single_gaussian"].means[0] / TASKS["single_gaussian"].stds[0] == pytest.approx(5)
    assert len(TASKS["three_gmm"].means) == 3 and sum(TASKS["three_gmm"].weights) == pytest.approx(1)


def plane(name):
    """Points (B, 2) of a shape, in its definition's units."""
    task = SHAPES[name]
    points = task.sample(ToyDraws(0, 0, range(20_000))).flatten(1)
    return points * (task.square + task.noise**2) ** 0.5 / task.sigma_data


def test_checkerboard_fills_every_second_field_evenly():
    columns, rows = (2 * (plane("checkerboard") + 1)).floor().long().T
    counts = torch.zeros(4, 4).index_put((columns, rows), torch.ones(20_000), accumulate=True)
    black = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert (counts[black] == 0).all() != (counts[~black] == 0).all()
    torch.testing.assert_close(counts[counts > 0], torch.full((8,), 2500.0), rtol=0.1, atol=0)


def test_moons_are_two_half_circles():
    points = plane("moons") + torch.tensor([0.5, 0.25])
    upper = torch.linalg.vector_norm(points, dim=1)
    lower = torch.linalg.vector_norm(points - torch.tensor([1.0, 0.5]), dim=1)
    nearest = torch.minimum((upper - 1).abs(), (lower - 1).abs())
    assert nearest.max() < 6 * 0.05
    assert points.mean(0).tolist() == pytest.approx([0.5, 0.25], abs=0.02)


def test_spiral_winds_out_in_one_and_a_half_turns():
    x, y = plane("spiral").double().T
    radius = (x**2 + y**2).sqrt()
    turns = (torch.atan2(y, x) - 3 * math.pi * radius) / (2 * math.pi)
    off = ((turns - turns.round()) * 2 * math.pi * radius).abs()  # along the circle
    assert off.max() < 0.02 * 6 * 3 * math.pi
    assert radius.square().mean().item() == pytest.approx(0.5, abs=0.01)


def test_jump_keeps_its_precision_in_both_tails():
    task = Mixture((-1.0, 2.0), (0.1, 0.2), (0.3, 0.7))
    x = torch.tensor([-400.0, 400.0], dtype=torch.float64)
    sigma, there = torch.full((2,), 80.0).double(), torch.full((2,), 79.0).double()
    torch.testing.assert_close(task.jump(task.jump(x, sigma, there), there, sigma), x, rtol=1e-9, atol=0)


@pytest.mark.parametrize("channels", [1, 2])
def test_toy_network_has_the_call_of_a_unet(channels):
    network = ToyNetwork(channels)
    x = torch.rand(4, channels, 1, 1)
    assert network(x, torch.rand(4), class_labels=None).sample.shape == x.shape
    assert network(x, torch.tensor(0.5), return_dict=False)[0].shape == x.shape
    assert network.config.in_channels == channels


def test_the_second_time_does_nothing_at_first_and_can_be_learned():
    network, x, t = ToyNetwork(2, two_times=True), torch.rand(4, 2, 1, 1), torch.rand(4)
    torch.nn.init.normal_(network.conv_out.weight)
    alone = network(x, t).sample
    assert torch.equal(network(x, t, torch.rand(4)).sample, alone)
    network(x, t, torch.rand(4)).sample.square().sum().backward()
    assert network.target.weight.grad.abs().min() > 0


def test_wasserstein_distance_of_shifted_gaussians_is_the_shift():
    noise = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    assert trajectories.wasserstein(noise, noise + 0.3) == pytest.approx(0.3, abs=1e-6)
    assert trajectories.wasserstein(noise[torch.randperm(20_000)], noise) == 0
    other = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    assert trajectories.wasserstein(noise, 1.5 * other) == pytest.approx(0.5 * (2 / math.pi) ** 0.5, abs=0.02)


def test_sliced_distance_of_a_shift_is_its_mean_over_directions():
    points = torch.randn(100, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    for shift in ([0.3, 0.0], [0.0, 0.3], [0.18, 0.24]):
        moved = points + torch.tensor(shift).reshape(2, 1, 1)
        assert trajectories.wasserstein(points, moved) == pytest.approx(0.3 * 2 / math.pi, rel=2e-3)


class ExactNetwork(ToyNetwork):
    """The F with the jumps of `task`, whose denoiser, at two equal times, is the posterior mean."""

    def forward(self, sample, timestep, target_timestep, class_labels=None, return_dict=True):
        t, s = (0.5 * label.double().tan().expand(len(sample)) for label in (timestep, target_timestep))
        c_skip, c_out, c_in = (c.reshape(-1, 1, 1, 1) for c in edm_scalings(t, 0.5))
        x, share = sample / c_in, (s / t).reshape(-1, 1, 1, 1)
        if bool((s == t).all()):
            g = self.task.denoised(x, t)
        else:
            g = (self.task.jump(x, t, s) - share * x) / (1 - share)  # eq. 9
        output = ((g - c_skip * x) / c_out).float()
        return ToyOutput(output) if return_dict else (output,)


@pytest.mark.parametrize("name", ["single_gaussian", "three_gmm"])
def test_exact_jumps_reach_the_data_by_every_sampler(name):
    objective_class = OBJECTIVES["ctm"]
    network = ExactNetwork(two_times=True)
    network.task = TASKS[name]
    objective = objective_class(network, ModelSpec(0.5, "angle", 80.0), objective_class.Options(), 1)
    measured = trajectories.distances(trajectories.draw_samples(trajectories.pipeline(objective), TASKS[name], 10_000))
    assert list(measured) == SAMPLERS
    for sampler in ("data", "one_step", "two_steps", "gamma_0.5"):
        assert measured[sampler] < 0.012, measured
    assert 0.015 < measured["euler_10"] < 0.1, measured  # the error of ten Euler steps along the exact ODE


def train(folder, **settings):
    """The report of a run of train_toy.py, which must also save a picture."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    load_script("train_toy").main([*words, "--output_dir", str(folder)])
    assert (folder / "toy.png").stat().st_size > 10_000
    return json.loads((folder / "report.json").read_text())


@pytest.mark.wide
@pytest.mark.parametrize("method", ["diffusion", "scd", "sct"])
def test_training_finds_the_exact_answer(method, tmp_path):
    taught = {"teacher": "exact"} if method in ("scd", "ctm") else {}
    report = train(tmp_path, method=method, max_train_steps=1000, batch_size=256, **taught)
    assert report["rms_error"] < (0.05 if method == "sct" else 0.03), report


@pytest.mark.parametrize(
    "task, teacher",
    narrowed([("two_gmm", "trained"), ("two_gmm", "none"), ("spiral", "trained")], ("spiral", "trained")),
)
def test_a_short_run_of_ctm_leaves_its_report(task, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "SAMPLES", 500)
    report = train(tmp_path, task=task, method="ctm", teacher=teacher, max_train_steps=4, batch_size=16)
    assert list(report["wasserstein"]) == SAMPLERS
    assert all(0 <= value < 10 for value in report["wasserstein"].values())
    assert report["task"] == task and report["method"] == "ctm" and report["seed"] == 0 and report["seconds"] > 0
    assert ("rms_error" in report) == (task == "two_gmm")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "two_moons"], "single_gaussian.*two_gmm.*three_gmm.*moons.*checkerboard.*spiral"),
        (["--task", "moons", "--method", "scd"], "no exact answer"),
        (["--task", "moons", "--method", "ctm", "--teacher", "exact"], "no exact answer"),
        (["--method", "scd", "--teacher", "none"], "distils a teacher"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_script("train_toy").main([*arguments, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    assert re.search(message, capsys.readouterr().err)

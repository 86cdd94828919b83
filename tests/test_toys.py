"""The exact answers of the toy problems, and that training finds them."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from cm_diffusers.core.solvers import heun_step
from cm_diffusers.toys import TASKS, Mixture, ToyDraws, ToyNetwork


TRAINING = Path(__file__).parents[1] / "training"
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


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
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


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_samples_have_the_moments_of_the_mixture(task):
    assert task.sigma_data == pytest.approx(0.5)
    draws = ToyDraws(0, 0, range(200_000))
    samples = task.sample(draws.uniform("term"), draws.normal("data"))
    assert samples.shape == (200_000, 1, 1, 1)
    assert samples.square().mean().item() == pytest.approx(0.25, abs=0.003)
    assert samples.mean().item() == pytest.approx(0, abs=0.005)
    assert task.cumulative(samples, torch.zeros(200_000)).mean().item() == pytest.approx(0.5, abs=0.005)


def test_jump_keeps_its_precision_in_both_tails():
    task = Mixture((-1.0, 2.0), (0.1, 0.2), (0.3, 0.7))
    x = torch.tensor([-400.0, 400.0], dtype=torch.float64)
    sigma, there = torch.full((2,), 80.0).double(), torch.full((2,), 79.0).double()
    torch.testing.assert_close(task.jump(task.jump(x, sigma, there), there, sigma), x, rtol=1e-9, atol=0)


def test_toy_network_has_the_call_of_a_unet():
    network = ToyNetwork()
    assert network(torch.rand(4, 1, 1, 1), torch.rand(4), class_labels=None).sample.shape == (4, 1, 1, 1)


@pytest.mark.parametrize("method", ["diffusion", "scd", "sct"])
def test_training_finds_the_exact_answer(method, tmp_path):
    arguments = ["--method", method, "--teacher", "exact", "--max_train_steps", "1000", "--batch_size", "256"]
    spec = importlib.util.spec_from_file_location("train_toy", TRAINING / "train_toy.py")
    train_toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_toy)
    train_toy.main([*arguments, "--output_dir", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    assert report["rms_error"] < (0.05 if method == "sct" else 0.03), report

import math

import pytest
import torch

from cm_diffusers.core.arrays import append_dims
from cm_diffusers.core.interpolants import VE
from cm_diffusers.core.karras import karras_sigmas
from cm_diffusers.core.solvers import euler_step, heun_step, ode_slope, reverse_sde_step


SIGMA_DATA = 0.5


def denoise(x, sigma):
    """The exact denoiser of data N(0, SIGMA_DATA^2)."""
    return x * append_dims(SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2), x)


def endpoint_error(step, n, sigma=5.0, end=0.01):
    """Distance to the exact solution after `n` steps along a Karras grid, which becomes smooth under refinement."""
    x = torch.tensor([[1.7]], dtype=torch.float64)
    exact = x * math.hypot(end, SIGMA_DATA) / math.hypot(sigma, SIGMA_DATA)
    grid = karras_sigmas(n + 1, end, sigma)
    for now, then in zip(grid[:-1, None], grid[1:, None]):
        x = step(x, now, then)
    return (x - exact).abs().item()


def jump(x, now, then):
    return VE().jump(x, denoise(x, now), now, then)


def test_add_noise_uses_the_level_of_each_sample():
    x0, noise, sigma = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.5, 80.0])
    noisy = VE().add_noise(x0, noise, sigma)
    for row in range(3):
        assert torch.equal(noisy[row], x0[row] + sigma[row] * noise[row])


def test_time_of_ve_is_sigma():
    sigma = torch.tensor([0.1, 3.0])
    assert torch.equal(VE().sigma(VE().time(sigma)), sigma)
    assert torch.equal(VE().alpha(sigma), torch.ones(2))


def test_jump_to_the_same_level_is_the_identity():
    x, sigma = torch.randn(4, 3, 8, 8), torch.tensor([0.002, 0.5, 7.0, 80.0])
    assert torch.equal(VE().jump(x, torch.randn_like(x), sigma, sigma), x)


def test_jump_to_zero_gives_the_denoised_sample():
    x, denoised, sigma = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([0.5, 80.0])
    assert torch.equal(VE().jump(x, denoised, sigma, torch.zeros(2)), denoised)


def test_jump_of_noised_data_lands_on_the_same_noise():
    x0, noise = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    sigma, then = torch.tensor([5.0, 0.3]).double(), torch.tensor([1.0, 0.2]).double()
    moved = VE().jump(VE().add_noise(x0, noise, sigma), x0, sigma, then)
    torch.testing.assert_close(moved, VE().add_noise(x0, noise, then), rtol=1e-12, atol=1e-12)


def test_euler_step_is_the_jump_of_ve():
    x, sigma, then = torch.randn(3, 1, 4, 4).double(), torch.tensor([5.0, 1, 0.1]).double(), torch.rand(3).double()
    torch.testing.assert_close(euler_step(denoise, x, sigma, then), jump(x, sigma, then), rtol=1e-13, atol=1e-13)


def test_slope_is_that_of_the_exact_trajectory():
    x, sigma = torch.randn(3, 1, 4, 4).double(), torch.tensor([5.0, 1, 0.1]).double()
    exact = x * append_dims(sigma / (sigma**2 + SIGMA_DATA**2), x)
    torch.testing.assert_close(ode_slope(denoise, x, sigma), exact, rtol=1e-13, atol=1e-13)


def test_many_small_jumps_converge_to_the_consistency_function():
    assert endpoint_error(jump, 4000, end=1e-4) < 2e-4
    x, sigma = torch.tensor([[1.7]]), torch.tensor([5.0])
    f = x * SIGMA_DATA / math.hypot(5.0, SIGMA_DATA)
    assert (jump(x, sigma, torch.zeros(1)) - f).abs() > 0.1  # a single jump gives the mean instead


@pytest.mark.parametrize(
    "step, order",
    [
        (jump, 1),
        (lambda x, now, then: euler_step(denoise, x, now, then), 1),
        (lambda x, now, then: heun_step(denoise, x, now, then), 2),
    ],
    ids=["jump", "euler", "heun"],
)
def test_order_of_convergence(step, order):
    errors = [endpoint_error(step, n) for n in (200, 400, 800)]
    measured = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert measured == pytest.approx([order, order], abs=0.05)


def moments_of_the_sde(n, start=2.0, end=0.1):
    """Mean (in units of x) and variance after `n` steps of the SDE from a fixed point x."""
    mean, variance = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    zero = torch.zeros_like(mean)
    grid = karras_sigmas(n + 1, end, start)[:, None]
    for now, then in zip(grid, grid[1:]):
        factor = reverse_sde_step(denoise(zero + 1, now), zero + 1, now, then, zero)
        spread = reverse_sde_step(zero, zero, now, then, zero + 1)
        mean, variance = factor * mean, factor**2 * variance + spread**2
    return mean.item(), variance.item()


def test_weak_order_of_the_reverse_sde():
    """The law of x_end given x_start is Gaussian for Gaussian data, with moments from Bayes' rule."""
    before, after = 2.0**2 + SIGMA_DATA**2, 0.1**2 + SIGMA_DATA**2
    exact = (after / before, after - after**2 / before)
    errors = [[abs(a - b) for a, b in zip(moments_of_the_sde(n), exact)] for n in (200, 400, 800)]
    assert max(errors[-1]) < 2e-3
    for coarse, fine in zip(errors, errors[1:]):
        assert [math.log2(a / b) for a, b in zip(coarse, fine)] == pytest.approx([1, 1], abs=0.05)


def test_a_step_of_the_reverse_sde_that_goes_nowhere():
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.002, 0.5, 7.0, 80.0])
    assert torch.equal(reverse_sde_step(torch.randn_like(x), x, sigma, sigma, torch.randn_like(x)), x)

"""Forward processes and predictions besides EDM's: one coordinate, round trips, and the place of pure noise."""

import math

import pytest
import torch

from cm_diffusers.core.denoisers import PROCESS_PREDICTIONS, from_denoised, to_denoised
from cm_diffusers.core.interpolants import VE, VP, LinearFlow, TrigFlow
from cm_diffusers.schedulers.network_input import network_input


SIGMAS = torch.tensor([0.002, 0.02, 0.5, 0.821, 1.0, 1.526, 2.0, 5.0, 80.0, 800.0], dtype=torch.float64)


def scaled_linear(zero_terminal_snr=False):
    """Stable Diffusion's schedule, and its rescaling to zero terminal SNR (Lin et al. 2023, algorithm 1)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    if zero_terminal_snr:
        root = abar.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        abar = root**2
    return abar


PROCESSES = {
    "ve": VE(),
    "trigflow": TrigFlow(0.5),
    "linear flow": LinearFlow(),
    "vp": VP(scaled_linear()),
    "vp, zero terminal snr": VP(scaled_linear(True)),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@every_process
def test_sigma_is_the_ratio_of_noise_to_signal(process):
    torch.testing.assert_close(process.std(SIGMAS) / process.alpha(SIGMAS), SIGMAS, rtol=1e-12, atol=0)


@every_process
def test_sigma_and_time_are_inverse(process):
    inside = SIGMAS
    if isinstance(process, VP):  # its integer times end at finite levels
        low, high = process.sigma(torch.tensor([0.0, len(process.angles) - 1.0], dtype=torch.float64))
        inside = SIGMAS[(low <= SIGMAS) & (high >= SIGMAS)]
        assert len(inside) > 5
    torch.testing.assert_close(process.sigma(process.time(inside)), inside, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "process, time, std",
    [
        (PROCESSES["trigflow"], math.pi / 2, 0.5),
        (LinearFlow(), 1.0, 1.0),
        (PROCESSES["vp, zero terminal snr"], 999.0, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure_noise_has_infinite_sigma_and_no_signal(process, time, std, dtype):
    end = torch.tensor([time], dtype=dtype)
    sigma = process.sigma(end)
    assert sigma.isinf().all()
    assert process.alpha(sigma).item() == 0
    assert process.std(sigma).item() == std
    torch.testing.assert_close(process.time(sigma), end)


@every_process
def test_no_noise_at_sigma_zero(process):
    zero = torch.zeros(1, dtype=torch.float64)
    assert process.std(zero).item() == 0 and process.alpha(zero).item() == 1


def test_known_times():
    angles = [0.00399998, 0.03997869, 0.78539816, 1.02377567, 1.10714872, 1.25416585, 1.32581767, 1.47112767]
    angles = torch.tensor([*angles, 1.56454641, 1.57017133], dtype=torch.float64)
    torch.testing.assert_close(TrigFlow(0.5).time(SIGMAS), angles, rtol=0, atol=1.1e-8)
    flow = LinearFlow().time(torch.tensor([0.5, 0.821, 80.0], dtype=torch.float64))
    torch.testing.assert_close(
        flow, torch.tensor([0.33333333, 0.45085118, 0.98765432], dtype=torch.float64), rtol=0, atol=1.1e-8
    )


def test_vp_times_are_the_integers_of_its_table():
    abar, process = scaled_linear(), PROCESSES["vp"]
    numbers = torch.tensor([0, 19, 259, 499, 999])
    known = torch.tensor([0.99915, 0.98224399, 0.65897553, 0.27766966, 0.0046601], dtype=torch.float64)
    torch.testing.assert_close(abar[numbers], known, rtol=0, atol=1.1e-8)
    sigma = (1 / abar[numbers] - 1).sqrt()
    torch.testing.assert_close(process.time(sigma), numbers.double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(process.sigma(numbers.double()), sigma)


ANGLES = [0.1, 0.3, 0.4, 0.8]  # a table of four times
FOUR_TIMES = VP(torch.tensor(ANGLES, dtype=torch.float64).cos() ** 2)


@pytest.mark.parametrize(
    "angle, time",
    [
        *((angle, time) for time, angle in enumerate(ANGLES)),  # the table's points, including its ends
        *((0.2, 0.5), (0.35, 1.5), (0.5, 2.25), (0.7, 2.75)),
    ],
)
def test_vp_times_between_the_points_of_a_table_are_by_angle(angle, time):
    sigma = torch.tensor([math.tan(angle)], dtype=torch.float64)
    assert FOUR_TIMES.time(sigma).item() == pytest.approx(time, abs=1e-12)
    assert FOUR_TIMES.sigma(torch.tensor([time]).double()).item() == pytest.approx(math.tan(angle), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_outside_a_table_have_the_times_of_its_ends(dtype):
    below, above = math.tan(0.1), math.tan(0.8)
    sigmas = torch.tensor([0.0, 1e-9, 0.99 * below, 1.01 * above, 80.0, math.inf], dtype=dtype)
    assert FOUR_TIMES.time(sigmas).tolist() == [0, 0, 0, 3, 3, 3]


def test_times_outside_a_table_have_the_levels_of_its_ends_as_in_the_schedulers():
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    process = VP(scaled_linear())
    times = torch.tensor([-1e6, -1.0, -0.25, 0.0, 999.0, 999.25, 1e6], dtype=torch.float64)
    low, high = process.sigma(torch.tensor([0.0, 999.0], dtype=torch.float64)).tolist()
    assert process.sigma(times).tolist() == [low] * 4 + [high] * 3 and high == process.sigma_max
    theirs = network_input("epsilon", None, 0.5, 1.0, schedule).sigma(times.numpy())
    torch.testing.assert_close(process.sigma(times), torch.from_numpy(theirs), rtol=1e-4, atol=0)  # a float32 table


@pytest.mark.parametrize("abar", [[0.9, 0.9], [0.5, 0.9], [1.1, 0.5], [0.9, -0.1], [0.9]])
def test_vp_refuses_what_is_not_a_schedule(abar):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        VP(torch.tensor(abar))


@every_process
def test_all_processes_are_ve_after_a_rescaling(process):
    x0, noise = torch.randn(2, len(SIGMAS), 3, dtype=torch.float64)
    rescaled = process.add_noise(x0, noise, SIGMAS) / process.alpha(SIGMAS)[:, None]
    torch.testing.assert_close(rescaled, VE().add_noise(x0, noise, SIGMAS))


@every_process
def test_jumps_are_those_of_ve_after_a_rescaling(process):
    x, denoised = torch.randn(2, 8, 3, dtype=torch.float64)
    t, s = SIGMAS[1:9], SIGMAS[:8]
    native = process.jump(process.alpha(t)[:, None] * x, denoised, t, s)
    torch.testing.assert_close(native, process.alpha(s)[:, None] * VE().jump(x, denoised, t, s))


def test_a_jump_starts_from_pure_noise():
    x, denoised, s = torch.randn(4, 3).double(), torch.randn(4, 3).double(), torch.full((4,), 0.7).double()
    jumped = LinearFlow().jump(x, denoised, torch.full((4,), math.inf).double(), s)
    time = LinearFlow().time(s)[:, None]
    torch.testing.assert_close(jumped, (1 - time) * denoised + time * x)


PREDICTIONS = {
    "sample": list(PROCESSES),
    "epsilon": list(PROCESSES),
    "v_prediction": ["vp", "vp, zero terminal snr"],
    "flow": ["linear flow"],
    "trigflow": ["trigflow"],
}
CASES = [(prediction, name) for prediction, names in PREDICTIONS.items() for name in names]


@pytest.mark.parametrize("prediction, name", CASES)
def test_predictions_of_the_true_quantities_give_the_data(prediction, name):
    process, sigma = PROCESSES[name], SIGMAS
    x0, noise = torch.randn(2, len(sigma), 3, dtype=torch.float64)
    x = process.add_noise(x0, noise, sigma)
    alpha, std = process.alpha(sigma)[:, None], process.std(sigma)[:, None]
    output = {
        "sample": x0,
        "epsilon": noise,
        "v_prediction": alpha * noise - std * x0,
        "flow": noise - x0,
        "trigflow": (alpha * 0.5 * noise - std / 0.5 * x0) / 0.5,  # the velocity cos(t) z - sin(t) x0 over sigma_data
    }[prediction]
    torch.testing.assert_close(to_denoised(prediction, output, x, sigma, process), x0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(from_denoised(prediction, x0, x, sigma, process), output, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("convert", [to_denoised, from_denoised])
def test_unknown_predictions_are_refused(convert):
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=", ".join(PROCESS_PREDICTIONS)):
        convert("score", x, x, torch.ones(1), VE())


@pytest.mark.parametrize("prediction, name", [(p, n) for p, n in CASES if p != "epsilon" and n not in ("ve", "vp")])
def test_the_data_is_read_out_of_pure_noise(prediction, name):
    process, sigma = PROCESSES[name], torch.full((4,), math.inf, dtype=torch.float64)
    x0, x = torch.randn(2, 4, 3, dtype=torch.float64)
    output = from_denoised(prediction, x0, x, sigma, process)
    torch.testing.assert_close(to_denoised(prediction, output, x, sigma, process), x0)

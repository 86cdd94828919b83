"""The forms of read-outs, labels and grids agree with each other, and to the bit with stock ones."""

import math

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDPMScheduler, EDMEulerScheduler

from cm_diffusers.core.denoisers import PROCESS_PREDICTIONS, to_denoised
from cm_diffusers.core.interpolants import VP, LinearFlow
from cm_diffusers.core.karras import karras_sigma
from cm_diffusers.core.parameterisation import (
    JUMP_PREDICTIONS,
    NetworkInput,
    edm_scalings,
    input_norm,
    jump_scalings,
    read_out_of_input,
    read_out_scalings,
    slope_scalings,
)
from cm_diffusers.core.time_labels import (
    LABELS_OF_PREDICTION,
    OWN_LABELS,
    TIME_LABELS,
    checked_label,
    flow_time,
    flow_time_up_to_infinity,
    vp_angles,
)


ABAR = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double()
LEVELS = torch.logspace(-2.5, 1.9, 200, dtype=torch.float64)
SIGMA_DATA = 0.7
every_jump = pytest.mark.parametrize("prediction", JUMP_PREDICTIONS)


def samples(dtype=torch.float64):
    """Levels (B, 1), and samples at these levels and outputs, both (B, 5)."""
    sigma = LEVELS.to(dtype)[:, None]
    return sigma, sigma * torch.randn(len(sigma), 5, dtype=dtype), torch.randn(len(sigma), 5, dtype=dtype)


@every_jump
def test_the_forms_of_a_read_out_agree(prediction):
    sigma, x, output = samples()
    kept, gained = read_out_scalings(prediction, sigma, SIGMA_DATA)
    denoised = kept * x + gained * output
    keep, change = jump_scalings(prediction, sigma, torch.zeros_like(sigma), SIGMA_DATA)
    pull, gain = slope_scalings(prediction, sigma, SIGMA_DATA)
    forms = [keep * x + change * output, x - sigma * (pull * x - gain * output)]
    network_input = x / input_norm(prediction, sigma, SIGMA_DATA)
    if prediction in ("flow", "v_prediction"):
        forms.append(read_out_of_input(prediction, output, network_input, sigma))
    if prediction in PROCESS_PREDICTIONS:
        process = LinearFlow() if prediction == "flow" else VP(ABAR)
        forms.append(to_denoised(prediction, output, network_input, LEVELS, process))
    for form in forms:
        torch.testing.assert_close(form, denoised, rtol=1e-9, atol=1e-9)


@every_jump
def test_a_slope_is_the_derivative_of_jumps_and_known_at_0(prediction):
    t, s = LEVELS, LEVELS.flip(0)
    pull, gain = slope_scalings(prediction, t, SIGMA_DATA)
    keep, change = jump_scalings(prediction, t, s, SIGMA_DATA)
    torch.testing.assert_close(1 + (s - t) * pull, keep, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((t - s) * gain, change, rtol=1e-9, atol=1e-9)
    assert all(value.isfinite().all() for value in slope_scalings(prediction, torch.zeros(1), SIGMA_DATA))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edm_s_read_out_is_that_of_the_stock_solvers_to_the_bit(dtype):
    stock = EDMEulerScheduler(sigma_data=SIGMA_DATA)
    for sigma, x, output in zip(*samples(dtype)):
        keep, gain = read_out_scalings("edm", sigma, SIGMA_DATA)
        assert (keep * x + gain * output).equal(stock.precondition_outputs(x, output, sigma))
    c_skip, c_out, _ = edm_scalings(LEVELS.to(dtype), 0.5, 0.002)
    theirs = CMStochasticIterativeScheduler().get_scalings_for_boundary_condition(LEVELS.to(dtype))
    assert c_skip.equal(theirs[0]) and c_out.equal(theirs[1])


@pytest.mark.parametrize("n", [2, 18, 40, 151])
def test_the_grid_of_arrays_is_that_of_the_stock_scheduler_to_the_bit(n):
    theirs = CMStochasticIterativeScheduler()._convert_to_karras(np.linspace(0, 1, n))
    assert (karras_sigma(np.linspace(0, 1, n), 0.002, 80.0, 7.0) == theirs).all()


@pytest.mark.parametrize("label", TIME_LABELS)
def test_labels_of_tensors_and_arrays_agree(label):
    maps = TIME_LABELS[label]
    ours = maps.from_sigma(LEVELS.numpy(), SIGMA_DATA)
    assert isinstance(ours, np.ndarray)
    np.testing.assert_allclose(ours, maps.from_sigma(LEVELS, SIGMA_DATA).numpy(), rtol=1e-14)
    back = maps.to_sigma(ours, SIGMA_DATA)
    np.testing.assert_allclose(back, LEVELS.numpy(), rtol=1e-12)
    np.testing.assert_allclose(back, maps.to_sigma(torch.from_numpy(ours), SIGMA_DATA).numpy(), rtol=1e-14)


def test_times_of_a_table_are_those_of_its_process():
    given = NetworkInput("epsilon", "timestep", 1.0, 1.0, vp_angles(ABAR).numpy())
    process = VP(ABAR)
    expected = process.time(LEVELS).numpy()
    label = given.label(LEVELS)
    assert torch.is_tensor(label) and label.dtype == torch.float64
    np.testing.assert_allclose(label.numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(given.label(LEVELS.numpy()), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(given.sigma(expected), process.sigma(torch.from_numpy(expected)), rtol=1e-12)


def test_both_forms_of_the_flow_time():
    torch.testing.assert_close(flow_time(LEVELS), flow_time_up_to_infinity(LEVELS), rtol=1e-14, atol=0)
    assert flow_time_up_to_infinity(math.inf) == 1 and flow_time_up_to_infinity(torch.zeros(1)).item() == 0


def test_which_label_belongs_to_which_prediction():
    assert OWN_LABELS == {p: labels[0] for p, labels in LABELS_OF_PREDICTION.items() if p != "edm"}
    assert set(OWN_LABELS) == set(PROCESS_PREDICTIONS)
    for prediction, labels in LABELS_OF_PREDICTION.items():
        has_table = labels == ("timestep",)
        assert checked_label(prediction, None, has_table, LABELS_OF_PREDICTION) == labels[0]
        with pytest.raises(ValueError, match=f"of the prediction '{prediction}' must be one of {labels[0]}"):
            checked_label(prediction, "no label", has_table, LABELS_OF_PREDICTION)
        with pytest.raises(ValueError, match="noise_schedule is for"):
            checked_label(prediction, None, not has_table, LABELS_OF_PREDICTION)

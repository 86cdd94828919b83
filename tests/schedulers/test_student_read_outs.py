"""Multistep sampling of students that keep a diffusion model's process: read-outs, and stock schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchLCMScheduler, LCMScheduler

from cm_diffusers import MultistepConsistencyScheduler
from cm_diffusers.core.denoisers import ProcessDenoiser
from cm_diffusers.core.interpolants import VP, LinearFlow


SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ABAR = DDPMScheduler(**SCHEDULE).alphas_cumprod.double()
VP_CONFIG = {"noise_schedule": SCHEDULE, "sigma_max": 14.0}
CONFIGS = {
    "epsilon": ({"prediction": "epsilon", **VP_CONFIG}, VP(ABAR)),
    "v_prediction": ({"prediction": "v_prediction", **VP_CONFIG}, VP(ABAR)),
    "flow": ({"prediction": "flow"}, LinearFlow()),
    "flow, 1000": ({"prediction": "flow", "time_scale": 1000.0}, LinearFlow()),
}
every_student = pytest.mark.parametrize("name", CONFIGS)


def make(name, **config):
    return MultistepConsistencyScheduler(**{**CONFIGS[name][0], "sigma_min": 0.0, "clip_denoised": False, **config})


@every_student
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_the_denoiser_of_training(name, dtype):
    scheduler, process = make(name), CONFIGS[name][1]
    scheduler.set_timesteps(sigmas=[13.9, 2.0, 0.8, 0.03, 0.001])

    def network(x, t, class_labels=None):
        return type("Output", (), {"sample": (2 * x + (t / 300).reshape(-1, 1, 1, 1)).sin()})

    denoiser = ProcessDenoiser(network, process, scheduler.config.prediction, time_scale=scheduler.config.time_scale)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        x = sigma.to(dtype) * torch.randn(2, 1, 4, 4, dtype=dtype)
        output = network(scheduler.scale_model_input(x, t), t.to(dtype).expand(2)).sample
        denoised = scheduler.step(output, t, x).pred_original_sample
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(denoised, denoiser(x, sigma.to(dtype).expand(2)), rtol=tolerance, atol=tolerance)


@every_student
def test_labels_round_trip_and_are_those_of_the_process(name):
    scheduler, process = make(name), CONFIGS[name][1]
    levels = np.array([13.0, 5.0, 1.0, 0.1, 0.03])
    labels = scheduler.sigma_to_timestep(levels)
    expected = scheduler.config.time_scale * process.time(torch.from_numpy(levels))
    np.testing.assert_allclose(labels, expected.numpy(), rtol=1e-9)
    np.testing.assert_allclose(scheduler.timestep_to_sigma(labels), levels, rtol=1e-9)


def test_at_the_table_s_levels_labels_are_its_integers():
    levels = ((1 - ABAR) / ABAR).sqrt().numpy()
    np.testing.assert_allclose(make("epsilon").sigma_to_timestep(levels), np.arange(1000), atol=1e-7)


@every_student
def test_it_survives_saving(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    again = MultistepConsistencyScheduler.from_pretrained(tmp_path)
    a, b = (s.sigma_to_timestep(np.array([5.0, 0.3])) for s in (make(name), again))
    assert (a == b).all() and dict(again.config)["prediction"] == CONFIGS[name][0]["prediction"]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"prediction": "score"}, "prediction must be one of edm, flow, epsilon, v_prediction"),
        ({"prediction": "epsilon"}, "noise_schedule is for .*, which need it"),
        ({"noise_schedule": SCHEDULE}, "noise_schedule is for"),
        ({"prediction": "flow", "time_label": "angle"}, "time_label of the prediction 'flow' must be one of flow"),
    ],
)
def test_bad_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        MultistepConsistencyScheduler(**config)


# --- what stock schedulers can express: LCM's at integer times, where its own scaling is nearly off


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scaling, tolerance", [(10.0, 1e-4), (1e6, 2e-6)])
def test_lcm_s_scheduler_takes_the_same_steps_at_integer_times(prediction, scaling, tolerance):
    """Its c_skip x + c_out D is D to 1e-5 at any time above 20, and D with a larger timestep_scaling."""
    theirs = LCMScheduler(prediction_type=prediction, timestep_scaling=scaling, clip_sample=False, **SCHEDULE)
    theirs.set_timesteps(4, original_inference_steps=50)
    abar = ABAR[theirs.timesteps]
    ours = make(prediction, sigma_max=15.0)
    ours.set_timesteps(sigmas=((1 - abar) / abar).sqrt().tolist())
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    ve = x / abar[0].sqrt()
    for i, (t, t_ours) in enumerate(zip(theirs.timesteps, ours.timesteps)):
        output = torch.randn(2, 1, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(ours.scale_model_input(ve, t_ours), x, rtol=1e-5, atol=1e-5)
        generators = [torch.Generator().manual_seed(i) for _ in range(2)]
        x = theirs.step(output, t, x, generator=generators[0]).prev_sample
        ve = ours.step(output, t_ours, ve, generator=generators[1]).prev_sample
        alpha = abar[i + 1].sqrt() if i < 3 else 1.0
        torch.testing.assert_close(alpha * ve, x, rtol=tolerance, atol=tolerance * 10)


def test_flow_match_lcm_takes_the_same_steps():
    theirs, ours = FlowMatchLCMScheduler(), make("flow, 1000")
    theirs.set_timesteps(sigmas=np.array([0.98, 0.6, 0.3]))
    times = theirs.sigmas[:-1].double()
    ours.set_timesteps(sigmas=(times / (1 - times)).tolist())
    x = torch.randn(2, 1, 4, 4)
    ve = x.double() / (1 - times[0])
    for i, (t, t_ours) in enumerate(zip(theirs.timesteps, ours.timesteps)):
        assert math.isclose(t, t_ours, rel_tol=1e-6)
        output = torch.randn(2, 1, 4, 4)
        generators = [torch.Generator().manual_seed(i) for _ in range(2)]
        x = theirs.step(output, t, x, generator=generators[0]).prev_sample
        ve = ours.step(output, t_ours, ve, generator=generators[1]).prev_sample
        left = 1 - times[i + 1] if i < 2 else 1.0
        torch.testing.assert_close((left * ve).float(), x, rtol=1e-5, atol=1e-5)

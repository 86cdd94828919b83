"""A step's `noise` argument replaces the noise from a generator."""

import pytest
import torch

from cm_diffusers import CTMScheduler, MultistepConsistencyScheduler, TrigFlowScheduler


FLOW = {"prediction": "flow", "time_scale": 1000.0, "in_place_of": {"shift": 3.0}, "clip_denoised": False}


@pytest.mark.parametrize(
    "scheduler",
    [
        MultistepConsistencyScheduler(s_noise=0.9),
        MultistepConsistencyScheduler(1000, None, None, **FLOW),
        CTMScheduler(gamma=0.6),
        TrigFlowScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_step_adds_the_noise_that_it_is_given(scheduler):
    sample, output, noise = torch.randn(3, 2, 1, 4, 4)
    results = []
    for given in ({"generator": torch.Generator().manual_seed(3)}, {"variance_noise": noise}):
        scheduler.set_timesteps(2)
        results.append(scheduler.step(output, scheduler.timesteps[0], sample, return_dict=False, **given)[0])
    drawn = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    change = results[0] - results[1]
    std = change.norm() / (drawn - noise).norm()
    assert std > 0.005
    torch.testing.assert_close(change, std * (drawn - noise), rtol=0, atol=1e-5)

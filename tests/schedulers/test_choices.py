"""Repeated choices of levels: the same choice is not computed again, and no other choice leaves a trace."""

import pytest
import torch

from cm_diffusers import CTMScheduler, MultistepConsistencyScheduler, TrigFlowScheduler


KINDS = [MultistepConsistencyScheduler, CTMScheduler, TrigFlowScheduler]


def shown(scheduler):
    sample, output, noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler.set_begin_index(0)
    step = scheduler.step(output, scheduler.timesteps[0], sample, return_dict=False, variance_noise=noise)
    return scheduler.sigmas.tolist(), scheduler.timesteps.tolist(), [tensor.tolist() for tensor in step]


@pytest.mark.parametrize("cls", KINDS)
def test_what_was_chosen_before_changes_nothing(cls):
    scheduler, fresh = cls(), cls()
    for levels in ([80.0, 2.0], [80.0, 2.0], [40.0, 1.0], [80.0, 2.0]):
        scheduler.set_timesteps(sigmas=levels)
    fresh.set_timesteps(sigmas=[80.0, 2.0])
    assert shown(scheduler) == shown(fresh)


@pytest.mark.parametrize("cls", KINDS)
def test_the_same_levels_are_kept_and_begin_anew(cls):
    scheduler = cls()
    scheduler.set_timesteps(sigmas=[80.0, 2.0])
    sigmas, first = scheduler.sigmas, shown(scheduler)
    scheduler.set_timesteps(sigmas=[80.0, 2.0])
    assert scheduler.sigmas is sigmas and scheduler.step_index is None and scheduler.begin_index is None
    assert shown(scheduler) == first


@pytest.mark.parametrize("cls", KINDS)
def test_other_settings_are_another_choice(cls):
    scheduler = cls()
    scheduler.set_timesteps(sigmas=[80.0, 2.0])
    before = shown(scheduler)
    scheduler.register_to_config(sigma_data=0.9)
    scheduler.set_timesteps(sigmas=[80.0, 2.0])
    assert shown(scheduler) != before


@pytest.mark.parametrize("cls", KINDS)
def test_a_choice_that_fails_is_not_taken_for_made(cls):
    scheduler = cls()
    scheduler.set_timesteps(sigmas=[80.0, 2.0])
    with pytest.raises((RuntimeError, AssertionError)):
        scheduler.set_timesteps(sigmas=[40.0, 1.0], device="no such device")
    with pytest.raises((RuntimeError, AssertionError)):
        scheduler.set_timesteps(sigmas=[40.0, 1.0], device="no such device")
    scheduler.set_timesteps(sigmas=[40.0, 1.0])
    fresh = cls()
    fresh.set_timesteps(sigmas=[40.0, 1.0])
    assert shown(scheduler) == shown(fresh)


def test_gamma_and_solver_are_part_of_the_choice():
    scheduler = CTMScheduler()
    scheduler.set_timesteps(sigmas=[80.0, 2.0], gamma=0.0)
    chained = shown(scheduler)
    scheduler.set_timesteps(sigmas=[80.0, 2.0], gamma=0.5)
    assert shown(scheduler) != chained
    scheduler = TrigFlowScheduler(solver="euler")
    scheduler.set_timesteps(sigmas=[80.0, 2.0])
    calls = len(scheduler.timesteps)
    scheduler.set_timesteps(sigmas=[80.0, 2.0], solver="heun")
    assert (calls, len(scheduler.timesteps)) == (2, 3)

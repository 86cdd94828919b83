"""Optimisers of one kernel: RAdam against torch's, and steps that are skipped without a wait."""

import pytest
import torch

from cm_diffusers.core.radam import RAdam
from cm_diffusers.engine.config import RunArguments
from cm_diffusers.engine.training.optimisers import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    step_unless,
)


SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.995), "eps": 1e-6, "weight_decay": 0.1}


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for weight in model.parameters():
        scale = 10.0 ** torch.randint(-4, 3, (), generator=generator)
        weight.grad = scale * torch.randn(weight.shape, generator=generator)


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999])
def test_steps_are_those_of_torch_s_radam(beta2):
    ours, theirs = network(), network()
    settings = {**SETTINGS, "betas": (0.9, beta2)}
    steps = RAdam(ours.parameters(), **settings), torch.optim.RAdam(theirs.parameters(), **settings)
    for step in range(30):  # the first ones have no estimate of the variance
        for model, optimiser in zip((ours, theirs), steps):
            set_gradients(model, step)
            optimiser.step()
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=2e-5, atol=2e-6)
    assert [group["lr"] for group in steps[0].param_groups] == [SETTINGS["lr"]]


def test_a_state_of_torch_s_radam_is_continued():
    ours, theirs = network(), network()
    theirs_steps = torch.optim.RAdam(theirs.parameters(), **SETTINGS)
    for step in range(7):
        set_gradients(theirs, step)
        theirs_steps.step()
    ours.load_state_dict(theirs.state_dict())
    ours_steps = RAdam(ours.parameters(), **SETTINGS)
    load_optimizer_tensors(ours_steps, {key: value.clone() for key, value in optimizer_tensors(theirs_steps).items()})
    for step in range(7, 12):
        for model, optimiser in zip((ours, theirs), (ours_steps, theirs_steps)):
            set_gradients(model, step)
            optimiser.step()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=2e-5, atol=2e-6)


def test_radam_resumes_to_the_bit_also_after_a_skipped_step():
    whole = network()
    optimiser = RAdam(whole.parameters(), **SETTINGS)
    for step in range(12):
        if step == 6:
            resumed = network(1)
            resumed.load_state_dict(whole.state_dict())
            again = RAdam(resumed.parameters(), **SETTINGS)
            load_optimizer_tensors(again, {key: value.clone() for key, value in optimizer_tensors(optimiser).items()})
        for model, one in [(whole, optimiser)] + ([(resumed, again)] if step >= 6 else []):
            set_gradients(model, step)
            step_unless(one, torch.tensor(step == 3))
    assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("name", ["adam", "adamw", "radam", "torch.optim:NAdam", "torch.optim:SGD"])
def test_a_skipped_step_changes_nothing(name):
    model = network()
    optimiser = build_optimizer(model, RunArguments(optimizer=name, output_dir="unused"))
    for skipped in (False, True):
        set_gradients(model, 0)
        if skipped:
            model[0].weight.grad[0, 0] = torch.nan
        before = weights(model), {k: v.clone() for k, v in optimizer_tensors(optimiser).items() if "taken" not in k}
        step_unless(optimiser, torch.tensor(skipped))
        after = weights(model), {k: v for k, v in optimizer_tensors(optimiser).items() if "taken" not in k}
        assert torch.equal(before[0], after[0]) == skipped
        if skipped:
            assert before[1].keys() == after[1].keys() and all(v.equal(after[1][k]) for k, v in before[1].items())

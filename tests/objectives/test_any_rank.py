"""Samples of any rank: the same numbers as a vector, an image or a volume have the same loss, without the engine."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cm_diffusers.core.draws import Draws
from cm_diffusers.objectives import OBJECTIVES, Batch, ModelSpec


SHAPES = {"numbers": (24,), "sequence": (2, 12), "image": (1, 4, 6), "volume": (2, 3, 2, 2)}
OPTIONS = {
    "ect": {"pretrain_steps": 0, "stage_steps": 2},
    "ecd": {"pretrain_steps": 0, "stage_steps": 2},
    "ctm": {"balance": "fixed", "solver_steps": 2},
    "cdm": {"rollout_steps": 2},
}


class Elementwise(nn.Module):
    """A network that acts on each number of a sample separately, whatever the sample's shape."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(sample_size=4, in_channels=1, num_class_embeds=None, get=lambda name: None)
        self.weights = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))

    def forward(self, sample, timestep, target_timestep=None):
        time = timestep.sin() if target_timestep is None else timestep.sin() + 0.5 * target_timestep.cos()
        time = time.reshape(-1, *[1] * (sample.ndim - 1))
        a, b, c = self.weights
        return SimpleNamespace(sample=(a * sample + b * time).sin() + c)


def loss_and_gradient(method, shape):
    network, teacher = Elementwise(), Elementwise()
    spec = ModelSpec(0.5, "angle", prediction=method.prediction(method.Options(**options_of(method))))
    objective = method(
        network,
        spec,
        method.Options(**options_of(method)),
        total_steps=20,
        teacher=spec.denoiser(teacher) if method.needs_teacher else None,
    )
    data = 0.5 * torch.randn(6, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    loss = objective.loss(Batch(data.reshape(6, *shape)), Draws(0, 7, range(6)))
    loss.total.backward()
    return loss.per_sample, network.weights.grad


def options_of(method):
    taught = {"pretrained_teacher_model": "teacher"} if method.needs_teacher else {}
    return {**OPTIONS.get(method.name, {}), **taught}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_loss_is_that_of_the_same_numbers_in_another_shape(method, shape):
    loss, gradient = loss_and_gradient(method, shape)
    expected, expected_gradient = loss_and_gradient(method, SHAPES["numbers"])
    assert loss.isfinite().all() and gradient.abs().min() > 0
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)

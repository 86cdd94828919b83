import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cm_diffusers.core.arrays import append_dims
from cm_diffusers.core.conditions import Condition, of_classes
from cm_diffusers.core.denoisers import EDMDenoiser
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.karras import karras_sigmas
from cm_diffusers.models import EDMUNet2DModel, build_unet
from cm_diffusers.objectives import CDM, Batch, Diffusion, ModelSpec
from cm_diffusers.toys import TASKS, ToyDraws


SPEC = ModelSpec(0.5)
FIXED = {"p_std": 1e-3, "epsilon_min": 0.05, "epsilon_max": 0.05}  # nearly a single level, and a single length
ROWS = range(8)


class Recorder(nn.Module):
    """A smooth network that ignores labels and records its inputs."""

    def __init__(self, **config):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, dtype=torch.float64) / 4)
        self.config, self.calls = config, []

    def forward(self, sample, label, class_labels=None, augment_labels=None):
        labels = {"class_labels": class_labels, "augment_labels": augment_labels}
        self.calls.append({"sample": sample.detach(), "label": label, "grad": torch.is_grad_enabled(), **labels})
        return SimpleNamespace(sample=(sample.flatten(1) @ self.weight).tanh().reshape(sample.shape))


def make(network, **options):
    return CDM(network, SPEC, CDM.Options(**options), 100)


def small_batch(**labels):
    return Batch(torch.rand(8, 1, 4, 4, dtype=torch.float64) * 2 - 1, Condition(labels))


def of_denoiser(denoise, data, sigma=0.5, **options):
    """The martingale term (B,) for the denoiser `denoise`, and the mean of the single square |D1 - D0|^2."""
    objective, ends = make(Recorder(), p_mean=math.log(sigma), **{**FIXED, **options}), []
    objective.denoiser = lambda: lambda x, sigma, labels: denoise(x, append_dims(sigma, x))
    rollouts = objective.rollouts

    def watched(x, sigma, denoised, **others):
        ends.extend([denoised, rollouts(x, sigma, denoised=denoised, **others)])
        return ends[1]

    objective.rollouts = watched
    term = objective.loss(Batch(data), ToyDraws(0, 1, range(len(data)))).terms["martingale"]
    return term, (ends[1].chunk(2)[0] - ends[0]).square().mean()


@pytest.mark.parametrize("name", ["gaussian", "bimodal", "uneven_two_gmm"])
def test_with_an_exact_denoiser_the_product_vanishes_in_the_mean_and_a_single_square_does_not(name):
    task, n = TASKS[name], 100_000
    data = task.sample(ToyDraws(0, 0, range(n))).double()
    exact = lambda x, sigma: task.denoised(x, sigma.flatten()[:1]).reshape(x.shape)  # noqa: E731
    term, square = of_denoiser(exact, data)
    assert abs(term.mean()) < 4 * term.std() / n**0.5 < 3e-4
    assert square > 0.013
    if name == "gaussian":
        assert square.item() == pytest.approx(0.01353, rel=0.01)


def test_the_mean_of_the_product_is_the_square_of_what_the_denoiser_loses_along_its_sde():
    def k(sigma):
        return 0.6 * 0.25 / (0.25 + sigma**2)  # D = k x is exact for no data

    n = 100_000
    term, _ = of_denoiser(lambda x, sigma: k(sigma) * x, 0.5 * torch.randn(n, 1, 1, 1).double(), epsilon_max=0.2,
                          epsilon_min=0.2)  # fmt: skip
    levels = karras_sigmas(6, 0.3, 0.5)
    keeps = (1 + 2 * (levels[1:] - levels[:-1]) / levels[:-1] * (1 - k(levels[:-1]))).prod()
    expected = (k(levels[-1]) * keeps - k(levels[0])) ** 2 * (0.25 + 0.25)
    assert expected > 10 * term.std() / n**0.5
    assert term.mean().item() == pytest.approx(expected.item(), abs=4 * term.std().item() / n**0.5)


NETWORKS = {
    "tiny": lambda dropout: build_unet("tiny", (8, 8), 1, 10, dropout),
    "jvp_tiny": lambda dropout: build_unet("jvp_tiny", (8, 8), 1, 10, dropout),
    "label dropout": lambda dropout: EDMUNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, num_class_embeds=10, label_dropout=dropout,
        model_channels=16, channel_mult=(1,), layers_per_block=1, attention_levels=(), preconditioning="edm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_rollouts_of_no_length_give_0_as_all_passes_drop_the_same(name, dropout):
    network = NETWORKS[name](dropout).double().train()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    draws, batch = Draws(0, 0, ROWS), Batch(torch.randn(8, 1, 8, 8).double(), of_classes(torch.arange(8)))
    for length in (0.0, 0.5):
        objective = make(network, epsilon_min=length, epsilon_max=length, rollout_steps=2)
        objective.key_dropout(draws)
        term = objective.loss(batch, draws).terms["martingale"]
        assert (term.abs() < 1e-20).all() == (length == 0)


@pytest.mark.parametrize("sigma, lowest", [(1e-3, 1e-3), (0.02, 0.002), (0.5, 0.45)])
def test_rollouts_go_down_to_the_lowest_level_and_never_up(sigma, lowest):
    network = Recorder()
    loss = make(network, p_mean=math.log(sigma), **FIXED).loss(small_batch(), Draws(0, 0, ROWS))
    levels = torch.stack([(call["label"] / 250).exp()[:8] for call in network.calls]).double()
    assert len(levels) == 6 and (levels.diff(dim=0) <= 1e-6 * sigma).all()
    torch.testing.assert_close(levels[-1], torch.full((8,), lowest).double(), rtol=0.01, atol=0)
    assert loss.total.isfinite()


@pytest.mark.parametrize("dropout, sizes, with_gradient", [(0.0, [8, 16, 16, 16], [0, 3]), (0.1, [8] * 7, [0, 5, 6])])
def test_labels_reach_every_pass(dropout, sizes, with_gradient):
    network = Recorder(dropout=dropout)
    batch = small_batch(class_labels=torch.arange(8), augment_labels=torch.randn(8, 9))
    make(network, rollout_steps=3).loss(batch, Draws(0, 0, ROWS))
    assert [len(call["sample"]) for call in network.calls] == sizes
    assert [i for i, call in enumerate(network.calls) if call["grad"]] == with_gradient
    for call in network.calls:
        times = len(call["sample"]) // 8
        assert torch.equal(call["class_labels"], batch.condition.entries["class_labels"].repeat(times))
        assert torch.equal(call["augment_labels"], batch.condition.entries["augment_labels"].repeat(times, 1))


def test_the_gradient_reaches_both_factors():
    network, batch = Recorder(), small_batch()
    objective = make(network, martingale_weight=3.0, epsilon_min=0.3, epsilon_max=0.5)
    loss = objective.loss(batch, Draws(0, 0, ROWS))
    loss.total.backward()
    first, last = network.calls[0], network.calls[-1]

    def denoised(call):  # from the network's recorded inputs
        sigma = (call["label"] / 250).exp()
        return EDMDenoiser(network, 0.5)(call["sample"] * append_dims((sigma**2 + 0.25).sqrt(), call["sample"]), sigma)

    d0, (d1, d2) = denoised(first), denoised(last).chunk(2)
    sigma = append_dims((first["label"] / 250).exp(), d0)
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    total = (weight * (d0 - batch.samples) ** 2 + 3 * (d1 - d0) * (d2 - d0)).sum() / 8
    torch.testing.assert_close(loss.total, total, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        network.weight.grad, torch.autograd.grad(total, network.weight)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("interpolant", ["edm", "flow"])
def test_without_the_term_it_is_diffusion_bit_for_bit(tiny_unet, interpolant):
    network, batch, draws = tiny_unet(), Batch(torch.randn(8, 1, 8, 8), of_classes(torch.arange(8))), Draws(0, 0, ROWS)
    spec = SPEC if interpolant == "edm" else ModelSpec(0.5, "flow_time", prediction="flow")
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    diffusion = Diffusion(network, spec, Diffusion.Options(interpolant=interpolant), 100)
    cdm = CDM(network, spec, CDM.Options(interpolant=interpolant, martingale_weight=0.0), 100)
    ours, theirs = cdm.loss(batch, draws), diffusion.loss(batch, draws)
    assert torch.equal(ours.total, theirs.total) and torch.equal(ours.per_sample, theirs.per_sample)
    assert ours.terms["martingale"].abs().min() > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epsilon_min": 0.1}, "epsilon_max must be at least epsilon_min, 0.1; got 0.05"),
        ({"epsilon_max": -1.0}, "epsilon_max"),
        ({"rollout_steps": 0}, "rollout_steps"),
        ({"martingale_weight": -1.0}, "martingale_weight"),
        ({"p_std": 0}, "p_std"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        CDM.Options(**options)

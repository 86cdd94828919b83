from types import SimpleNamespace

import pytest
import torch
from diffusers import ConsistencyModelPipeline
from torch import nn

from cm_diffusers import ConsistencyPipeline
from cm_diffusers.core.conditions import of_classes
from cm_diffusers.core.denoisers import EDMDenoiser
from cm_diffusers.core.distances import l2
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.schedules import ect_gap
from cm_diffusers.core.time_labels import TIME_LABELS, TINY_SIGMA
from cm_diffusers.objectives import ECT, Batch, Diffusion, ModelSpec


SPEC = ModelSpec(sigma_data=0.5)
ROWS = range(8)


class SmallNetwork(nn.Module):
    """A smooth network of image and label, in any dtype, which records its dropout masks."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.label = nn.Parameter(torch.randn(16))
        self.dropout = nn.Dropout(dropout)
        self.masks = []

    def forward(self, sample, label, class_labels=None):
        kept = self.dropout(torch.ones_like(sample).flatten(1))
        self.masks.append(kept.detach() > 0)
        hidden = (sample.flatten(1) * kept) @ self.weight + self.label * (label / 250).reshape(-1, 1)
        return SimpleNamespace(sample=hidden.tanh().reshape(sample.shape))


class Linear(nn.Module):
    """F(input, label) = factor(angle) * input, the form of the exact networks for data N(0, sigma_data^2)."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, sample, label, class_labels=None):
        angle = ((label / 250).exp() / 0.5).atan()
        return SimpleNamespace(sample=self.factor(angle).reshape(-1, 1, 1, 1) * sample)


def at_stage(network, stage, spec=SPEC, **options):
    """The objective, and the draws of a step at `stage`."""
    objective = ECT(network, spec, ECT.Options(pretrain_steps=1, stage_steps=1, **options), total_steps=100)
    return objective, Draws(0, stage + 1, ROWS)


def small_batch(dtype=torch.float64):
    return Batch(torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(2)).to(dtype) * 2 - 1)


def gradients(network, total):
    return torch.autograd.grad(total, list(network.parameters()), retain_graph=True)


def written_by_hand(network, batch, draws, stage, detach):
    """ECT's loss with plain norms: sum |D(x_t, t) - D(x_r, r)| / (t - r) / n, with D(x, 0) = x."""
    t = (-1.1 + 2 * draws.normal("sigma")).exp()
    gap = ect_gap(t, stage)
    noise = draws.normal("noise", batch.samples.shape[1:])
    denoise = EDMDenoiser(network, 0.5)
    total = 0
    for i, x0 in enumerate(batch.samples[:, None]):
        estimate = denoise(x0 + t[i] * noise[i], t[i : i + 1])
        r = t[i : i + 1] - gap[i]
        target = denoise(x0 + r * noise[i], r) if r > 0 else x0
        total = total + (estimate - (target.detach() if detach else target)).norm() / gap[i]
    return total / len(t)


# --- the target


@pytest.mark.parametrize("stage", [-1, 0, 1, 4])
def test_loss_and_gradient_are_those_written_by_hand_with_a_constant_target(stage):
    network, batch = SmallNetwork().double(), small_batch()
    objective, draws = at_stage(network, stage)
    loss, by_hand = objective.loss(batch, draws).total, written_by_hand(network, batch, draws, stage, detach=True)
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(network, loss), gradients(network, by_hand), rtol=1e-4, atol=1e-6)
    if stage >= 0:
        through_target = written_by_hand(network, batch, draws, stage, detach=False)
        torch.testing.assert_close(through_target, by_hand, rtol=1e-12, atol=0)
        difference = (gradients(network, through_target)[0] - gradients(network, loss)[0]).norm()
        assert difference > 0.1 * gradients(network, loss)[0].norm()


def test_pseudo_huber_distance_with_c():
    network, batch = SmallNetwork().double(), small_batch()
    plain = at_stage(network, -1)[0].loss(batch, Draws(0, 0, ROWS))
    robust = at_stage(network, -1, huber_c=0.5)[0].loss(batch, Draws(0, 0, ROWS))
    norm = plain.per_sample * plain.sigma
    expected = ((norm**2 + 0.25).sqrt() - 0.5) / plain.sigma
    torch.testing.assert_close(robust.per_sample, expected, rtol=1e-6, atol=0)


def test_denoiser_is_the_identity_at_zero_also_within_the_loss():
    # at stage 0 the small levels have r = 0, which would reveal a network that is not finite there
    smallest = TIME_LABELS["log_sigma"].from_sigma(torch.tensor([TINY_SIGMA]), 0.5)

    class NotFiniteAtZero(SmallNetwork):
        def forward(self, sample, label, class_labels=None):
            output = super().forward(sample, label).sample
            at_zero = (label <= smallest).reshape(-1, 1, 1, 1)
            zeros.append(int(at_zero.sum()))
            return SimpleNamespace(sample=output.masked_fill(at_zero, float("nan")))

    zeros, network, batch = [], NotFiniteAtZero(), small_batch(torch.float32)
    objective, draws = at_stage(network, 0)
    loss = objective.loss(batch, draws)
    assert zeros[0] == 0 and 0 < zeros[1] < 8
    assert loss.total.isfinite() and loss.per_sample.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(network, loss.total))
    torch.testing.assert_close(loss.total, written_by_hand(network, batch, draws, 0, True).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("stage", [0, 3])
def test_both_passes_share_dropout_masks(stage):
    network = SmallNetwork(dropout=0.5)
    objective, draws = at_stage(network, stage)
    objective.loss(small_batch(torch.float32), draws)
    first, second = network.masks
    assert torch.equal(first, second)
    assert 0.25 < first.float().mean() < 0.75
    objective.loss(small_batch(torch.float32), Draws(0, draws.step + 1, ROWS))
    assert not torch.equal(network.masks[2], first)


def test_the_two_passes_of_a_unet_with_dropout_coincide_as_the_gap_vanishes(tiny_unet):
    network = tiny_unet(dropout=0.5, num_classes=None).train()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    batch = Batch(torch.rand(8, 1, 8, 8) * 2 - 1)
    objective, draws = at_stage(network, 18)  # gap below t * 9 / 2^19
    loss = objective.loss(batch, draws)
    t = loss.sigma
    distance = loss.per_sample * ect_gap(t, 18)
    with torch.no_grad():
        x = batch.samples + t.reshape(-1, 1, 1, 1) * draws.normal("noise", (1, 8, 8))
        two = [EDMDenoiser(network, 0.5)(x, t) for _ in range(2)]
    assert (distance < 0.02 * l2(*two).sqrt()).all()


# --- edge cases


def test_stage_minus_1_with_l2_and_edms_settings_is_diffusion_bit_for_bit(tiny_unet):
    network = tiny_unet(dropout=0.2).train()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    batch, draws = Batch(torch.rand(8, 1, 8, 8) * 2 - 1, of_classes(torch.arange(8))), Draws(0, 0, ROWS)
    ect, _ = at_stage(network, -1, distance="l2", weighting="edm", p_mean=-1.2, p_std=1.2)
    diffusion = Diffusion(network, SPEC, Diffusion.Options(), 100)
    ours, theirs = ect.loss(batch, draws), diffusion.loss(batch, draws)
    assert torch.equal(ours.total, theirs.total) and torch.equal(ours.per_sample, theirs.per_sample)
    assert torch.equal(ours.sigma, theirs.sigma)
    for a, b in zip(gradients(network, ours.total), gradients(network, theirs.total)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("distance, power", [("l2", 1), ("pseudo_huber", 0.5)])
def test_edms_weight_is_that_of_a_squared_distance_and_its_root_that_of_a_norm(distance, power):
    network, batch = SmallNetwork().double(), small_batch()
    plain, draws = at_stage(network, 1, distance=distance)
    weighted, _ = at_stage(network, 1, distance=distance, weighting="edm")
    ours, theirs = (objective.loss(batch, draws) for objective in (weighted, plain))
    sigma = ours.sigma
    ratio = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2) ** power * ect_gap(sigma, 1)
    torch.testing.assert_close(ours.per_sample / theirs.per_sample, ratio, rtol=1e-5, atol=0, check_dtype=False)


def test_stage_minus_1_is_denoising_with_the_root_of_the_squared_error():
    network, batch = SmallNetwork().double(), small_batch()
    objective, draws = at_stage(network, -1)
    sigma = (-1.1 + 2 * draws.normal("sigma")).exp()
    noisy = batch.samples + sigma.reshape(-1, 1, 1, 1) * draws.normal("noise", (1, 4, 4))
    squared = l2(EDMDenoiser(network, 0.5)(noisy, sigma), batch.samples)
    ours = gradients(network, objective.loss(batch, draws).total)
    # d sqrt(e) = d e / (2 sqrt(e)): each sample's denoising gradient, rescaled
    weight = (1 / (2 * squared.sqrt() * sigma)).detach()
    torch.testing.assert_close(ours, gradients(network, (weight * squared).mean()), rtol=1e-6, atol=1e-9)


def test_stage_minus_1_needs_one_pass_and_later_stages_two():
    for stage, passes in ((-1, 1), (0, 2)):
        network = SmallNetwork()
        objective, draws = at_stage(network, stage)
        objective.loss(small_batch(torch.float32), draws)
        assert len(network.masks) == passes


# --- the plateau of its loss on Gaussian data, d = 3072


class Stratified(Draws):
    """Noise levels at the middles of equally probable strata, so that means over them have almost no variance."""

    def normal(self, name, shape=()):
        if name == "sigma":
            rows = torch.tensor(self.rows, dtype=torch.float64)
            return torch.special.ndtri((rows + 0.5) / len(rows)).float()
        return super().normal(name, shape)


PERFECT = Linear(lambda angle: (angle / 2).tan())
DENOISER = Linear(torch.zeros_like)


@pytest.mark.parametrize(
    "stage, perfect, denoiser",
    [
        *((-1, 39.20, 37.45), (0, 38.31, 36.88), (1, 36.83, 35.98), (2, 34.37, 34.22), (3, 33.05, 33.02)),
        *((5, 32.11, 32.10), (7, 31.88, 31.88)),
    ],
)
def test_loss_does_not_tell_a_perfect_consistency_model_from_a_denoiser(stage, perfect, denoiser):
    rows = range(1000)
    data = Batch(0.5 * Draws(1, 0, rows).normal("data", (3, 32, 32)))
    for network, expected in ((PERFECT, perfect), (DENOISER, denoiser)):
        objective, _ = at_stage(network, stage)
        loss = objective.loss(data, Stratified(0, stage + 1, rows)).total.item()
        # given t, the norm of 3,072 numbers has a relative deviation of 1 / sqrt(6,144); the tolerance is four
        # standard errors, and the rounding of the published number
        assert loss == pytest.approx(expected, abs=4 * expected / (6144 * len(rows)) ** 0.5 + 0.005)


def test_perfect_network_of_the_plateau_is_the_consistency_function():
    x, sigma = torch.randn(4, 1, 4, 4).double(), torch.tensor([0.01, 0.5, 3, 80]).double()
    expected = x * 0.5 / (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(EDMDenoiser(PERFECT, 0.5)(x, sigma), expected, rtol=1e-10, atol=1e-12)


# --- curriculum and pipeline


@pytest.mark.parametrize(
    "options, pretrained, expected",
    [
        ({}, False, {0: -1, 499: -1, 500: 0, 562: 0, 563: 1, 999: 7}),
        ({}, True, {0: 0, 124: 0, 125: 1, 999: 7}),
        ({"pretrain_steps": 10, "stage_steps": 20}, True, {9: -1, 10: 0, 30: 1}),
        ({"pretrain_steps": 1000}, False, {999: -1, 1000: 0}),
    ],
)
def test_stages_of_a_run_of_1000_steps(options, pretrained, expected):
    objective = ECT(None, SPEC, ECT.Options(**options), total_steps=1000, pretrained=pretrained)
    assert {step: objective.stage(step) for step in expected} == expected
    assert {step: objective.describe(step)["stage"] for step in expected} == expected


@pytest.mark.parametrize(
    "option",
    [{"pretrain_steps": -1}, {"stage_steps": 0}, {"q": 1.0}, {"k": -1}, {"b": -1}, {"p_std": 0}, {"huber_c": -1}],
)
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ECT.Options(**option)


@pytest.mark.parametrize(
    "time_label, size, cls",
    [
        ("log_sigma", (8, 8), ConsistencyModelPipeline),
        ("angle", (8, 8), ConsistencyPipeline),
        ("log_sigma", (8, 16), ConsistencyPipeline),
    ],
)
def test_pipeline_is_the_stock_one_where_that_can_express_the_model(tiny_unet, time_label, size, cls):
    network = tiny_unet(size)
    pipe = ECT(network, ModelSpec(0.6, time_label), ECT.Options(), 100).pipeline(network)
    assert type(pipe) is cls and pipe.unet is network
    assert pipe.scheduler.config.sigma_min == 0 and pipe.scheduler.config.sigma_data == 0.6
    assert pipe.scheduler.config.get("time_label", "log_sigma") == time_label


@pytest.mark.parametrize("time_label", ["log_sigma", "angle"])
def test_one_step_of_the_pipeline_is_the_denoiser_of_training(tiny_unet, time_label):
    network = tiny_unet(num_classes=None)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    objective = ECT(network, ModelSpec(0.6, time_label), ECT.Options(), 100)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = EDMDenoiser(network, 0.6, time_label=time_label)(80 * noise, torch.full((3,), 80.0))
    pipe = objective.pipeline(network)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-6)
    assert images.std() > 0.01

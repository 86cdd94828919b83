"""CTM, against closed forms: exact trajectories of Gaussian data, times, gradients and the discriminator."""

import copy

import pytest
import torch

from cm_diffusers.core.conditions import NOTHING
from cm_diffusers.core.denoisers import EDMDenoiser
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.karras import karras_sigmas
from cm_diffusers.core.parameterisation import edm_scalings
from cm_diffusers.models import TwoTimeModel
from cm_diffusers.objectives import CTM, Batch, ModelSpec
from cm_diffusers.objectives.balance import Part, balanced


DATA_STD, SIGMA_DATA = 0.3, 0.5
SPEC = ModelSpec(SIGMA_DATA)


def exact_jump(x, t, s):
    """The solution at s of the ODE of data N(0, DATA_STD^2), from `x` at t."""
    return x * ((s**2 + DATA_STD**2) / (t**2 + DATA_STD**2)).sqrt().reshape(-1, *[1] * (x.ndim - 1))


class ExactTrajectories(torch.nn.Module):
    """A network whose jumps and denoiser are exact for data N(0, DATA_STD^2)."""

    def __init__(self):
        super().__init__()
        self.conv_out = torch.nn.Conv2d(1, 1, 1, dtype=torch.float64)  # a last layer that adds zero
        torch.nn.init.zeros_(self.conv_out.weight)
        torch.nn.init.zeros_(self.conv_out.bias)

    def forward(self, sample, timestep, target_timestep, class_labels=None):
        t, s = ((label / 250).exp().reshape(-1, 1, 1, 1) for label in (timestep, target_timestep))
        c_skip, c_out, c_in = edm_scalings(t, SIGMA_DATA)
        x = sample / c_in
        same = s == t
        jump = x * ((s**2 + DATA_STD**2) / (t**2 + DATA_STD**2)).sqrt()
        off_diagonal = (jump - s / t * x) / torch.where(same, 1, 1 - s / t)
        g = torch.where(same, DATA_STD**2 / (DATA_STD**2 + t**2) * x, off_diagonal)
        output = (g - c_skip * x) / c_out
        return type("Output", (), {"sample": output + self.conv_out(sample)})


def posterior(x, sigma, labels=None):
    """The exact denoiser of data N(0, DATA_STD^2)."""
    return DATA_STD**2 / (DATA_STD**2 + sigma**2).reshape(-1, 1, 1, 1) * x


@pytest.fixture
def exact():
    """A function that makes the objective with the exact network and, by default, the exact denoiser as teacher."""

    def make(teacher=posterior, **options):
        named = {"pretrained_teacher_model": "given"} if teacher else {}
        options = CTM.Options(**{"dsm_weight": 0.0, "huber_c": 0.0, **named, **options})
        return CTM(ExactTrajectories(), SPEC, options, total_steps=100, teacher=teacher)

    return make


def gaussian_batch(n=256):
    generator = torch.Generator().manual_seed(0)
    return Batch(DATA_STD * torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64))


def draws(n=256, step=0):
    return Draws(0, step, range(n))


# --- the loss of an exact solution


def test_the_exact_solution_has_no_loss_with_the_exact_flow(exact, monkeypatch):
    monkeypatch.setattr(CTM, "point_at_u", lambda self, x, levels, **others: exact_jump(x, levels[0], levels[-1]))
    for step in range(4):
        loss = exact().loss(gaussian_batch(), draws(step=step))
        assert loss.per_sample.max() < 1e-12


@pytest.mark.parametrize("solver, order", [("euler", 1), ("ddim", 1), ("heun", 2)])
@pytest.mark.parametrize("teacher", [posterior, None], ids=["teacher", "self"])
def test_the_loss_of_the_exact_solution_falls_at_the_solvers_order(exact, monkeypatch, solver, order, teacher):
    """It also does with the model's own ODE, because the model's denoiser is exact."""
    t, u, s = (torch.full((256,), value, dtype=torch.float64) for value in (2.0, 0.5, 0.1))
    losses = []
    for k in (16, 32, 64):
        ramp = torch.linspace(0, 1, k + 1, dtype=torch.float64)[:, None]
        levels = t ** (1 - ramp) * u**ramp
        monkeypatch.setattr(CTM, "times", lambda self, draws, levels=levels: (levels, s))
        losses.append(exact(teacher, solver=solver).loss(gaussian_batch(), draws()).per_sample.mean().item())
    assert losses[0] > 1e-8
    for coarse, fine in zip(losses, losses[1:]):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_two_jumps_of_the_exact_network_are_one(exact):
    denoiser, x = exact().denoiser(), torch.randn(64, 1, 1, 1, dtype=torch.float64)
    t, u, s = (torch.full((64,), value, dtype=torch.float64) for value in (7.0, 1.0, 0.02))
    torch.testing.assert_close(denoiser.jump(denoiser.jump(x, t, u), u, s), denoiser.jump(x, t, s), rtol=1e-10, atol=0)


def test_the_diffusion_loss_of_the_exact_denoiser_is_the_posterior_variance(exact):
    n = 40_000
    dsm, sigma = exact().diffusion_loss(gaussian_batch(n).samples, None, draws(n))
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    variance = DATA_STD**2 * sigma**2 / (DATA_STD**2 + sigma**2)
    assert (dsm / weight).mean().item() == pytest.approx(variance.mean().item(), rel=0.03)
    edge = karras_sigmas(1001)[700]
    above = 0.5 + 0.5 * (1 - torch.special.ndtr((edge.log() + 1.2) / 1.2)).item()
    assert (sigma > edge).double().mean().item() == pytest.approx(above, abs=0.01)


# --- the times


@pytest.mark.parametrize("num_scales, solver_steps", [(18, 17), (18, 1), (5, 3)])
def test_times_fall_from_t_by_way_of_u_to_s_and_reach_both_ends(exact, num_scales, solver_steps):
    objective, counts, ends = exact(num_scales=num_scales, solver_steps=solver_steps), [], set()
    grid = karras_sigmas(num_scales)
    for step in range(200):
        levels, s = objective.times(draws(16, step))
        counts.append(len(levels) - 1)
        first = (levels[0][:, None] == grid).nonzero()[:, 1]
        for i, place in enumerate(range(len(levels))):
            assert torch.equal(levels[place], grid[first + i])  # neighbours of the grid
        assert (s <= levels[-1]).all() and torch.isin(s, grid).all()
        ends |= {("t", value) for value in levels[0].tolist()} | {("s", value) for value in s.tolist()}
    assert ("t", 80.0) in ends and ("s", grid[-1].item()) in ends
    assert grid[-1].item() == pytest.approx(0.002)
    law = torch.arange(1, solver_steps + 1) / (solver_steps * (solver_steps + 1) / 2)
    share = torch.bincount(torch.tensor(counts) - 1, minlength=solver_steps) / len(counts)
    assert (share - law).abs().max() < 0.12


def test_the_number_of_steps_is_that_of_the_whole_batch(exact):
    one, other = (exact().times(Draws(0, 5, rows))[0] for rows in (range(8), range(8, 16)))
    assert len(one) == len(other)


def test_the_straight_line_to_the_data_is_the_path_without_an_ode(exact):
    objective, x0 = exact(None, trajectory="data"), gaussian_batch(4).samples
    noise = torch.randn(4, 1, 1, 1, dtype=torch.float64)
    levels = torch.tensor([[2.0], [1.0], [0.5]], dtype=torch.float64).expand(3, 4)
    found = objective.point_at_u(x0 + 2 * noise, levels, x0=x0, noise=noise, condition=NOTHING)
    torch.testing.assert_close(found, x0 + 0.5 * noise)


# --- gradients


@pytest.fixture
def random(tiny_unet):
    """A function that makes the objective with a random float64 U-Net and another random one as its average."""

    def make(**options):
        network = CTM.adapt(tiny_unet(num_classes=None).double(), SPEC).train()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        options = CTM.Options(**{"solver_steps": 2, **options})
        objective = CTM(network, SPEC, options, total_steps=100)
        with torch.no_grad():
            for parameter in objective.target.parameters():
                parameter.normal_(0, 0.05)
        return objective

    return make


def image_batch(n=4):
    return Batch(torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double() * 2 - 1)


@pytest.mark.parametrize("gan_weight", [0.0, 0.7])
@pytest.mark.parametrize("dsm_weight", [0.0, 0.2])
def test_the_gradient_is_that_of_the_estimate_through_the_frozen_jump(random, gan_weight, dsm_weight):
    """Checked against differences along a direction in weight space, with a fixed target."""
    objective = random(gan_weight=gan_weight, dsm_weight=dsm_weight, balance="fixed")
    network, still = objective.network, copy.deepcopy(objective.network)
    objective.attach(lambda *args, **kwargs: (network if torch.is_grad_enabled() else still)(*args, **kwargs))
    if gan_weight:
        objective.adversary.network.double()
    parameters = list(network.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def value():
        return objective.loss(image_batch(), draws(4, 1)).total

    gradient = sum((g * d).sum() for g, d in zip(torch.autograd.grad(value(), parameters), direction))
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
        ends.append(value().detach())
    assert gradient.item() == pytest.approx(((ends[0] - ends[1]) / 2e-5).item(), rel=1e-5)


def test_the_average_moves_by_its_decay(random):
    objective = random(mu=0.9)
    before = copy.deepcopy(objective.target.state_dict())
    objective.after_step(0)
    for name, value in objective.target.state_dict().items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * objective.network.state_dict()[name])


def test_pretraining_is_that_of_a_diffusion_model(random):
    objective, batch = random(pretrain_steps=3), image_batch()
    dsm, sigma = objective.diffusion_loss(batch.samples, None, draws(4, 2))
    loss = objective.loss(batch, draws(4, 2))
    assert torch.equal(loss.total, dsm.mean()) and torch.equal(loss.sigma, sigma) and not loss.terms
    assert set(objective.loss(batch, draws(4, 3)).terms) == {"ctm", "dsm", "dsm_weight"}


def test_balanced_parts_pull_alike():
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    a, b, c = torch.randn(3, 5, 5, dtype=torch.float64)
    parts = [Part("b", (w * b).sum(1), 0.5), Part("c", 1e3 * (w * c).sum(1), limits=(0.01, 10.0))]
    total, terms = balanced(Part("a", (w * a).sum(1)), parts, w, lambda value: value)
    assert terms["b_weight"].item() == pytest.approx((0.5 * (a / 5).norm() / ((b / 5).norm() + 1e-4)).item())
    assert terms["c_weight"] == 0.01
    torch.testing.assert_close(
        torch.autograd.grad(total, w)[0], (a + terms["b_weight"] * b + terms["c_weight"] * 1e3 * c) / 5
    )
    total, terms = balanced(Part("a", (w * a).sum(1)), parts, None, lambda value: value)
    assert (terms["b_weight"], terms["c_weight"]) == (0.5, 1.0)


def test_balance_averages_gradients_over_processes_before_their_norm():
    """Both gradients pass through the averaging function, so the ratio compares norms of averages."""
    w = torch.ones(1, 1, requires_grad=True)
    seen = []
    balanced(Part("a", w[0]), [Part("b", 2 * w[0])], w, lambda value: seen.append(value.clone()) or value)
    assert [value.item() for value in seen] == [1.0, 2.0]


# --- the discriminator


def test_turns_alternate_from_the_start_on(random):
    adversary = random(gan_weight=1.0, discriminator_start_step=4).adversary
    assert [adversary.has_turn(step) for step in range(8)] == [False] * 4 + [True, False] * 2
    assert [adversary.is_on(step) for step in range(6)] == [False] * 4 + [True] * 2
    assert random().adversary is None


def test_the_model_learns_from_the_discriminator_and_it_stands_still(random):
    objective = random(gan_weight=1.0)
    objective.adversary.network.double()
    objective.loss(image_batch(), draws(4, 1)).total.backward()
    assert all(parameter.grad is None for parameter in objective.adversary.network.parameters())
    with_gan = [parameter.grad.clone() for parameter in objective.network.parameters()]
    objective.network.zero_grad()
    objective.options.__dict__["gan_weight"] = 0.0
    objective.loss(image_batch(), draws(4, 1)).total.backward()
    assert any(not p.grad.equal(g) for p, g in zip(objective.network.parameters(), with_gan))


def test_the_discriminator_learns_and_the_model_stands_still(random):
    objective = random(gan_weight=1.0)
    discriminator = objective.adversary.network.double()
    loss = objective.adversary.loss(image_batch(), draws(4))
    loss.total.backward()
    assert all(parameter.grad is None for parameter in objective.network.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    assert loss.per_sample.numel() == 0 and set(loss.terms) == {"discriminator"}


def test_both_players_judge_the_same_images_of_a_step(random, monkeypatch):
    objective, judged = random(gan_weight=1.0), []
    monkeypatch.setattr(
        objective.adversary, "generator_loss", lambda fake, *_: (judged.append(fake), fake.mean((1, 2, 3)))[1]
    )
    for step in (1, 3):
        objective.loss(image_batch(), draws(4, step))
        torch.testing.assert_close(objective.fakes(image_batch(), draws(4, step)), judged[-1], rtol=1e-12, atol=1e-12)


def test_the_hinge_loss_of_a_discriminator_that_knows(random):
    objective = random(gan_weight=1.0)
    for logit, expected in ((0.0, 2.0), (3.0, 0.0)):
        logits = torch.tensor([[logit]] * 4 + [[-logit]] * 4)
        objective.adversary.attach(lambda images, logits=logits: logits)
        assert objective.adversary.loss(image_batch(), draws(4)).total == expected


# --- the start, and errors


@pytest.mark.parametrize("time_label", ["log_sigma", "angle"])
def test_training_starts_as_the_teacher(tiny_unet, time_label):
    """The weights are the teacher's plus a zero branch for the second time, so the output is the same for any s."""
    unet = tiny_unet(num_classes=None)
    spec = ModelSpec(SIGMA_DATA, time_label)
    network = CTM.adapt(unet, spec)
    ours, theirs = network.state_dict(), unet.state_dict()
    added = {key for key in ours if key.removeprefix("network.") not in theirs}
    assert {key.split(".")[0] for key in added} == {"target_time_embedding"}
    assert all(torch.equal(ours[f"network.{key}"], value) for key, value in theirs.items())
    objective = CTM(network, spec, CTM.Options(), total_steps=10)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0.01, 0.5, 3.0, 80.0])
    teacher = EDMDenoiser(unet, SIGMA_DATA, time_label=time_label)(x, t)
    assert torch.equal(objective.denoiser().denoise(x, t), teacher)
    for s in (0.002, 0.01):
        ratio = (s / t).reshape(-1, 1, 1, 1)
        jump = objective.denoiser().jump(x, t, torch.full((4,), s))
        torch.testing.assert_close(jump, ratio * x + (1 - ratio) * teacher, rtol=0, atol=1e-6)
    assert CTM.adapt(network, spec) is network and isinstance(network, TwoTimeModel)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trajectory": "teacher"}, "needs a teacher"),
        ({"trajectory": "self", "pretrained_teacher_model": "x"}, "would not use the teacher"),
        ({"trajectory": "straight"}, "trajectory must be one of teacher, self, data"),
        ({"solver_steps": 18}, "solver_steps must be below num_scales, 18; got 18"),
        ({"discriminator_period": 1}, "discriminator_period"),
        ({"gan_weight": -1.0}, "gan_weight"),
        ({"gan_weight": 1.0, "pretrain_steps": 5}, "discriminator_start_step must be at least pretrain_steps, 5"),
        ({"discriminator_backbone": "facebook/dinov2-small"}, "gan_weight 0 leaves out"),
        ({"mu": 1.5}, "mu"),
        ({"balance": "none"}, "balance must be one of adaptive, fixed"),
    ],
)
def test_bad_options_are_named(tiny_unet, options, message):
    with pytest.raises(ValueError, match=message):
        CTM(CTM.adapt(tiny_unet(), SPEC), SPEC, CTM.Options(**options), total_steps=1)

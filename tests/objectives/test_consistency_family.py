"""CT, iCT, CD and ECD, against their papers' formulas; distillation, against an exact solution."""

import copy
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from cm_diffusers.core.denoisers import EDMDenoiser
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.karras import karras_sigmas
from cm_diffusers.core.noise_levels import draw_bins, lognormal_bins, uniform_bins
from cm_diffusers.core.parameterisation import edm_scalings
from cm_diffusers.core.schedules import ct_scales, ct_target_decay, ict_scales
from cm_diffusers.objectives import CD, CT, ECD, ECT, ICT, Batch, ModelSpec
from cm_diffusers.objectives import consistency as family
from cm_diffusers.objectives.consistency import teacher_step
from cm_diffusers.pipelines import ConsistencyPipeline


DATA_STD = 0.3
SPEC = ModelSpec(sigma_data=0.5)
STEP, TOTAL = 30, 100


class Linear(torch.nn.Module):
    """A network whose denoiser is factor(sigma) x, with `factor` in closed form."""

    def __init__(self, factor, floor=0.0):
        super().__init__()
        self.factor, self.floor = factor, floor
        self.zero = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, sample, label, class_labels=None):
        sigma = (label / 250).exp()
        c_skip, c_out, c_in = edm_scalings(sigma, SPEC.sigma_data, self.floor)
        output = (self.factor(sigma) - c_skip) / c_out.clamp(min=1e-30) / c_in
        return type("Output", (), {"sample": output[:, None] * sample + self.zero})


def posterior(sigma):
    """The factor of the exact denoiser of data N(0, DATA_STD^2)."""
    return DATA_STD**2 / (DATA_STD**2 + sigma**2)


def consistency(floor):
    """The factor of the exact consistency function of that data, along the ODE from sigma to `floor`."""
    return lambda sigma: ((DATA_STD**2 + floor**2) / (DATA_STD**2 + sigma**2)).sqrt()


TEACHER = EDMDenoiser(Linear(posterior), SPEC.sigma_data)
X0 = DATA_STD * torch.randn(512, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def network(tiny_unet):
    """A float64 U-Net with random weights."""
    unet = tiny_unet(num_classes=None).double().train()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return unet


IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def by_hand(network, target_network, sigmas, index, weight, distance):
    """A plain reference for the loss of CT and iCT."""
    draws = Draws(0, STEP, range(6))
    noise = draws.normal("noise", (1, 8, 8)).double()
    u, t = sigmas[index], sigmas[index + 1]

    def denoise(net, sigma):
        c_skip, c_out, c_in = (c[:, None, None, None] for c in edm_scalings(sigma, SPEC.sigma_data, 0.002))
        x = IMAGES + sigma[:, None, None, None] * noise
        return c_skip * x + c_out * net(c_in * x, 250 * sigma.log()).sample

    difference = (denoise(network, t) - denoise(target_network, u).detach()).flatten(1)
    return (weight(u, t) * distance(difference)).mean()


def check_against(objective, expected):
    """Assert that loss and gradient equal those of `expected`."""
    loss = objective.loss(Batch(IMAGES), Draws(0, STEP, range(6))).total
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    parameters = list(objective.network.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_ct_is_algorithm_3(network):
    objective = CT(network, SPEC, CT.Options(), TOTAL)
    for parameter in objective.target.parameters():  # make the target differ from the network
        parameter.mul_(0.9)
    sigmas = karras_sigmas(ct_scales(STEP, TOTAL)).flip(0)
    index = draw_bins(uniform_bins(sigmas), Draws(0, STEP, range(6)).uniform("sigma"))
    expected = by_hand(
        network, objective.target, sigmas, index, lambda u, t: torch.ones_like(u), lambda d: d.square().sum(1)
    )
    check_against(objective, expected)


def test_ict_is_the_papers(network):
    objective = ICT(network, SPEC, ICT.Options(), TOTAL)
    sigmas = karras_sigmas(ict_scales(STEP, TOTAL)).flip(0)
    index = draw_bins(lognormal_bins(sigmas, -1.1, 2.0), Draws(0, STEP, range(6)).uniform("sigma"))
    c = 0.00054 * math.sqrt(64)
    expected = by_hand(
        network, network, sigmas, index, lambda u, t: 1 / (t - u), lambda d: (d.square().sum(1) + c**2).sqrt() - c
    )
    check_against(objective, expected)


@pytest.mark.parametrize("weighting, power", [("snr", 0), ("karras", 4.0)])
def test_ct_weighs_as_asked(network, weighting, power):
    plain, weighted = (CT(network, SPEC, CT.Options(weighting=w), TOTAL) for w in ("uniform", weighting))
    losses = [o.loss(Batch(IMAGES), Draws(0, STEP, range(6))) for o in (plain, weighted)]
    sigmas = karras_sigmas(ct_scales(STEP, TOTAL)).flip(0)
    u = sigmas[draw_bins(uniform_bins(sigmas), Draws(0, STEP, range(6)).uniform("sigma"))]
    torch.testing.assert_close(losses[1].per_sample / losses[0].per_sample, u**-2 + power)


def test_ct_target_is_the_average_of_the_network(network):
    objective = CT(network, SPEC, CT.Options(), TOTAL)
    expected = [p.detach().clone() for p in network.parameters()]
    for step in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1)
        objective.after_step(step)
        mu = ct_target_decay(ct_scales(step, TOTAL))
        expected = [mu * e + (1 - mu) * p.detach() for e, p in zip(expected, network.parameters())]
    for ours, theirs in zip(objective.target.parameters(), expected):
        torch.testing.assert_close(ours, theirs)
    assert not any(p.requires_grad for p in objective.target.parameters())


def test_cd_target_has_a_constant_decay(network):
    teacher = EDMDenoiser(copy.deepcopy(network), 0.5)
    objective = CD(network, SPEC, CD.Options(pretrained_teacher_model="given", mu=0.75), TOTAL, teacher=teacher)
    before = [p.detach().clone() for p in network.parameters()]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    objective.after_step(0)
    for ours, old in zip(objective.target.parameters(), before):
        torch.testing.assert_close(ours, old + 0.25)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("t, floor", [(0.5, 0.002), (3.0, 0.0)])
def test_residual_of_the_exact_solution_falls_with_the_solvers_order(solver, order, t, floor):
    exact = EDMDenoiser(Linear(consistency(floor), floor), SPEC.sigma_data, floor)
    x, t = X0 * math.hypot(DATA_STD, t) / DATA_STD, torch.full((len(X0),), t, dtype=torch.float64)
    residuals = []
    for step in (0.02, 0.01, 0.005):
        u = t * (1 - step)
        x_u = teacher_step(TEACHER, x, t=t, u=u, condition=None, solver=solver)
        residuals.append((exact(x, t) - exact(x_u, u)).norm().item())
    for coarse, fine in zip(residuals, residuals[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order + 1, abs=0.1)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_cd_loss_of_the_exact_solution_falls_with_the_grid(solver, order):
    network = Linear(consistency(0.002), 0.002)
    means = []
    for scales in (401, 801):
        options = CD.Options(
            pretrained_teacher_model="given", num_scales=scales, solver=solver, distance="pseudo_huber"
        )
        objective = CD(network, SPEC, options, TOTAL, teacher=TEACHER)
        means.append(objective.loss(Batch(X0), Draws(0, STEP, range(len(X0)))).total.item())
    assert math.log2(means[0] / means[1]) == pytest.approx(order + 1, abs=0.15)


def test_ct_loss_of_the_exact_solution_is_not_zero():
    """The straight line to the data is not the ODE: only distillation has the exact solution as a fixed point."""
    objective = CT(Linear(consistency(0.002), 0.002), SPEC, CT.Options(distance="pseudo_huber", s0=801, s1=801), TOTAL)
    cd = CD.Options(pretrained_teacher_model="given", num_scales=801, distance="pseudo_huber")
    distilled = CD(objective.network, SPEC, cd, TOTAL, teacher=TEACHER)
    losses = [o.loss(Batch(X0), Draws(0, STEP, range(len(X0)))).total.item() for o in (objective, distilled)]
    assert losses[0] > 100 * losses[1]


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_ecd_loss_of_the_exact_solution_falls_with_its_stages(solver, order):
    network = Linear(consistency(0.0))
    options = ECD.Options(pretrained_teacher_model="given", stage_steps=1, solver=solver, k=0, huber_c=0)
    objective = ECD(network, SPEC, options, TOTAL, teacher=TEACHER)
    losses = [objective.loss(Batch(X0), FixedStep(step)).total.item() for step in (4, 5)]
    assert math.log2(losses[0] / losses[1]) == pytest.approx(order, abs=0.2)  # the weight divides by the gap


class FixedStep(Draws):
    """The random numbers of step 0 in float64, with the curriculum of another step."""

    def __init__(self, step):
        super().__init__(0, step, range(len(X0)))

    def normal(self, name, shape=()):
        return Draws(0, 0, self.rows).normal(name, shape).double()


def test_ecd_where_r_is_zero_learns_the_teachers_denoised_image():
    objective = ECD(
        Linear(posterior),
        SPEC,
        ECD.Options(pretrained_teacher_model="given", pretrain_steps=100),
        TOTAL,
        teacher=TEACHER,
    )
    loss = objective.loss(Batch(X0), Draws(0, STEP, range(len(X0))))
    assert loss.total.item() < 1e-9


def test_ecd_is_ect_but_for_the_point_at_r(network):
    teacher = EDMDenoiser(copy.deepcopy(network), 0.5)
    options = {"pretrain_steps": 0, "stage_steps": 10, "huber_c": 0.0}
    ecd = ECD(network, SPEC, ECD.Options(pretrained_teacher_model="given", **options), TOTAL, teacher=teacher)
    ect = ECT(network, SPEC, ECT.Options(**options), TOTAL)
    ecd.point_at = ect.point_at
    losses = [o.loss(Batch(IMAGES), Draws(0, STEP, range(6))) for o in (ecd, ect)]
    assert torch.equal(losses[0].per_sample, losses[1].per_sample)


@pytest.mark.parametrize("cls", [CT, CD, ECT, ECD])
def test_lpips_without_its_package_says_what_to_install(monkeypatch, cls):
    monkeypatch.setattr(family, "find_spec", lambda name: None)
    teacher = {"pretrained_teacher_model": "x"} if cls in (CD, ECD) else {}
    with pytest.raises(ValueError, match=r"pip install 'cm_diffusers\[lpips\]'.*Or use pseudo_huber"):
        cls.Options(distance="lpips", **teacher)


def test_lpips_sees_large_pictures_in_colour(monkeypatch):
    """A stand-in, which checks its inputs, replaces the package, which needs torchvision."""

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "vgg"

        def forward(self, a, b):
            assert a.shape == b.shape == (4, 3, 224, 224)
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    family._lpips_network.cache_clear()
    a, b = torch.full((4, 1, 8, 8), 0.5, requires_grad=True), torch.tensor([0.0, 0.5, 1.0, -1.0]).reshape(4, 1, 1, 1)
    value = family.distance("lpips", a, b.expand(4, 1, 8, 8), 0.0)
    torch.testing.assert_close(value, torch.tensor([0.5, 0.0, 0.5, 1.5]))
    value.sum().backward()
    assert a.grad.abs().sum() > 0
    family._lpips_network.cache_clear()


@pytest.mark.parametrize(
    "cls, options, allowed",
    [
        (CT, {"s0": 1}, r"s0 must lie in \[2, 1e6\], got 1"),
        (CT, {"s0": 20, "s1": 10}, "s1 must be at least s0, 20; got 10"),
        (CT, {"s0": -5}, r"s0 must lie in \[2"),
        (CT, {"s0": 1 << 30}, r"s0 must lie in \[2"),
        (CT, {"s1": 1 << 30}, r"s1 must lie in \[2"),
        (CT, {"s1": math.inf}, r"s1 must lie in \[2"),
        (CT, {"mu0": 1.5}, r"mu0 must lie in \[1e-6, 1\], got 1.5"),
        (CT, {"mu0": 0.0}, r"mu0 must lie in"),
        (CT, {"huber_c": -1.0}, r"huber_c must lie in \[0"),
        (ICT, {"s0": 0}, r"s0 must lie in \[1"),
        (ICT, {"s0": 20, "s1": 10}, "s1 must be at least s0, 20; got 10"),
        (ICT, {"s1": 1 << 30}, r"s1 must lie in \[1"),
        (ICT, {"p_std": 0.0}, r"p_std must lie in"),
        (ICT, {"p_mean": math.nan}, r"p_mean must lie in"),
        (CD, {"num_scales": 1}, r"num_scales must lie in \[2"),
        (CD, {"num_scales": 1 << 30}, r"num_scales must lie in \[2"),
        (CD, {"mu": -0.1}, r"mu must lie in \[0, 1\]"),
        (CD, {"mu": math.nan}, r"mu must lie in \[0, 1\]"),
    ],
)
def test_impossible_options_are_named_with_what_is_allowed(cls, options, allowed):
    teacher = {"pretrained_teacher_model": "given"} if cls is CD else {}
    with pytest.raises(ValueError, match=f"^{allowed}"):
        cls.Options(**options, **teacher)


@pytest.mark.parametrize(
    "sigmas, reason",
    [
        ([2, 80], "`sigmas` must fall strictly"),
        ([80, 10, 10], "`sigmas` must fall strictly"),
        ([80.1, 2], r"`sigmas` must not exceed sigma_max=80.0, got 80.1"),
        ([80, 0.002], "`sigmas` must stay above sigma_min=0.002, got 0.002"),
        ([80, 0], "`sigmas` must stay above sigma_min=0.002, got 0"),
        ([80, math.nan], "`sigmas` must be a non-empty list of finite numbers"),
        ([], "`sigmas` must be a non-empty list of finite numbers"),
    ],
)
def test_levels_that_can_not_be_sampled_are_refused_before_the_network_is_called(tiny_unet, sigmas, reason):
    network = tiny_unet(num_classes=None)
    stock = CT(network, SPEC, CT.Options(), TOTAL).pipeline(network)
    pipe, calls = ConsistencyPipeline(stock.unet, stock.scheduler), []
    network.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(ValueError, match=reason):
        pipe(sigmas=sigmas)
    assert not calls

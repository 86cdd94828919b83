import pytest
import torch
from torch import nn

from cm_diffusers.core.ema import EMA, ConstantDecay, HalfLife


BATCH = 64


def constant_then_jump(profile, steps, batch_size=BATCH):
    """The first weight's share of the average after `steps` updates with another weight."""
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(module.weight)
    ema = EMA(module, [profile])
    nn.init.zeros_(module.weight)
    for step in range(1, steps + 1):
        ema.update(step * batch_size, batch_size)
    return ema.shadows[profile.name]["weight"].item()


def averaged(weights, decay, dtype):
    """The recursion in `dtype` over weights (steps, n); the average starts at the first ones."""
    average = weights[0].to(dtype)
    for weight in weights[1:]:
        average = average.lerp(weight.to(dtype), 1 - decay)
    return average.double()


def test_average_of_bfloat16_weights_is_accurate_and_would_not_be_in_bfloat16():
    steps, decay = 3000, 0.9999
    walk = 1 + 0.01 * torch.randn(steps + 1, 256).cumsum(0)
    module = nn.Linear(256, 1, bias=False).to(torch.bfloat16)
    weights = walk.to(torch.bfloat16)
    module.weight.data = weights[:1].clone()
    ema = EMA(module, [ConstantDecay(decay)])
    for step, weight in enumerate(weights[1:], 1):
        module.weight.data.copy_(weight[None])
        ema.update(step * BATCH, BATCH)
    shadow = ema.shadows["ema_0.9999"]["weight"]
    assert shadow.dtype == torch.float32

    exact = averaged(weights, decay, torch.float64)
    displacement = (exact - weights[0].double()).norm()
    bound = 1e-4 * displacement
    assert (shadow[0].double() - exact).norm() < bound
    assert (averaged(weights, decay, torch.bfloat16) - exact).norm() > 100 * bound


def test_constant_decay_has_its_closed_form():
    assert constant_then_jump(ConstantDecay(0.99), 100) == pytest.approx(0.99**100, rel=1e-5)


def test_half_life_without_ramp_halves_after_its_images():
    profile = HalfLife(kimg=6.4, rampup=0)
    assert constant_then_jump(profile, 100) == pytest.approx(0.5, rel=1e-5)
    assert constant_then_jump(profile, 300) == pytest.approx(0.125, rel=1e-5)


def test_half_life_does_not_depend_on_the_batch_size():
    profile = HalfLife(kimg=6.4, rampup=0)
    assert constant_then_jump(profile, 50, 128) == pytest.approx(constant_then_jump(profile, 100), rel=1e-5)


def test_ramp_keeps_the_initial_weights_out():
    # within the ramp the step k multiplies by 0.5^(1 / (rampup k)), whose product is 0.5^(H_k / rampup)
    steps, rampup = 20, 0.5
    harmonic = sum(1 / k for k in range(1, steps + 1))
    left = constant_then_jump(HalfLife(kimg=500, rampup=rampup), steps)
    assert left == pytest.approx(0.5 ** (harmonic / rampup), rel=1e-4)
    assert constant_then_jump(HalfLife(kimg=500, rampup=0), steps) > 0.99


def test_ramp_ends_at_the_half_life():
    profile, plain = HalfLife(kimg=10, rampup=0.05), HalfLife(kimg=10, rampup=0)
    assert profile(199_999, BATCH) < plain(199_999, BATCH)
    assert profile(200_000, BATCH) == plain(200_000, BATCH) == 0.5 ** (BATCH / 10_000)


@pytest.mark.parametrize(
    "profile, name", [(ConstantDecay(0.9999), "ema_0.9999"), (HalfLife(500), "ema_halflife_500kimg")]
)
def test_profiles_have_names(profile, name):
    assert profile.name == name


def test_buffers_are_copied_and_integers_stay_integers():
    module = nn.BatchNorm1d(3)
    ema = EMA(module, [ConstantDecay(0.9)])
    module(torch.randn(8, 3) + 5)
    ema.update(8, 8)
    shadow = ema.shadows["ema_0.9"]
    assert torch.equal(shadow["running_mean"], module.running_mean)
    assert shadow["num_batches_tracked"].dtype == torch.int64 and shadow["num_batches_tracked"] == 1


def test_every_average_has_the_buffers_that_are_saved_and_no_others():
    module = nn.BatchNorm1d(3)
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    ema = EMA(module, [ConstantDecay(0.9), ConstantDecay(0.99), HalfLife(500)])
    module(torch.randn(8, 3) + 5)
    module.scratch += 1
    ema.update(8, 8)
    for shadow in ema.shadows.values():
        assert torch.equal(shadow["running_mean"], module.running_mean) and shadow["num_batches_tracked"] == 1
        assert shadow.keys() == module.state_dict().keys()


def test_weights_that_layers_share_are_averaged_under_all_their_names():
    """Otherwise loading the average would give the layers their untrained weights, under their second name."""
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    ema, before = EMA(module, [ConstantDecay(0.75)]), module[0].weight.detach().clone()
    nn.init.zeros_(module[0].weight)
    ema.update(8, 8)
    module.load_state_dict(ema.shadows["ema_0.75"])
    torch.testing.assert_close(module[0].weight, 0.75 * before)
    assert module[1].weight is module[0].weight


def test_several_averages_at_once_are_those_of_each_alone():
    profiles = [ConstantDecay(0.9), ConstantDecay(0.99), HalfLife(0.5, 0)]
    module = nn.Linear(4, 3)
    emas = [EMA(module, profiles), *(EMA(module, [profile]) for profile in profiles)]
    for step in range(1, 6):
        nn.init.normal_(module.weight)
        for ema in emas:
            ema.update(step * BATCH, BATCH)
    together = emas[0].shadows
    for profile, alone in zip(profiles, emas[1:]):
        assert torch.equal(together[profile.name]["weight"], alone.shadows[profile.name]["weight"])
    assert not torch.equal(together["ema_0.9"]["weight"], together["ema_0.99"]["weight"])


def test_the_average_is_a_copy_without_gradient():
    module = nn.Linear(4, 3)
    shadow = EMA(module, [ConstantDecay(0.9)]).shadows["ema_0.9"]
    before = shadow["weight"].clone()
    nn.init.zeros_(module.weight)
    assert torch.equal(shadow["weight"], before)
    assert not shadow["weight"].requires_grad
    assert shadow.keys() == module.state_dict().keys()

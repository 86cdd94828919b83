"""The networks of score-based models and EDM, and two small public ones: derivatives, gradients, saving, errors.

tests/convert compares their numbers with the original networks.
"""

import math

import pytest
import torch
from torch.func import jvp

from cm_diffusers import RawSigmaUNet2DModel, ShuffleUNet2DModel
from cm_diffusers.models import (
    EDMUNet2DModel,
    TwoTimeModel,
    keep_time_embedding_in_float32,
)
from cm_diffusers.models.edm_unet import NoiseFeatures, Resample
from cm_diffusers.models.keyed_dropout import KeyedDropout


NCSNPP = {"time_embedding_type": "fourier", "resample_filter": (1, 3, 3, 1), "encoder_type": "residual"}
KINDS = {
    "ddpmpp": {},
    "ncsnpp": NCSNPP,
    "skip": {**NCSNPP, "encoder_type": "skip", "decoder_type": "skip"},
    "adm": {"architecture": "adm", "attention_head_dim": 8},
    "edm": {"preconditioning": "edm"},
    "vp": {"preconditioning": "vp"},
    "ve": {"preconditioning": "ve", **NCSNPP},
}
TINY = {"sample_size": 8, "model_channels": 8, "channel_mult": (1, 2), "layers_per_block": 1}


def randomised(kind="ddpmpp", **config):
    """A small network in which no weight is zero."""
    network = EDMUNet2DModel(**(TINY | KINDS[kind] | config))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def others():
    """The two small public networks."""
    return [ShuffleUNet2DModel(8, 3, 3, 8, (2, 4), 8), RawSigmaUNet2DModel(8, 3, 3, 32)]


def inputs(dtype=torch.float32, batch=3):
    x, t = torch.randn(batch, 3, 8, 8), torch.rand(batch) * math.pi / 2
    return tuple(value.to(dtype) for value in (x, t, torch.randn_like(x), torch.randn_like(t)))


def check_jvp(call, x, t, dx, dt):
    """Compare the JVP of `call` with central differences."""
    primal, derivative = jvp(call, (x, t), (dx, dt))
    h = 1e-6
    with torch.no_grad():
        difference = (call(x + h * dx, t + h * dt) - call(x - h * dx, t - h * dt)) / (2 * h)
        torch.testing.assert_close(primal, call(x, t), rtol=1e-12, atol=1e-12)
    assert (derivative - difference).norm() / difference.norm() < 1e-6


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_jvp_is_the_derivative(kind, checkpointing):
    network = randomised(kind, num_class_embeds=5, augment_channels=2).double()
    if checkpointing:
        network.enable_gradient_checkpointing()
    labels, augment = torch.tensor([4, 0, 2]), torch.randn(3, 2, dtype=torch.float64)
    check_jvp(lambda x, t: network(x, t, labels, augment).sample, *inputs(torch.float64))


def test_jvp_of_the_small_networks_is_the_derivative():
    for network in others():
        network.double()
        check_jvp(lambda x, t, network=network: network(x, t).sample, *inputs(torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(kind):
    network, gradients = randomised(kind, num_class_embeds=3, augment_channels=2, two_times=True), []
    x, t, _, _ = inputs()
    for checkpointing in (False, True):
        network.zero_grad()
        if checkpointing:
            network.enable_gradient_checkpointing()
        output = network(x, t, torch.tensor([0, 1, 2]), torch.ones(3, 2), t / 2).sample
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    torch.testing.assert_close(*gradients)


def test_a_new_network_starts_near_zero_and_its_blocks_near_the_identity():
    for kind in ("ddpmpp", "adm"):
        network = EDMUNet2DModel(**(TINY | KINDS[kind]))
        x, t, _, _ = inputs()
        assert network(x, t).sample.abs().max() < 1e-3
        block = network.mid_blocks[0]
        h, embedding = torch.randn(2, 16, 4, 4), torch.randn(2, 32)
        expected = h if kind == "adm" else h / 2  # two sums, each scaled by sqrt(1/2)
        torch.testing.assert_close(block(h, embedding), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind, sign", [("vp", 1), ("ve", -1)])
def test_networks_of_vp_and_ve_denoise_as_in_their_table(kind, sign):
    """c_skip x + c_out F at sigma_data 1 against x -+ sigma F(c_in x), at a level where nothing cancels."""
    network = randomised(kind).double()
    x, _, _, _ = inputs(torch.float64)
    sigma = 1.7
    norm = math.hypot(sigma, 1)
    result = x / norm**2 + sigma / norm * network(x / norm, 250 * math.log(sigma)).sample
    raw = EDMUNet2DModel.from_config({**network.config, "preconditioning": "none"}).double()
    raw.load_state_dict(network.state_dict())
    if kind == "vp":  # the time at which sigma is 1.7
        time = (-0.1 + math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + sigma**2))) / 19.9
        assert math.isclose(math.exp(19.9 / 2 * time**2 + 0.1 * time) - 1, sigma**2)
        output = raw(x / norm, 999 * time).sample
    else:
        output = raw(x, math.log(sigma / 2)).sample
    torch.testing.assert_close(result, x - sign * sigma * output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["ddpmpp", "adm"])
def test_the_label_after_the_last_class_is_that_of_no_class(kind):
    network = randomised(kind, num_class_embeds=3).eval()
    x, t, _, _ = inputs()
    with torch.no_grad():
        without = network(x, t).sample
        assert torch.equal(network(x, t, torch.tensor([3, 3, 3])).sample, without)
        some = network(x, t, torch.tensor([0, 3, 2])).sample
    assert torch.equal(some[1], without[1])
    assert (some - without)[::2].abs().amax((1, 2, 3)).min() > 1e-4


def test_no_augment_labels_are_zeros_and_every_weight_keeps_a_gradient():
    network = randomised(augment_channels=2)
    x, t, _, _ = inputs()
    output = network(x, t).sample
    assert torch.equal(output, network(x, t, augment_labels=torch.zeros(3, 2)).sample)
    assert (network(x, t, augment_labels=torch.ones(3, 2)).sample - output).abs().max() > 1e-4
    output.sum().backward()  # a weight without a gradient would end a run of several processes
    assert network.augment_embedding.weight.grad.abs().max() == 0


@pytest.mark.parametrize("kind", ["ddpmpp", "adm"])
def test_keyed_dropout_does_not_depend_on_the_batch(kind):
    network = randomised(kind, dropout=0.4).double().train()
    x, t, _, _ = inputs(torch.float64)
    keys = torch.tensor([5, 6, 7])
    network.key_dropout(keys)
    whole = network(x, t).sample
    torch.testing.assert_close(network(x, t).sample, whole, rtol=0, atol=0)
    for row in range(3):
        network.key_dropout(keys[row : row + 1])
        torch.testing.assert_close(network(x[row : row + 1], t[row : row + 1]).sample, whole[row : row + 1])
    network.key_dropout(keys)
    torch.testing.assert_close(network(torch.cat([x, x]), torch.cat([t, t])).sample, torch.cat([whole, whole]))
    network.key_dropout(keys + 1)
    assert (network(x, t).sample - whole).abs().amax((1, 2, 3)).min() > 1e-4
    layers = [module.layer for module in network.modules() if isinstance(module, KeyedDropout)]
    assert layers == list(range(len(layers))) and len(layers) > 5
    network.key_dropout(keys[:2])
    with pytest.raises(ValueError, match="dropout keys for 2 samples, but the batch has 3"):
        network(x, t)


def test_samples_do_not_see_each_other_and_time_matters():
    for network in (*(randomised(kind) for kind in KINDS), *others()):
        x, t, _, _ = inputs()
        with torch.no_grad():
            whole = network.eval()(x, t).sample
            torch.testing.assert_close(whole[1:2], network(x[1:2], t[1:2]).sample)
            torch.testing.assert_close(network(x, 0.5).sample, network(x, torch.tensor([0.5] * 3)).sample)
            assert (network(x, t + 1).sample - whole).abs().max() > 1e-5
        assert torch.equal(network(x, t, return_dict=False)[0], whole)


def test_other_sizes_go_through():
    x = torch.randn(2, 3, 8, 12)
    for network in (*(randomised(kind) for kind in KINDS), *others()):
        assert network(x, 0.3).sample.shape == x.shape


@pytest.mark.parametrize("kind", ["ncsnpp", "adm"])
def test_a_saved_network_is_the_same_network(kind, tmp_path):
    network = randomised(kind, num_class_embeds=3, two_times=True).eval()
    network.save_pretrained(tmp_path)
    again = EDMUNet2DModel.from_pretrained(tmp_path)
    x, t, _, _ = inputs()
    with torch.no_grad():
        first, second = (n(x, t, torch.tensor([0, 1, 2]), None, t / 2).sample for n in (network, again))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    assert list(EDMUNet2DModel.from_config(network.config).state_dict()) == list(network.state_dict())


def test_time_stays_in_float32_under_autocast_and_in_bfloat16():
    near = torch.tensor([500.0, 500.1, 500.2])  # equal in bfloat16
    for cast in (True, False):
        network = randomised(num_class_embeds=3)
        x = inputs()[0][:1].expand(3, -1, -1, -1)
        if cast:
            network, x = network.to(torch.bfloat16), x.to(torch.bfloat16)
        keep_time_embedding_in_float32(network)  # it needs no such help
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not cast):
            embedding = network._embed(network._noise(near, x)[1], None, None, None, x)
            assert network(x, near).sample.dtype == torch.bfloat16
        assert embedding.dtype == torch.float32 and len(embedding[:, 0].unique()) == 3


def test_a_second_time_can_be_added_by_the_wrapper():
    network = randomised().eval()
    model = TwoTimeModel.from_network(network, 1.0)
    x, t, _, _ = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, t / 2).sample, network(x, t).sample)
        torch.nn.init.normal_(model.target_time_embedding.linear_2.weight)
        assert (model(x, t, t / 2).sample - model(x, t, t / 3).sample).abs().max() > 1e-4


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_filters_keep_a_constant_and_undo_each_other_on_it(taps):
    x = torch.full((1, 2, 8, 8), 3.0)
    half, double = Resample(taps, up=False)(x), Resample(taps, up=True)(x)
    assert half.shape == (1, 2, 4, 4) and double.shape == (1, 2, 16, 16)
    inner = slice(1, -1)  # [1, 3, 3, 1] mixes in zeros at the border
    for result in (half, double):
        torch.testing.assert_close(result[..., inner, inner], torch.full_like(result[..., inner, inner], 3.0))
    y = torch.arange(16.0).view(1, 1, 4, 4)
    if taps == (1, 1):
        assert torch.equal(Resample(taps, up=False)(y)[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
        assert torch.equal(Resample(taps, up=True)(y)[0, 0], y[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_time_features_by_hand():
    label = torch.tensor([2.0])
    features = NoiseFeatures(4, "positional", endpoint=True)(label)[0]
    expected = [math.cos(2), math.cos(2e-4), math.sin(2), math.sin(2e-4)]
    torch.testing.assert_close(features, torch.tensor(expected))
    features = NoiseFeatures(4, "positional", endpoint=False)(label)[0]
    torch.testing.assert_close(features[1], torch.tensor(math.cos(2e-2)))


@pytest.mark.parametrize("name", ["architecture", "encoder_type", "decoder_type", "preconditioning"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'other'"):
        EDMUNet2DModel(**TINY, **{name: "other"})


def test_labels_and_times_that_do_not_fit_are_refused():
    x, t, _, _ = inputs()
    for arguments, message in (
        ({"class_labels": torch.zeros(3, dtype=torch.int64)}, "class_labels are not for this network"),
        ({"augment_labels": torch.zeros(3, 2)}, "augment_labels are not for this network"),
        ({"target_timestep": t}, "target_timestep is not for this network"),
    ):
        with pytest.raises(ValueError, match=message):
            randomised()(x, t, **arguments)
    with pytest.raises(ValueError, match="target_timestep is missing"):
        randomised(two_times=True)(x, t)
    for network in others():
        with pytest.raises(ValueError, match="class_labels are not for this network"):
            network(x, t, torch.zeros(3, dtype=torch.int64))

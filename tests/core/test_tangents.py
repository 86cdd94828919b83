"""Tangents against central differences in float64, on stock networks and ours."""

import warnings

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import nn

from cm_diffusers.core.tangents import NotDifferentiable, jvp, jvp_ready, normalised
from cm_diffusers.models import build_unet


LABELS = torch.tensor([1, 2, 3])
SMALL = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


def stock_unet():
    network = build_unet("tiny", (8, 8), 4, 10)
    return network, lambda x, t: network(x, t, class_labels=LABELS).sample


def conditional_unet():
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    network = UNet2DConditionModel(
        **SMALL, **blocks, in_channels=4, out_channels=4, cross_attention_dim=16, attention_head_dim=8
    )
    context = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    return network, lambda x, t: network(x, t, encoder_hidden_states=context.to(x.dtype)).sample


def dit():
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    return network.eval(), lambda x, t: network(x, timestep=t, class_labels=LABELS).sample


def our_unet():
    network = build_unet("jvp_tiny", (8, 8), 4, 10)
    return network, lambda x, t: network(x, t, class_labels=LABELS).sample


NETWORKS = [stock_unet, conditional_unet, dit, our_unet]


@pytest.fixture(params=NETWORKS, ids=lambda make: make.__name__)
def case(request):
    torch.manual_seed(0)
    network, function = request.param()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return request.param.__name__, network, function


def point(dtype):
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    t, w = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in (x, t + 0.2, v, w)]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def central_difference(function, x, t, v, w, h):
    with torch.no_grad():
        return (function(x + h * v, t + h * w) - function(x - h * v, t - h * w)) / (2 * h)


@pytest.mark.parametrize("along", ["x", "t"])
def test_exact_tangent_is_the_central_difference(case, along):
    name, network, function = case
    network.double()
    x, t, v, w = point(torch.float64)
    v, w = (v, 0 * w) if along == "x" else (0 * v, w)
    stock = along == "t" and name != "our_unet"  # stock networks round their time to float32
    expected = central_difference(function, x, t, v, w, 3e-3 if stock else 1e-5)
    with jvp_ready(network):
        output, tangent = jvp(function, (x, t), (v, w), mode="exact")
    assert not output.requires_grad and not tangent.requires_grad
    assert relative(tangent, expected) < (1e-3 if stock else 1e-6)


def test_tangent_in_float32(case):
    _, network, function = case
    x, t, v, w = point(torch.float64)
    network.double()
    with jvp_ready(network):
        expected = jvp(function, (x, t), (v, w), mode="exact")[1]
    network.float()
    single = [tensor.float() for tensor in (x, t, v, w)]
    with jvp_ready(network):
        exact = jvp(function, single[:2], single[2:], mode="exact")[1]
    assert relative(exact, expected) < 1e-3
    assert relative(jvp(function, single[:2], single[2:], mode="finite_difference")[1], expected) < 1e-2


def test_outputs_are_equal_to_rounding_inside_and_to_the_bit_after(case):
    _, network, function = case
    x, t, _, _ = point(torch.float32)
    with torch.no_grad():
        before = function(x, t)
        with jvp_ready(network):
            torch.testing.assert_close(function(x, t), before, rtol=1e-5, atol=1e-5)
        assert torch.equal(function(x, t), before)
    assert not any(module._forward_pre_hooks for module in network.modules() if isinstance(module, nn.GroupNorm))


def test_stock_attention_needs_jvp_ready():
    torch.manual_seed(0)
    _, function = stock_unet()
    x, t, v, w = point(torch.float32)
    with pytest.raises(NotDifferentiable, match="jvp_ready.*finite_difference"):
        jvp(function, (x, t), (v, w), mode="exact")
    with pytest.warns(UserWarning, match="finite differences"):
        jvp(function, (x, t), (v, w), mode="auto")


def test_auto_is_exact_where_it_can_be():
    torch.manual_seed(0)
    network, function = our_unet()
    x, t, v, w = point(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = [jvp(function, (x, t), (v, w), mode=mode)[1] for mode in ("auto", "exact")]
    assert torch.equal(*both)


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_dropout_is_the_same_in_all_evaluations(mode):
    drop = nn.Dropout(0.5)
    x, v = torch.rand(2, 4, 256) + 1
    torch.manual_seed(3)
    output, tangent = jvp(lambda x: drop(x), (x,), (v,), mode=mode)
    torch.testing.assert_close(tangent, torch.where(output > 0, 2 * v, 0), rtol=1e-2, atol=1e-3)


def test_central_difference_leaves_the_generator_alone():
    x, state = torch.rand(4, 8), torch.get_rng_state()
    jvp(nn.Dropout(0.5), (x,), (x,), mode="finite_difference")
    assert torch.equal(torch.get_rng_state(), state)


def test_step_of_the_central_difference_is_relative_to_each_sample():
    scale = torch.tensor([1e-3, 1.0, 1e3])
    x = scale[:, None] * (torch.rand(3, 5) + 1)
    _, tangent = jvp(lambda x: x**3, (x,), (scale[:, None].expand(3, 5),), mode="finite_difference")
    torch.testing.assert_close(tangent, 3 * x**2 * scale[:, None], rtol=1e-3, atol=0)
    _, still = jvp(lambda x: x**3, (x,), (torch.zeros(3, 5),), mode="finite_difference")
    assert torch.equal(still, torch.zeros(3, 5))


class FlashAttnProcessor:
    def __call__(self, attn, hidden_states, **kwargs):
        return hidden_states


def with_batch_norm():
    return nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).train()


def with_flash_attention():
    network = build_unet("tiny", (8, 8), 1)
    for module in network.modules():
        if hasattr(module, "processor"):
            module.processor = FlashAttnProcessor()
    return network


@pytest.mark.parametrize(
    "make, message",
    [
        (with_batch_norm, "1 is a BatchNorm2d in training mode.*GroupNorm"),
        (with_flash_attention, "attentions.0 computes attention by flashattnprocessor.*AttnProcessor2_0"),
    ],
)
def test_what_has_no_derivative_is_named(make, message):
    with pytest.raises(NotDifferentiable, match=message):
        with jvp_ready(make()):
            pass


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def reentrant_checkpoint(x):
    with torch.enable_grad():
        return torch.utils.checkpoint.checkpoint(torch.sin, x.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize("function", [Custom.apply, reentrant_checkpoint])
def test_custom_functions_say_what_to_do(function):
    x = torch.rand(2, 3)
    with pytest.raises(NotDifferentiable, match="no forward derivative.*finite_difference"):
        jvp(function, (x,), (x,), mode="exact")


def test_batch_norm_in_evaluation_mode_is_fine():
    network = with_batch_norm().eval()
    x, v = torch.rand(2, 2, 1, 4, 4)
    with jvp_ready(network):
        tangent = jvp(network, (x,), (v,), mode="exact")[1]
    assert relative(tangent, network(x + v) - network(x)) < 1e-5  # the network is linear


def test_finite_differences_need_nothing():
    network = with_batch_norm()
    with jvp_ready(network, mode="finite_difference") as same:
        assert same is network


def test_works_with_gradient_checkpointing(case):
    _, network, function = case
    x, t, v, w = point(torch.float32)
    network.train()

    def tangent():
        torch.manual_seed(0)  # a DiT drops labels in training
        return jvp(function, (x, t), (v, w), mode="exact")[1]

    with jvp_ready(network):
        plain = tangent()
        network.enable_gradient_checkpointing()
        assert torch.equal(tangent(), plain)
    function(x, t).sum().backward()
    assert any(parameter.grad is not None for parameter in network.parameters())


def test_errors_of_the_function_itself_pass():
    def broken(x):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        jvp(broken, (torch.rand(2, 3),), (torch.rand(2, 3),))
    with pytest.raises(ValueError, match="mode must be one of auto, exact, finite_difference"):
        jvp(torch.sin, (torch.rand(2),), (torch.rand(2),), mode="forward")


@pytest.mark.parametrize("kind, bound", [("norm", 1.0), ("rms", 2.0), ("clip", 2.0)])
def test_normalised_tangents_are_bounded(kind, bound):
    g = torch.randn(8, 1, 2, 2) * 10.0 ** torch.arange(-4, 4).reshape(-1, 1, 1, 1)
    norms = normalised(g, kind).flatten(1).norm(dim=1)
    assert (norms <= bound).all() and norms[-1] > 0.9 * bound
    if kind != "clip":
        expected = g / (g.flatten(1).norm(dim=1) / (2 if kind == "rms" else 1) + 0.1).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(normalised(g, kind), expected)
    assert normalised(g, "none") is g

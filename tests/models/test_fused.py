"""Fused kernels of plain passes against the forms with a forward derivative, and no wait inside any network."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch.func import grad, jvp, vmap

from cm_diffusers import RawSigmaUNet2DModel, ShuffleUNet2DModel
from cm_diffusers.models import (
    EDM_PRESETS,
    UNET_PRESETS,
    DiTModel,
    EDMUNet2DModel,
    PatchDiscriminator,
    ProjectedDiscriminator,
    TwoTimeModel,
    build_unet,
    fused,
)
from cm_diffusers.models.fused import attention, group_norm, split_heads, under_tangent
from tests.helpers.waits import stand_in, waits


HALVES = (torch.bfloat16, torch.float16)


def norm_inputs(dtype=torch.float32, shape=(2, 8, 4, 6)):
    """Values whose mean is five times their deviation, as 16-bit statistics would show, and weights."""
    generator = torch.Generator().manual_seed(0)
    x = (5 + torch.randn(shape, generator=generator)).to(dtype)
    weight, bias = torch.randn(2, shape[1], generator=generator)
    return [value.requires_grad_() for value in (x, weight, bias)]


def norm_by_hand(x, groups, weight, bias, eps):
    """Group norm in float64."""
    x = x.double()
    h = x.view(x.shape[0], groups, -1)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, unbiased=False, keepdim=True) + eps).sqrt()
    h = h.view(x.shape)
    return h if weight is None else h * weight.double()[:, None, None] + bias.double()[:, None, None]


def saved_bytes(function):
    """Bytes of the distinct storages that `function` keeps for its backward pass."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(sizes.values()), result


def test_a_tangent_is_seen_wherever_it_is():
    seen, x = [], torch.rand(3)

    def look(x):
        seen.append(under_tangent())
        return x.sin()

    look(x)
    grad(lambda x: look(x).sum())(x)
    jvp(look, (x,), (x,))
    jvp(grad(lambda x: look(x).sum()), (x,), (x,))
    jvp(vmap(look), (x,), (x,))
    jvp(lambda w: look(x) * w, (x,), (x,))  # a tangent of something else
    look(x)
    assert seen == [False, False, True, True, True, True, False]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_group_norm_and_its_gradients_are_the_formula(dtype, affine):
    x, weight, bias = norm_inputs(dtype)
    weight, bias = (weight, bias) if affine else (None, None)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    factor = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result, expected = group_norm(x, 2, weight, bias, 1e-5), norm_by_hand(x, 2, weight, bias, 1e-5)
    assert result.dtype == dtype
    found = torch.autograd.grad((result * factor).sum(), leaves)
    true = torch.autograd.grad((expected * factor.double()).sum(), leaves)
    rounding = torch.finfo(dtype).eps if dtype in HALVES else 2e-5  # of the result, not of statistics
    for value, exact, leaf in zip((result, *found), (expected, *true), (x, *leaves)):
        assert value.dtype == leaf.dtype
        torch.testing.assert_close(value.double(), exact.double(), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_of_the_group_norm_agree(dtype, monkeypatch):
    x, weight, bias = norm_inputs(dtype)
    plain = group_norm(x, 2, weight, bias, 1e-5)
    monkeypatch.setattr(fused, "under_tangent", lambda: True)
    split = group_norm(x, 2, weight, bias, 1e-5)
    assert split.dtype == plain.dtype and split.grad_fn is not plain.grad_fn
    torch.testing.assert_close(split, plain)


def test_group_norm_computes_in_float32_under_autocast_and_returns_what_it_is_told():
    x, weight, bias = norm_inputs(torch.bfloat16)
    expected = norm_by_hand(x, 2, weight, bias, 1e-5).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert group_norm(x.float(), 2, weight, bias, 1e-5).dtype == torch.float32
        whole = group_norm(x, 2, weight, bias, 1e-5, torch.float32)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("result", [None, torch.float32])
def test_a_half_precision_group_norm_keeps_its_input_and_no_copy(result):
    x, weight, bias = norm_inputs(torch.bfloat16, (2, 64, 16, 16))
    size, _ = saved_bytes(lambda: group_norm(x, 8, weight, bias, 1e-5, result))
    assert 2 * x.numel() <= size < 2.1 * x.numel()


def test_group_norm_of_halves_goes_through_transforms_and_the_compiler():
    x, weight, bias = (value.detach() for value in norm_inputs(torch.bfloat16))

    def loss(x):
        return group_norm(x[None], 2, weight, bias, 1e-5, torch.float32).square().sum()

    one_by_one = torch.stack([grad(loss)(row) for row in x])
    torch.testing.assert_close(vmap(grad(loss))(x), one_by_one)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[0]), loss(x[0]))


def attention_by_hand(qkv, heads):
    """softmax(q k^T / sqrt(d)) v in float64, pixel by pixel."""
    batch, width, height, across = qkv.shape
    d = width // (3 * heads)
    rows = qkv.double().view(batch, 3, heads, d, height * across)
    result = torch.zeros(batch, heads, height * across, d, dtype=torch.float64)
    for pixel in range(height * across):
        logits = torch.einsum("bhd,bhdn->bhn", rows[:, 0, ..., pixel], rows[:, 1]) / math.sqrt(d)
        result[:, :, pixel] = torch.einsum("bhn,bhdn->bhd", logits.softmax(2), rows[:, 2])
    return result


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_is_the_formula_in_both_forms(dtype, tolerance, heads):
    qkv = torch.randn(2, 36, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    qkv, dqkv = qkv.to(dtype), torch.randn_like(qkv).to(dtype)
    expected = attention_by_hand(qkv, heads)

    def attend(qkv):
        return attention(*split_heads(qkv, heads))

    plain, (dual, _) = attend(qkv), jvp(attend, (qkv,), (dqkv,))
    for value in (plain, dual):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_tangent_of_attention_is_the_derivative():
    generator = torch.Generator().manual_seed(0)
    qkv, dqkv = torch.randn(2, 2, 24, 4, 4, generator=generator, dtype=torch.float64)

    def attend(qkv):
        return attention(*split_heads(qkv, 2))

    difference = (attend(qkv + 1e-6 * dqkv) - attend(qkv - 1e-6 * dqkv)) / 2e-6
    torch.testing.assert_close(jvp(attend, (qkv,), (dqkv,))[1], difference, rtol=1e-7, atol=1e-8)


def test_plain_attention_keeps_no_matrix_of_weights():
    qkv = torch.randn(1, 24, 32, 32, requires_grad=True)
    size, _ = saved_bytes(lambda: attention(*split_heads(qkv, 1)))
    assert size < 4 * 1024**2  # the matrix alone has 4 x 1024 x 1024 bytes


# --- a network does not wait for its device


def dit():
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
    return DiTModel.from_transformer(DiTTransformer2DModel(in_channels=3, num_embeds_ada_norm=10, **shape))


FILTERED = {"resample_filter": (1, 3, 3, 1), "time_embedding_type": "fourier", "preconditioning": "ve"}
NETWORKS = {
    **{name: lambda name=name: build_unet(name, (64, 64), 3, 10, dropout=0.1) for name in UNET_PRESETS},
    **{name: lambda name=name: build_unet(name, (64, 64), 3, 10, 0.1, 9) for name in EDM_PRESETS},
    "ncsnpp": lambda: EDMUNet2DModel(8, 3, 3, 8, (1, 2), 1, encoder_type="residual", num_class_embeds=10, **FILTERED),
    "skip": lambda: EDMUNet2DModel(
        8, 3, 3, 8, (1, 2), 1, num_class_embeds=10, encoder_type="skip", decoder_type="skip", **FILTERED
    ),
    "two times": lambda: TwoTimeModel.from_network(build_unet("jvp_tiny", (8, 8), 3, 10)),
    "dit": dit,
    "raw sigma": lambda: RawSigmaUNet2DModel(8, 3, 3, 32),
    "shuffle": lambda: ShuffleUNet2DModel(8, 3, 3, 8, (2, 4), 8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_waits_for_its_device(name, monkeypatch):
    with stand_in(monkeypatch) as device:
        with device:
            network = NETWORKS[name]()
        network = network.to(device).train()
        size = 64 if name in UNET_PRESETS | EDM_PRESETS else 8
        x, times = torch.empty(2, 3, size, size, device=device), torch.empty(2, device=device)
        more = {"target_timestep": times} if name == "two times" else {}
        if network.config.num_class_embeds:
            more["class_labels"] = torch.empty(2, device=device, dtype=torch.int64)
        own = not isinstance(network, type(build_unet("tiny", (8, 8), 1)))
        if own and hasattr(network, "key_dropout"):
            network.key_dropout(torch.empty(2, device=device, dtype=torch.int64))
        with waits() as found:
            network(x, times, **more).sample.sum().backward()
            if own:  # a stock network sends a number by itself
                network(x, 0.5, **more)
        assert not found
        assert all(parameter.grad is not None for parameter in network.parameters())


class Backbone(torch.nn.Module):
    channels = (4,)

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return type("Maps", (), {"feature_maps": [self.layer(x)]})


@pytest.mark.parametrize("make", [lambda: PatchDiscriminator(3), lambda: ProjectedDiscriminator(Backbone(), 3)])
def test_no_discriminator_waits_for_its_device(make):
    network = make().to("meta")
    with waits() as found:
        network(torch.empty(2, 3, 16, 16, device="meta")).sum().backward()
    assert not found


@pytest.mark.parametrize(
    "what, act",
    [
        ("_local_scalar_dense", lambda x: x[0].item()),
        ("_local_scalar_dense", lambda x: bool(x[0] > 0)),
        ("_local_scalar_dense", lambda x: [] if (x > 9).any() else [1]),
        ("tensor", lambda x: torch.tensor([1.0, 2.0])),
        ("new_tensor", lambda x: x.new_tensor([1.0])),
        ("as_tensor", lambda x: torch.as_tensor([1.0])),
        ("lift_fresh", lambda x: torch.from_numpy(x.new_ones(2).detach().__array__())),
        ("cpu", lambda x: x.cpu()),
        ("tolist", lambda x: x.tolist()),
        ("nonzero", lambda x: torch.nonzero(x)),
        ("index", lambda x: x[x > 0]),
        ("equal", lambda x: torch.equal(x, x)),
        ("_to_copy", lambda x: x.to("meta")),
        ("copy_", lambda x: torch.empty(3, device="meta").copy_(x)),
    ],
)
def test_every_kind_of_wait_is_seen(what, act):
    with waits() as found:
        act(torch.rand(3))
    assert [entry.split(" at ")[0] for entry in found] == [what]
    assert found[0].split(" at ")[1].startswith("test_fused.py:")


def test_what_stays_on_the_device_is_no_wait():
    x = torch.rand(3)
    with waits() as found:
        (2 * x.to(x).double() + x.new_full((3,), 2.0) + torch.arange(3, device=x.device))[torch.arange(2)]
        torch.full((), 3.0) * torch.as_tensor(x) + F.avg_pool1d(x[None], 3)
    assert not found

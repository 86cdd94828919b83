"""Frozen weights of 16, 8 and 4 bits below an adapter: errors, gradients, memory, and files for the full weights."""

import builtins
import copy

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from cm_diffusers.core.conditions import Condition, call_network
from cm_diffusers.core.ema import EMA, ConstantDecay
from cm_diffusers.core.frozen import changing_state, copied, load_changing_state
from cm_diffusers.engine.saved.base_precision import (
    BLOCK,
    HALVES,
    Int8Linear,
    NF4Linear,
    PackedLinear,
    cast_calls,
    full_state,
    set_base_precision,
)
from cm_diffusers.engine.saved.lora import add_lora, save_lora, trained_weights
from cm_diffusers.models import build_unet, keep_time_embedding_in_float32
from cm_diffusers.models.text_unet import with_conditions
from tests.helpers.tiny_text import PIPELINES, WIDTH


ALL = [("no", "bf16"), ("fp16", "fp16"), (None, "bf16")]
ALL += [("int8", "no"), ("int8", "bf16"), ("nf4", "no"), ("nf4", "fp16")]
KINDS = {"int8": Int8Linear, "nf4": NF4Linear}
# on the tiny U-Net: relative errors of the output, and cosines of the adapter's gradient, with that on float32
ERRORS = {"no": 0, "fp16": 0.0006, "bf16": 0.005, "int8": 0.0003, "nf4": 0.003}
COSINES = {"no": 1 - 1e-6, "fp16": 0.9999, "bf16": 0.9999, "int8": 0.99999, "nf4": 0.999}


@pytest.fixture(autouse=True)
def packages(request):
    """Skip a case of nf4 where bitsandbytes is not installed."""
    spec = getattr(request.node, "callspec", None)
    if spec is not None and "nf4" in spec.params.values():
        pytest.importorskip("bitsandbytes")


def case():
    """A text-to-image U-Net in float32, and a function that calls a network with a fixed input."""
    torch.manual_seed(0)
    unet = with_conditions(PIPELINES["sdxl"]().unet.eval())
    entries = {"text": torch.randn(2, 3, 2 * WIDTH), "pooled": torch.randn(2, WIDTH), "sizes": torch.full((2, 6), 8.0)}
    x, times = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])

    def call(network):
        with cast_calls(network):
            return call_network(network, x, times, condition=Condition(entries)).sample.float()

    return unet, call


def student_of(base):
    """The base with an adapter, whose initial weights are the same in each call."""
    torch.manual_seed(5)
    return add_lora(copied(base), rank=4)


def gradient(student, call):
    call(student).square().sum().backward()
    return torch.cat([weight.grad.flatten() for weight in trained_weights(student).values()])


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("asked, mixed", ALL)
def test_a_new_student_is_its_base_to_the_bit_and_its_gradient_is_that_on_float32_within_the_rounding(asked, mixed):
    unet, call = case()
    expected, expected_gradient = call(unet).detach(), gradient(student_of(copy.deepcopy(unet)), call)
    base = set_base_precision(unet, asked, mixed, "cpu")
    output = call(base)
    assert base is unet and not output.requires_grad
    student = student_of(base)
    assert torch.equal(call(student), output)
    kinds = {"no"} if asked == "no" else {asked or mixed, mixed}
    assert error(output, expected) <= max(ERRORS[kind] for kind in kinds)
    found = gradient(student, call)
    assert torch.cosine_similarity(found, expected_gradient, dim=0) >= min(COSINES[kind] for kind in kinds)
    assert found.dtype == torch.float32
    assert all(weight.grad is None for weight in student.parameters() if not weight.requires_grad)


@pytest.mark.parametrize("asked, mixed", ALL)
def test_dtypes_of_the_base(asked, mixed):
    base = set_base_precision(case()[0], asked, mixed, "cpu")
    rest = torch.float32 if asked == "no" else HALVES.get(mixed, torch.float32)
    for name, layer in base.named_modules():
        full = name == "conv_in" or "time_embedding" in name or "add_embedding" in name
        if isinstance(layer, PackedLinear):
            assert type(layer) is KINDS[asked] and not full
            assert layer.weight.dtype in (torch.int8, torch.uint8) and layer.scale.dtype == torch.float32
        else:
            assert asked not in KINDS or full or not isinstance(layer, nn.Linear), name
            dtypes = {weight.dtype for weight in layer.parameters(recurse=False)}
            assert dtypes <= {torch.float32 if full else rest}, name


def test_int8_is_the_nearest_of_255_values_per_output():
    linear = nn.Linear(33, 5)
    with torch.no_grad():
        linear.weight[2] = 0
    layer = Int8Linear(linear, "cpu")
    steps = linear.weight.detach().double().abs().amax(dim=1, keepdim=True) / 127
    distance = (layer.unpacked(torch.float32).double() - linear.weight.detach().double()).abs()
    assert (distance <= steps * (0.5 + 1e-5)).all() and (distance > 0.4 * steps).any()
    assert layer.weight.abs().amax(dim=1).tolist() == [127, 127, 0, 127, 127]


def test_nf4_rounds_blocks_of_64_weights_to_its_sixteen_values():
    library = pytest.importorskip("bitsandbytes").functional
    linear = nn.Linear(96, 6)
    layer = NF4Linear(linear, "cpu")
    code = library.get_4bit_type("nf4", device="cpu")
    blocks = linear.weight.detach().reshape(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / scales)[..., None].sub(code).abs().argmin(dim=-1)
    torch.testing.assert_close(layer.unpacked(torch.float32), (code[nearest] * scales).reshape(6, 96))
    assert layer.weight.numel() == 6 * 96 / 2 and layer.scale.numel() == 6 * 96 / BLOCK


@pytest.mark.parametrize("asked", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_has_the_gradient_of_its_unpacked_weight_and_keeps_no_such_weight(asked, bias):
    layer = KINDS[asked](nn.Linear(32, 16, bias=bias).requires_grad_(False), "cpu")
    x, seed = torch.randn(2, 3, 32, requires_grad=True), torch.randn(2, 3, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda value: value):
        found = layer(x)
    assert kept == []
    expected = nn.functional.linear(x, layer.unpacked(torch.float32), layer.bias)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(output, x, seed)[0] for output in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("asked", KINDS)
@pytest.mark.parametrize("dtype", HALVES.values())
def test_the_layer_follows_autocast(asked, dtype):
    layer = KINDS[asked](nn.Linear(64, 16).requires_grad_(False), "cpu")
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype):
        assert layer(x).dtype == dtype
    assert layer(x).dtype == torch.float32 and layer(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("asked", KINDS)
def test_gradient_checkpointing_changes_no_gradient(asked):
    unet, call = case()
    student = student_of(set_base_precision(unet, asked, "bf16", "cpu")).train()
    expected = gradient(student, call)
    student.zero_grad()
    student.enable_gradient_checkpointing()
    assert torch.equal(gradient(student, call), expected)


@pytest.mark.parametrize("asked, share", [("bf16", 1 / 2), ("int8", 1 / 4), ("nf4", 1 / 8)])
def test_the_weights_of_a_linear_layer_take_that_share_of_float32(asked, share):
    base = set_base_precision(nn.Sequential(nn.Linear(1024, 256, bias=False)), asked, "bf16", "cpu")
    size = sum(weight.untyped_storage().nbytes() for weight in base.parameters())
    assert share <= size / (4 * 1024 * 256) <= share * 1.13  # NF4 has a float32 scale per 32 bytes


@pytest.mark.parametrize("asked", ["bf16", "int8", "nf4"])
def test_teacher_student_and_target_share_one_set_of_base_weights(asked):
    base = set_base_precision(case()[0], asked, "bf16", "cpu")
    student = student_of(base)
    target = copied(student)
    places = {weight.data_ptr() for network in (base, student, target) for weight in network.state_dict().values()}
    assert len(places) == len(base.state_dict()) + 2 * len(trained_weights(student))


@pytest.mark.parametrize("asked", KINDS)
def test_moving_the_student_moves_no_weight_away_from_its_base(asked):
    unet, call = case()
    base = set_base_precision(unet, asked, "bf16", "cpu")
    student = student_of(base)
    before, places = call(student), [weight.data_ptr() for weight in base.parameters()]
    student.to("cpu")
    assert [weight.data_ptr() for weight in base.parameters()] == places and torch.equal(call(student), before)


@pytest.mark.parametrize("asked", KINDS)
def test_states_averages_and_files_hold_the_adapter_alone(asked, tmp_path):
    pipe, plain = PIPELINES["sdxl"](), PIPELINES["sdxl"]()
    student = pipe.unet = student_of(set_base_precision(with_conditions(pipe.unet), asked, "bf16", "cpu"))
    average = EMA(student, [ConstantDecay(0.5)])
    (shadow,) = average.shadows.values()
    start = {name: value.clone() for name, value in changing_state(student, student).items()}
    assert start.keys() == shadow.keys() == trained_weights(student).keys()
    with torch.no_grad():
        for weight in trained_weights(student).values():
            weight += 1
    average.update(1, 1)
    for name, value in shadow.items():
        torch.testing.assert_close(value, start[name] + 0.5)
    save_lora(pipe, tmp_path)
    plain.load_lora_weights(tmp_path)
    found = {name: value for name, value in plain.unet.state_dict().items() if "lora_" in name}
    assert {name.replace("default_0", "default") for name in found} == start.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, start[name.replace("default_0", "default")] + 1)
        assert value.dtype == torch.float32
    load_changing_state(student, student, start)
    assert all(torch.equal(value, start[name]) for name, value in changing_state(student, student).items())


@pytest.mark.parametrize("asked", KINDS)
def test_the_full_state_gives_a_plain_network_the_outputs_of_the_packed_one(asked):
    unet, call = case()
    plain = copy.deepcopy(unet)
    base = set_base_precision(unet, asked, "no", "cpu")
    plain.load_state_dict(full_state(base))
    torch.testing.assert_close(call(plain), call(base), rtol=1e-4, atol=1e-5)
    student = student_of(base)
    names = {name.replace(".base_layer.", ".") for name in full_state(student) if "lora_" not in name}
    assert names == plain.state_dict().keys()


@pytest.mark.parametrize("asked", ["bf16", "int8"])
def test_neighbouring_noise_levels_stay_apart_in_the_time_embedding(asked):
    """`keep_time_embedding_in_float32` disables autocast there, so that its weights must be float32."""
    base = build_unet("tiny", (8, 8), 1)
    plain, times, seen = copy.deepcopy(base), torch.tensor([500.0, 500.01]), []
    student = student_of(set_base_precision(base, asked, "bf16", "cpu"))
    keep_time_embedding_in_float32(student)
    for network in (student, plain):
        network.time_embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for network in (student, plain):
        with cast_calls(network):
            network(torch.randn(2, 1, 8, 8), times)
    assert isinstance(student, UNet2DModel) and not torch.equal(*seen[0])
    assert torch.equal(*seen)


@pytest.mark.parametrize("asked, mixed", [("bf16", "no"), ("fp16", "no"), ("fp16", "bf16"), ("bf16", "fp16")])
def test_weights_of_16_bits_need_inputs_of_their_type(asked, mixed):
    with pytest.raises(
        ValueError, match=f"base_precision '{asked}' needs .* '{mixed}'. Give --mixed_precision {asked}"
    ):
        set_base_precision(nn.Linear(2, 2), asked, mixed, "cpu")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def fails(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(ValueError, match=r"nf4 needs another package. Run: pip install 'cm-diffusers\[nf4\]'"):
        set_base_precision(nn.Sequential(nn.Linear(2, 2)), "nf4", "no", "cpu")

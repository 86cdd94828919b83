"""Adapters: teacher and student in one network, and files that diffusers loads."""

import copy

import pytest
import torch
from diffusers import UNet2DModel

from cm_diffusers.core.conditions import Condition, call_network
from cm_diffusers.engine.saved.lora import Base, adapter_off, add_lora, lora_state, save_lora, trained_weights
from cm_diffusers.models import build_unet
from cm_diffusers.models.text_unet import with_conditions
from tests.helpers.stock_text_pipelines import TEXT_TO_IMAGE, WIDTH


def perturbed(network):
    """Move the adapter's weights, as training would."""
    generator = torch.Generator().manual_seed(1)
    for weight in trained_weights(network).values():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return network


def text_case():
    unet = with_conditions(TEXT_TO_IMAGE["sd"]()[0].unet)
    condition = Condition({"text": torch.randn(2, 3, WIDTH)})
    x, time = torch.ones(2, 4, 4, 4), torch.ones(2)
    return unet, lambda network: call_network(network, x, time, condition=condition).sample


def plain_case():
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(8, block_out_channels=(32, 64), norm_num_groups=8, **blocks)
    return unet, lambda network: network(torch.ones(2, 3, 8, 8), torch.ones(2)).sample


@pytest.mark.parametrize("case", [text_case, plain_case])
def test_without_its_adapter_a_network_is_its_base_to_the_bit(case):
    network, call = case()
    network.eval()
    before, count = call(network), sum(1 for _ in network.parameters())
    add_lora(network, rank=4, alpha=8)
    assert torch.equal(call(network), before)  # a new adapter changes nothing
    perturbed(network)
    student = call(network)
    assert not torch.allclose(student, before, atol=1e-4) and student.requires_grad
    with adapter_off(network):
        assert torch.equal(call(network), before)
    teacher = call(Base(network))
    assert torch.equal(teacher, before) and not teacher.requires_grad
    assert torch.equal(call(network), student)
    assert 0 < len(trained_weights(network)) == sum(1 for _ in network.parameters()) - count
    assert all("lora" in name for name in trained_weights(network))


def test_the_teacher_s_call_between_a_student_s_pass_and_its_gradient_changes_no_gradient():
    network, call = text_case()
    perturbed(add_lora(network.eval(), rank=4))
    gradients = []
    for between in (False, True):
        network.zero_grad()
        loss = call(network).square().mean()
        if between:
            call(Base(network))
        loss.backward()
        gradients.append([weight.grad.clone() for weight in trained_weights(network).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and gradients[0][0].abs().max() > 0


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("alpha", [None, 16.0])
def test_diffusers_loads_the_file_with_its_scale(tmp_path, kind, alpha):
    trained, inputs = TEXT_TO_IMAGE[kind]()
    base = copy.deepcopy(trained)
    perturbed(add_lora(trained.unet, rank=4, alpha=alpha))
    save_lora(trained, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    images = []
    for pipe in (trained, base):
        if pipe is base:
            base.load_lora_weights(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(**inputs, num_inference_steps=2, output_type="latent", generator=generator).images)
    torch.testing.assert_close(*images, rtol=0, atol=1e-6)


def test_weights_of_the_adapter_are_float32_on_a_base_in_16_bits():
    network, _ = text_case()
    add_lora(network.to(torch.bfloat16), rank=2)
    assert {weight.dtype for weight in trained_weights(network).values()} == {torch.float32}
    assert {value.dtype for value in lora_state(network).values()} == {torch.float32}


def test_what_has_no_adapter_says_so():
    network, _ = text_case()
    with pytest.raises(ValueError, match="modules to_x: no layer has such a name. There are .*to_out.0, .*to_q"):
        add_lora(network, rank=2, target_modules=["to_q", "to_x"])
    add_lora(network, rank=2)
    with pytest.raises(ValueError, match="has an adapter already: default. .* pipe.fuse_lora"):
        add_lora(network, rank=2)
    with pytest.raises(ValueError, match="no layer has such a name"):
        add_lora(build_unet("tiny", (8, 8), 1), rank=2, target_modules=["nothing"])

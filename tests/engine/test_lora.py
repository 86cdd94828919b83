"""Adapters: teacher and student with one set of base weights, and files that diffusers loads."""

import copy

import pytest
import torch
from diffusers import UNet2DModel

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
from cm_diffusers.core.conditions import Condition, call_network
from cm_diffusers.core.frozen import changing_state, copied, load_changing_state
from cm_diffusers.engine.saved.lora import (
    add_lora,
    fuse_passes,
    fused_state,
    has_lora,
    lora_state,
    save_lora,
    trained_weights,
)
from cm_diffusers.models import JVPUNet2DModel, build_unet
from cm_diffusers.models.text_unet import with_conditions
from tests.helpers.stock_text_pipelines import TEXT_TO_IMAGE, WIDTH
from tests.helpers.training_runs import run, tensors


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
def test_without_its_adapter_a_student_is_its_teacher_to_the_bit(case):
    teacher, call = case()
    teacher.eval().requires_grad_(False)
    before = call(teacher)
    student = add_lora(copied(teacher), rank=4, alpha=8)
    assert has_lora(student) and not has_lora(teacher)
    assert torch.equal(call(student), before)  # a new adapter changes nothing
    perturbed(student)
    after = call(student)
    assert not torch.allclose(after, before, atol=1e-4) and after.requires_grad
    assert torch.equal(call(teacher), before)
    if hasattr(student, "disable_adapters"):
        student.disable_adapters()
        assert torch.equal(call(student), before)


@pytest.mark.parametrize("case", [text_case, plain_case])
def test_a_student_its_average_and_its_target_share_one_set_of_base_weights(case):
    teacher, _ = case()
    teacher.requires_grad_(False)
    student = add_lora(copied(teacher), rank=2)
    target = copied(student)
    places = {weight.data_ptr() for module in (teacher, student, target) for weight in module.parameters()}
    base, adapter = sum(1 for _ in teacher.parameters()), len(trained_weights(student))
    assert len(places) == base + 2 * adapter and adapter > 0
    assert changing_state(student, student).keys() == trained_weights(student).keys()
    assert changing_state(target, student).keys() == trained_weights(student).keys()
    other = torch.nn.Linear(2, 2)
    assert changing_state(other, student).keys() == {"weight", "bias"}


def test_the_state_of_a_student_comes_back_and_no_other_state_does():
    student = add_lora(text_case()[0].requires_grad_(False), rank=2)
    state = {name: value.clone() for name, value in changing_state(student, student).items()}
    perturbed(student)
    load_changing_state(student, student, state)
    assert all(torch.equal(value, state[name]) for name, value in trained_weights(student).items())
    first, *_ = state
    with pytest.raises(RuntimeError, match="lacks"):
        load_changing_state(student, student, {name: value for name, value in state.items() if name != first})
    with pytest.raises(RuntimeError, match="unknown entries .*nothing"):
        load_changing_state(student, student, state | {"nothing": torch.ones(1)})


@pytest.mark.parametrize("case", [text_case, plain_case])
def test_the_fused_network_has_the_outputs_of_the_student(case):
    teacher, call = case()
    plain = copy.deepcopy(teacher)
    student = perturbed(add_lora(copied(teacher.requires_grad_(False)), rank=4, alpha=8))
    expected, before = call(student), call(teacher)
    plain.load_state_dict(fused_state(student, trained_weights(student)))
    torch.testing.assert_close(call(plain), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(call(teacher), before) and torch.equal(call(student), expected)


@pytest.mark.parametrize("case", [text_case, plain_case])
def test_passes_with_one_product_per_layer_have_the_same_outputs(case):
    teacher, call = case()
    student = add_lora(copied(teacher.requires_grad_(False)), rank=4, alpha=8)
    target = copied(student).requires_grad_(False)
    fuse_passes(target)
    assert torch.equal(call(target), call(student))  # a new adapter
    for network in (student, target):
        for weight in network.parameters():
            weight.requires_grad_(weight.data_ptr() not in {other.data_ptr() for other in teacher.parameters()})
        perturbed(network)
    expected = call(student)
    assert not torch.allclose(expected, call(teacher), atol=1e-3)
    torch.testing.assert_close(call(target), expected, rtol=1e-4, atol=1e-5)


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


def test_a_pipeline_whose_network_has_an_adapter_is_not_saved_in_a_layout_that_nobody_loads(tmp_path):
    unet = add_lora(build_unet("tiny", (8, 8), 1), rank=2, target_modules=["to_q"])
    pipe = ConsistencyPipeline(unet, MultistepConsistencyScheduler())
    with pytest.raises(ValueError, match="unet of this pipeline has adapters: default. Make them a part of the wei"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_of_images_is_trained_by_a_lora_and_saved_with_it_fused(tmp_path):
    teacher = run(tmp_path / "teacher", "diffusion", max_train_steps=2, model_preset="jvp_tiny", time_label="angle")
    taught = {"pretrained_teacher_model": teacher / "pipeline", "lora_rank": 2, "learning_rate": 1e-2}
    folder = run(tmp_path / "student", "cd", max_train_steps=4, num_scales=8, **taught)
    groups = {name for group, name in tensors(folder) if group in ("model", "auxiliary.target")}
    assert groups and all("lora" in name for name in groups)
    states = [JVPUNet2DModel.from_pretrained(path / "pipeline" / "unet").state_dict() for path in (teacher, folder)]
    assert states[0].keys() == states[1].keys()
    changed = {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}
    assert changed and all(name.endswith("weight") for name in changed)
    with pytest.raises(ValueError, match="lora_rank can't be used, because ctm adds an input to the network"):
        run(tmp_path / "ctm", "ctm", lora_rank=2, pretrained_teacher_model=teacher / "pipeline")
    with pytest.raises(ValueError, match="lora_rank can't be used, because a new network has no base"):
        run(tmp_path / "new", "ect", lora_rank=2)

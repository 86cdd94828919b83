"""What only a GPU shows: `pytest -m gpu tests/gpu`, or benchmarks/on_gpu.sh. Without a GPU all of it is skipped."""

import subprocess

import pytest
import torch
import torch.nn.functional as F

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
from cm_diffusers.core.draws import Draws
from cm_diffusers.models import build_unet
from cm_diffusers.models.keyed_dropout import KeyedDropout
from cm_diffusers.objectives import ECT, Batch, ModelSpec
from tests.helpers.scripts import PYTHON
from tests.helpers.training_runs import differences, flags


DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("batch", [3, 64])
def test_masks_of_dropout_are_those_of_the_cpu_and_of_a_compiled_layer(batch):
    layer, keys = KeyedDropout(0.3, layer=2), Draws(0, 1, range(batch)).keys("dropout")
    x = torch.ones(batch, 16, 8, 8)
    expected = layer(x, keys) != 0
    assert 0.6 < expected.float().mean() < 0.8
    for call in (layer, torch.compile(layer)):
        assert torch.equal((call(x.to(DEVICE), keys.to(DEVICE)) != 0).cpu(), expected)


def test_a_compiled_network_drops_what_the_network_drops():
    torch.manual_seed(0)
    network = build_unet("ddpmpp_tiny", (16, 16), 3, dropout=0.3).to(DEVICE).train()
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    x, t, compiled = torch.randn(8, 3, 16, 16, device=DEVICE), torch.rand(8, device=DEVICE), torch.compile(network)

    def output(call, step):
        network.key_dropout(Draws(0, step, range(8), DEVICE).keys("dropout"))
        return call(x, t).sample.detach()

    plain, same, other = output(network, 0), output(compiled, 0), output(compiled, 1)
    assert (same - plain).norm() < 0.01 * (other - plain).norm()


@pytest.mark.parametrize("dtype, error", [(torch.float16, 0.01), (torch.bfloat16, 0.05)], ids=["fp16", "bf16"])
@pytest.mark.parametrize("preset", ["small", "jvp_small", "ddpmpp_tiny"])
def test_sixteen_bits_give_the_loss_and_the_gradient_of_float32(preset, dtype, error, monkeypatch):
    """In the pretraining of ECT, whose target is the data. The relative errors are below 1 % in fp16, 5 % in bf16."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    network = build_unet(preset, (16, 16), 3).to(DEVICE)
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    method = ECT(network, ModelSpec(0.5), ECT.Options(pretrain_steps=100), 100)
    images = F.interpolate(torch.randn(16, 3, 4, 4, device=DEVICE), 16, mode="bicubic").clamp(-1, 1)
    losses, gradients = [], []
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, dtype, enabled=enabled):
            loss = method.loss(Batch(images), Draws(0, 0, range(16), DEVICE)).total
        scale = 256.0 if enabled else 1.0
        found = torch.autograd.grad(loss * scale, list(network.parameters()), allow_unused=True)
        gradients.append(torch.cat([part.flatten().double() / scale for part in found if part is not None]))
        losses.append(loss.double())
    exact, other = gradients
    assert (other - exact).norm() < error * exact.norm() and abs(losses[1] / losses[0] - 1) < error
    assert not torch.equal(*gradients)


def test_a_resumed_run_repeats_the_weights_bit_for_bit_with_deterministic(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = {"deterministic": True, "dropout": 0.1, "max_train_samples": 64, "checkpointing_steps": 3}
    for folder, steps in ((whole, 6), (parts, 3), (parts, 6)):  # in processes of their own, for cuBLAS
        words = flags(folder, "ect", max_train_steps=steps, **given)
        done = subprocess.run([*PYTHON, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "Resumed from step 3 of 6" in done.stdout
    assert differences(whole, parts) == []


def test_draws_are_those_of_the_cpu():
    ours, cpu = (Draws(3, 5, range(7, 71), device) for device in (DEVICE, "cpu"))
    assert torch.equal(ours.keys("dropout").cpu(), cpu.keys("dropout"))
    for shape in ((), (3, 16, 16)):
        assert torch.equal(ours.uniform("u", shape).cpu(), cpu.uniform("u", shape))
        assert torch.equal(ours.normal("n", shape).cpu(), cpu.normal("n", shape))
    assert torch.equal(torch.as_tensor(ours.shared("s")).cpu(), torch.as_tensor(cpu.shared("s")).cpu())


def test_a_pipeline_whose_networks_wait_on_the_cpu_gives_the_same_images():
    torch.manual_seed(0)
    network = build_unet("ddpmpp_tiny", (16, 16), 3)
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    images = []
    for offload in (False, True):
        pipeline = ConsistencyPipeline(network, MultistepConsistencyScheduler(sigma_min=0.0))
        pipeline.set_progress_bar_config(disable=True)
        if offload:
            pipeline.to("cpu")
            pipeline.enable_model_cpu_offload(device=DEVICE)
        else:
            pipeline.to(DEVICE)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(batch_size=4, num_inference_steps=2, generator=generator, output_type="pt").images)
        if offload:
            pipeline.maybe_free_model_hooks()
            assert next(network.parameters()).device.type == "cpu"
    assert torch.equal(images[0].cpu(), images[1].cpu()) and images[0].std() > 0

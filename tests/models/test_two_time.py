import copy
import importlib
import inspect
import json
import math

import pytest
import torch
from diffusers import UNet2DModel
from torch.func import jvp

from cm_diffusers.core import counter_hash
from cm_diffusers.models import (
    JVPUNet2DModel,
    TwoTimeModel,
    build_unet,
    fused,
    jvp_unet,
    keep_time_embedding_in_float32,
    keyed_dropout,
    two_time,
)
from cm_diffusers.models.two_time import TargetTimeEmbedding, _class_named
from cm_diffusers.pipelines.travel import bundle


PRESETS = ("jvp_tiny", "tiny")


def randomise(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def a_network(preset="jvp_tiny", size=(8, 12), **config):
    torch.manual_seed(0)
    return randomise(build_unet(preset, size, 1, 5, **config)).eval()


def trained(preset="jvp_tiny", **config):
    """A model whose second-time branch is nonzero, as after training."""
    model = TwoTimeModel.from_network(a_network(preset, **config))
    randomise(model.target_time_embedding, 1)
    return model


def inputs(dtype=torch.float32):
    torch.manual_seed(2)
    x, t, s = torch.randn(3, 1, 8, 12), math.pi / 2 * torch.rand(3), math.pi / 2 * torch.rand(3)
    return x.to(dtype), t.to(dtype), s.to(dtype), torch.tensor([0, 4, 2])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_at_the_start_it_is_the_wrapped_network_for_any_second_time(preset, autocast):
    network = a_network(preset)
    model = TwoTimeModel.from_network(network)
    x, t, s, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = network(x, t, labels).sample
        for second in (None, 0.0, 1, 0.7, s, s[:1], s[0], 1e4 * s):
            output = model(x, t, second, labels)
            assert torch.equal(output.sample, expected) and output.log_variance is None
        assert torch.equal(model(x, t, s, labels, return_dict=False)[0], expected)
        assert torch.equal(model(x, 0.25, s, labels).sample, network(x, torch.tensor(0.25), labels).sample)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_it_then_reads_the_second_time(preset):
    model, (x, t, s, labels) = trained(preset), inputs()
    reference = model(x, t, s, labels).sample
    assert (model(x, t, s + 0.1, labels).sample - reference).abs().amax((1, 2, 3)).min() > 1e-4
    assert (model(x, t + 1, s, labels).sample - reference).abs().amax((1, 2, 3)).min() > 1e-4
    # a call leaves no state behind, even if it fails
    with pytest.raises(ValueError):
        model(x, t, s)
    assert torch.equal(model(x, t, None, labels).sample, a_network(preset)(x, t, labels).sample)


def test_from_network_takes_a_copy():
    network = a_network().double().requires_grad_(False)
    model = TwoTimeModel.from_network(network)
    assert not model.training and model.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(torch.equal(network.state_dict()[k], v) for k, v in model.network.state_dict().items())
    assert not any(p.requires_grad for p in model.network.parameters())
    assert all(p.requires_grad for p in model.target_time_embedding.parameters())
    assert not network.time_embedding._forward_hooks
    randomise(model)
    assert not torch.equal(model.network.conv_in.weight, network.conv_in.weight)


@pytest.mark.parametrize("preset", PRESETS)
def test_state_dict_has_the_keys_of_the_network(preset):
    network = a_network(preset)
    branch = [f"target_time_embedding.linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")]
    expected = ["network." + key for key in network.state_dict()] + branch
    assert list(TwoTimeModel.from_network(network).state_dict()) == expected


@pytest.mark.parametrize("preset, cls", [("jvp_tiny", JVPUNet2DModel), ("tiny", UNet2DModel)])
@torch.no_grad()
def test_a_saved_model_is_the_same_model(tmp_path, preset, cls):
    model = trained(preset)
    model.save_pretrained(tmp_path)
    again = TwoTimeModel.from_pretrained(tmp_path)
    rebuilt = TwoTimeModel.from_config(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    x, t, s, labels = inputs()
    for other in (again, rebuilt, copy.deepcopy(model)):
        assert type(other.network) is cls
        assert list(other.state_dict()) == list(model.state_dict())
        assert torch.equal(other(x, t, s, labels).sample, model(x, t, s, labels).sample)
        assert (other.config.in_channels, other.config.num_class_embeds) == (1, 5)
        assert tuple(other.config.sample_size) == (8, 12) and other.config.network_class == cls.__name__
        configs = [json.loads(m.to_json_string()) for m in (other, model)]
        assert configs[0] | {"_name_or_path": 0} == configs[1] | {"_name_or_path": 0}


def test_config_of_the_model_wins_over_that_of_the_network():
    """The engine registers a new dropout with the model that it trains."""
    model = trained()
    model.register_to_config(dropout=0.3)
    again = TwoTimeModel.from_config(model.config)
    assert again.config.dropout == again.network.config.dropout == again.network.mid_blocks[0].drop.p == 0.3
    assert again.config.network_config["dropout"] == 0.3


@torch.no_grad()
def test_a_copy_has_a_branch_of_its_own():
    model, (x, t, s, labels) = trained(), inputs()
    expected = model(x, t, s, labels).sample
    other = copy.deepcopy(model)
    randomise(model.target_time_embedding, 5)
    assert torch.equal(other(x, t, s, labels).sample, expected)
    assert not torch.equal(model(x, t, s, labels).sample, expected)
    # without the wrapper, the network has no second time
    assert torch.equal(copy.deepcopy(model.network)(x, t, labels).sample, a_network()(x, t, labels).sample)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_jvp_in_all_three_is_the_derivative(train, checkpointing):
    model = trained(dropout=0.3).double().train(train)
    model.add_log_variance_head()
    randomise(model.network.log_variance_head)
    model.key_dropout(torch.tensor([3, 1, 2]))
    if checkpointing:
        model.enable_gradient_checkpointing()
    x, t, s, labels = inputs(torch.float64)

    def call(*arguments):
        return model(*arguments, labels, return_dict=False)

    for given in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        tangents = tuple(i * torch.randn_like(value) for i, value in zip(given, (x, t, s)))
        primals, derivatives = jvp(call, (x, t, s), tangents)
        h = 1e-5
        with torch.no_grad():
            plus, minus = (call(*(a + d * b for a, b in zip((x, t, s), tangents))) for d in (h, -h))
            torch.testing.assert_close(primals, call(x, t, s), rtol=1e-12, atol=1e-12)
        for i in range(2 if any(given[1:]) else 1):
            expected = (plus[i] - minus[i]) / (2 * h)
            assert (derivatives[i] - expected).norm() < 1e-6 * expected.norm()


def test_jvp_of_a_stock_network_without_attention():
    network = UNet2DModel(8, 1, 1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                          block_out_channels=(16,), norm_num_groups=8, add_attention=False)  # fmt: skip
    model = randomise(TwoTimeModel.from_network(network)).double()
    x, _, s, _ = inputs(torch.float64)
    dx, ds = torch.randn_like(x), torch.randn_like(s)
    derivative = jvp(lambda x, s: model(x, 0.5, s).sample, (x, s), (dx, ds))[1]
    h = 1e-5
    expected = (model(x + h * dx, 0.5, s + h * ds).sample - model(x - h * dx, 0.5, s - h * ds).sample) / (2 * h)
    assert (derivative - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_gets_the_same_gradient_with_checkpointing(preset):
    gradients = []
    for checkpointing in (False, True):
        model = trained(preset).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == checkpointing
        x, t, s, labels = inputs()
        model(x, t, s, labels).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        if preset == "jvp_tiny":
            assert all(gradient.any() for gradient in gradients[-1])
    torch.testing.assert_close(*gradients)


def test_the_zero_layer_learns_first():
    model, (x, t, s, labels) = TwoTimeModel.from_network(a_network()), inputs()
    model(x, t, s, labels).sample.square().sum().backward()
    assert model.target_time_embedding.linear_2.weight.grad.any()
    assert not model.target_time_embedding.linear_1.weight.grad.any()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cast", [False, True])
@torch.no_grad()
def test_second_time_stays_in_float32_under_autocast_and_in_bfloat16(preset, cast):
    model, (x, t, _, labels) = trained(preset), inputs()
    keep_time_embedding_in_float32(model)
    near = torch.tensor([0.5, 0.5001, 0.5002])  # equal in bfloat16
    if cast:
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=not cast):
        embedding = model.target_time_embedding(near)
        output = model(x, t, near, labels)
    assert embedding.dtype == torch.float32 and len(embedding[:, 0].unique()) == 3
    assert output.sample.dtype == torch.bfloat16
    if not cast:
        seen = []
        model.network.time_embedding.register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.autocast("cpu", torch.bfloat16):
            model(x, t[:1], near, labels)
        assert seen[0].dtype == torch.float32 and len(seen[0][:, 0].unique()) == 3


def test_float64_goes_through_nothing_less():
    model, (x, t, s, labels) = trained().double(), inputs(torch.float64)
    with torch.no_grad():
        change = model(x, t, s + 1e-12, labels).sample - model(x, t, s, labels).sample
        assert 0 < change.abs().max() < 1e-9
        number = torch.tensor(0.1, dtype=torch.float64)
        assert torch.equal(model(x, 0.1, 0.1, labels).sample, model(x, number, number, labels).sample)


def test_second_time_changes_slowly():
    for scale in (1.0, 1 / 250):
        branch = TargetTimeEmbedding(64, scale)
        assert branch.linear_1.in_features == 16
        time = torch.linspace(0, 1.5, 20, dtype=torch.float64)
        embedding, derivative = jvp(randomise(branch).double(), (time,), (torch.ones_like(time),))
        torch.nn.init.zeros_(branch.linear_2.weight)
        assert embedding.shape == (20, 64) and not branch(time)[1:].sub(branch(time)[0]).any()
        assert derivative.abs().max() <= scale * 64 * 16


@pytest.mark.parametrize("preset", ["jvp_tiny", pytest.param("tiny", marks=pytest.mark.slow)])
def test_compiles_in_one_piece(preset):
    model, (x, t, s, labels) = trained(preset), inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, s, labels).sample, model(x, t, s, labels).sample)


def test_what_the_network_has_is_passed_on(tmp_path):
    model, (x, t, s, labels) = trained(dropout=0.5).train(), inputs()
    model.key_dropout(torch.tensor([1, 2, 3]))
    assert torch.equal(model(x, t, s, labels).sample, model(x, t, s, labels).sample)
    model.key_dropout(None)
    assert not torch.equal(model(x, t, s, labels).sample, model(x, t, s, labels).sample)
    model.eval().add_log_variance_head()
    assert model.config.log_variance is True
    randomise(model.network.log_variance_head)
    expected = model(x, t, s, labels)
    assert expected.log_variance.shape == (3,) and len(model(x, t, s, labels, return_dict=False)) == 2
    assert not torch.equal(model(x, t, s + 1, labels).log_variance, expected.log_variance)
    for name, has in (("with", True), ("without", False)):
        if not has:
            model.remove_log_variance_head()
        model.save_pretrained(tmp_path / name)
        again = TwoTimeModel.from_pretrained(tmp_path / name)
        output = again(x, t, s, labels)
        assert again.config.log_variance is has
        torch.testing.assert_close(output.sample, expected.sample)  # addresses of weights can change sums
        if has:
            torch.testing.assert_close(output.log_variance, expected.log_variance)
        else:
            assert output.log_variance is None


def test_what_the_network_lacks_is_lacking():
    model = trained("tiny")
    assert not hasattr(model, "key_dropout") and hasattr(trained(), "key_dropout")
    assert model.config.log_variance is None
    with pytest.raises(AttributeError, match="add_log_variance_head"):
        model.add_log_variance_head()


@torch.no_grad()
def test_the_files_in_one_stand_alone(tmp_path, monkeypatch):
    """The bundle is made as for a saved model's folder."""
    files = (counter_hash, fused, keyed_dropout, jvp_unet, two_time)
    sources = {module.__name__: inspect.getsource(module) for module in files}
    (tmp_path / "exported_networks.py").write_text(bundle(sources, "networks", "0"))
    monkeypatch.syspath_prepend(tmp_path)
    exported = importlib.import_module("exported_networks")
    model, (x, t, s, labels) = trained(), inputs()
    model.save_pretrained(tmp_path / "model")
    again = exported.TwoTimeModel.from_pretrained(tmp_path / "model")
    assert type(again.network) is exported.JVPUNet2DModel is not JVPUNet2DModel
    assert torch.equal(again(x, t, s, labels).sample, model(x, t, s, labels).sample)
    assert type(trained().network) is type(TwoTimeModel().network) is JVPUNet2DModel


def test_classes_are_found_by_name():
    assert _class_named("UNet2DModel", "") is UNet2DModel
    assert _class_named("JVPUNet2DModel", TwoTimeModel.__module__) is JVPUNet2DModel
    for name in ("Nothing", "utils", "DDPMScheduler"):
        with pytest.raises(ValueError, match=f"{name!r} is neither"):
            TwoTimeModel(name)

import copy
import math

import pytest
import torch
from torch.func import jvp

from cm_diffusers.models import UNET_PRESETS, JVPUNet2DModel, build_unet, keep_time_embedding_in_float32
from cm_diffusers.models.jvp_unet import TimeFeatures, pixel_norm
from cm_diffusers.models.keyed_dropout import KeyedDropout


KINDS = ("positional", "fourier")


def randomised(seed=0, **config):
    """A small network in which no weight is zero."""
    torch.manual_seed(seed)
    shape = {"sample_size": (8, 12), "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32)}
    network = JVPUNet2DModel(**(shape | {"layers_per_block": 1} | config))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def inputs(dtype=torch.float32, batch=3, channels=4, size=(8, 12)):
    torch.manual_seed(1)
    x, t = torch.randn(batch, channels, *size), torch.rand(batch) * math.pi / 2
    return tuple(value.to(dtype) for value in (x, t, torch.randn_like(x), torch.randn_like(t)))


def sample_jvp(network, dtype=torch.float64):
    """The output and its derivative along random tangents."""
    x, t, dx, dt = inputs(dtype)
    return jvp(lambda x, t: network(x, t).sample, (x, t), (dx, dt))


def relative(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (2, 2)])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("classes", [None, 10])
def test_output_has_the_shape_of_the_input(size, channels, classes):
    network = build_unet("jvp_tiny", size, channels, classes)
    labels = torch.tensor([3, 9]) if classes else None
    x = torch.randn(2, channels, *size)
    for t in (torch.tensor([0.0, 1.5]), torch.tensor(0.3), torch.tensor([0.3]), 0.3, 1):
        output = network(x, t, class_labels=labels)
        assert output.sample.shape == x.shape and output.log_variance is None
    assert network.config.sample_size == (size[0] if size[0] == size[1] else size)
    assert (network.config.in_channels, network.config.num_class_embeds) == (channels, classes)


@pytest.mark.parametrize("name", ["tiny", "small", "base", "cifar10"])
def test_presets_are_no_larger_than_those_of_the_stock_network(name):
    assert UNET_PRESETS["jvp_" + name] == UNET_PRESETS[name]
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in build_unet(n, (64, 64), 3).parameters()) for n in (name, "jvp_" + name)]
    assert 0.8 < sizes[1] / sizes[0] < 1.05


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_jvp_is_the_derivative(kind, train, checkpointing):
    network = randomised(dropout=0.3, num_class_embeds=5, time_embedding_type=kind, log_variance=True)
    network.double().train(train).key_dropout(torch.tensor([1, 2, 3]))
    if checkpointing:
        network.enable_gradient_checkpointing()
    x, t, dx, dt = inputs(torch.float64)

    def call(x, t):
        return network(x, t, torch.tensor([4, 0, 2]), return_dict=False)

    for tangents in ((dx, dt), (dx, 0 * dt), (0 * dx, dt)):
        primals, derivatives = jvp(call, (x, t), tangents)
        h = 1e-5
        with torch.no_grad():
            plus, minus = (call(x + sign * h * tangents[0], t + sign * h * tangents[1]) for sign in (1, -1))
            exact = call(x, t)
        torch.testing.assert_close(primals, exact, rtol=1e-12, atol=1e-12)
        for i in (0, 1):
            if i == 0 or tangents[1].any():
                assert relative(derivatives[i], (plus[i] - minus[i]) / (2 * h)) < 1e-6
        assert derivatives[0].norm() > 1e-3


def test_a_jvp_can_be_followed_by_a_backward_pass_with_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        network = randomised().double()
        if checkpointing:
            network.enable_gradient_checkpointing()
        primal, tangent = sample_jvp(network)
        (primal - tangent.detach()).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*gradients)


def test_jvp_in_float32_is_near_that_in_float64():
    network = randomised()
    derivatives = []
    for dtype in (torch.float32, torch.float64):
        derivatives.append(sample_jvp(network.to(dtype), dtype)[1].double())
    assert relative(*derivatives) < 1e-5


def test_float64_goes_through_nothing_less():
    for kind in KINDS:
        network = randomised(time_embedding_type=kind).double()
        x, t, _, _ = inputs(torch.float64)
        with torch.no_grad():
            change = network(x, t + 1e-12).sample - network(x, t).sample
            assert 0 < change.abs().max() < 1e-9
            assert torch.equal(network(x, 0.1).sample, network(x, torch.tensor(0.1, dtype=torch.float64)).sample)


@pytest.mark.parametrize("kind, bound", [("positional", 4.0), ("fourier", 2 * math.pi * 0.02 * 4)])
def test_time_features_change_slowly(kind, bound):
    network = JVPUNet2DModel(block_out_channels=(64,), time_embedding_type=kind)
    t = torch.linspace(0, math.pi / 2, 50, dtype=torch.float64)
    features, derivative = jvp(network.time_proj, (t,), (torch.ones_like(t),))
    assert features.shape == (50, 64) and features.dtype == torch.float64
    assert derivative.abs().max() <= bound
    assert torch.equal(network.time_proj(t.float()), TimeFeatures(64, kind, network.time_proj.scale)(t.float()))


def test_scale_and_shift_stay_bounded():
    x = torch.randn(5, 32, dtype=torch.float64)
    torch.testing.assert_close(pixel_norm(x, 0.0).square().mean(1), torch.ones(5, dtype=torch.float64))
    for size in (0.0, 1e-4, 1.0, 1e4):
        value, slope = jvp(lambda x: pixel_norm(x, 1.0), (size * x,), (torch.randn_like(x),))
        assert value.square().mean(1).max() < 1
        assert slope.isfinite().all()
    torch.testing.assert_close(pixel_norm(1e-4 * x, 1.0), 1e-4 * x, rtol=1e-7, atol=0)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_parameter_gets_a_gradient(checkpointing):
    network = randomised(num_class_embeds=3, log_variance=True, dropout=0.1)
    if checkpointing:
        network.enable_gradient_checkpointing()
    assert network.is_gradient_checkpointing == checkpointing
    x, t, _, _ = inputs()
    output = network(x, t, torch.tensor([0, 1, 2]))
    (output.sample.square().sum() + output.log_variance.sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_checkpointing_changes_no_gradient_even_when_keys_change_before_the_backward_pass():
    gradients = []
    for checkpointing in (False, True):
        network = randomised(dropout=0.5)
        if checkpointing:
            network.enable_gradient_checkpointing()
        x, t, _, _ = inputs()
        network.key_dropout(torch.arange(3))
        loss = network(x, t).sample.square().sum()
        network.key_dropout(None)
        loss.backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*gradients)


def test_network_starts_at_zero_and_reads_time_class_and_image():
    assert not build_unet("jvp_tiny", (8, 8), 1)(torch.randn(1, 1, 8, 8), 0.3).sample.any()
    network, (x, _, _, _) = randomised(num_class_embeds=3), inputs()

    def output(x=x, t=0.5, label=1):
        return network(x, t, torch.full((3,), label)).sample

    for other in (output(x=x + 1), output(t=0.6), output(label=2)):
        assert (other - output()).abs().max() > 1e-4
    # samples do not see each other
    torch.testing.assert_close(output()[1:2], network(x[1:2], 0.5, torch.tensor([1])).sample)


def test_class_labels_are_missing_or_superfluous():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="missing"):
        build_unet("jvp_tiny", (8, 8), 1, 10)(x, 0.1)
    with pytest.raises(ValueError, match="not for this network"):
        build_unet("jvp_tiny", (8, 8), 1)(x, 0.1, torch.tensor([1]))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"time_embedding_type": "learned"}, "'positional' or 'fourier', not 'learned'"),
        ({"block_out_channels": (16, 36)}, "36 in block_out_channels"),
        ({"block_out_channels": (48,)}, "attention_head_dim"),
    ],
)
def test_impossible_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        JVPUNet2DModel(**config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [True, False])
def test_a_saved_network_is_the_same_network(tmp_path, kind, head):
    network = randomised(time_embedding_type=kind, num_class_embeds=4).eval()
    if head:
        network.add_log_variance_head()
        torch.nn.init.normal_(network.log_variance_head.weight)
    else:
        network.add_log_variance_head()
        network.remove_log_variance_head()
    network.save_pretrained(tmp_path)
    again = JVPUNet2DModel.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(network.state_dict()) and again.config.log_variance is head
    x, t, _, _ = inputs()
    with torch.no_grad():
        outputs = [n(x, t, torch.tensor([0, 1, 3]), return_dict=False) for n in (network, again)]
    assert len(outputs[0]) == (2 if head else 1)
    for first, second in zip(*outputs):  # the addresses of weights can change the rounding of sums
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_config_makes_the_same_network():
    network = JVPUNet2DModel((8, 12), 4, 4, (16, 32), 1)
    network.add_log_variance_head()
    assert network.config.time_embedding_scale == 1
    again = JVPUNet2DModel.from_config(network.config)
    assert again.config == network.config
    assert list(again.state_dict()) == list(network.state_dict())


def test_log_variance_head_comes_and_goes():
    network = randomised()
    x, t, _, _ = inputs()
    before, keys = network(x, t), list(network.state_dict())
    network.double().add_log_variance_head()
    assert network.log_variance_head.weight.dtype == torch.float64
    network.float()
    output = network(x, t)
    assert output.log_variance.shape == (3,) and not output.log_variance.any()
    assert torch.equal(output.sample, before.sample)
    assert network.config.log_variance is True
    network.remove_log_variance_head()
    assert network.config.log_variance is False and list(network.state_dict()) == keys
    assert network(x, t).log_variance is None


@pytest.mark.parametrize("cast", [False, True])
def test_time_stays_in_float32_under_autocast_and_in_bfloat16(cast):
    network = randomised(log_variance=True)
    x, _, _, _ = inputs()
    near = torch.tensor([0.5, 0.5001, 0.5002])  # equal in bfloat16
    if cast:
        network, x = network.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not cast):
        embedding = network.time_embedding(network.time_proj(near))
        output = network(x, near)
    assert embedding.dtype == torch.float32 and len(embedding[:, 0].unique()) == 3
    assert output.sample.dtype == torch.bfloat16 and len(output.log_variance.unique()) == 3


def test_autocast_is_near_float32():
    network = randomised(dropout=0.2).train()
    network.key_dropout(torch.arange(3))
    exact = sample_jvp(network, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rough = sample_jvp(network, torch.float32)
    for value, expected in zip(rough, exact):
        assert relative(value.float(), expected) < 0.05


def test_keep_time_embedding_in_float32_leaves_it_alone():
    network = build_unet("jvp_tiny", (8, 8), 1)
    before = type(network.time_embedding)
    keep_time_embedding_in_float32(network)
    assert type(network.time_embedding) is before


def test_compiles_in_one_piece():
    network = randomised(dropout=0.2, num_class_embeds=3, log_variance=True, block_out_channels=(16,))
    network.key_dropout(torch.arange(3))
    x, t, _, _ = inputs()
    arguments = (x, t, torch.tensor([0, 1, 2]))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments).sample, network(*arguments).sample)
    torch.testing.assert_close(compiled(*arguments).log_variance, network(*arguments).log_variance)


@pytest.mark.slow
def test_a_jvp_compiles_in_one_piece():
    network = randomised(dropout=0.2, block_out_channels=(16,))
    network.key_dropout(torch.arange(3))
    x, t, dx, dt = inputs()

    def call(x, t, dx, dt):
        return jvp(lambda x, t: network(x, t, return_dict=False)[0], (x, t), (dx, dt))

    with torch.no_grad():
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(x, t, dx, dt)
        torch.testing.assert_close(compiled, call(x, t, dx, dt), rtol=1e-4, atol=1e-5)


def test_a_copy_is_its_own():
    network = randomised()
    other = copy.deepcopy(network)
    x, t, _, _ = inputs()
    other.add_log_variance_head()
    assert network(x, t).log_variance is None
    assert torch.equal(other(x, t).sample, network(x, t).sample)


# --- keyed dropout


def test_keyed_dropout_does_not_depend_on_the_batch_or_the_generator():
    network = randomised(dropout=0.4).double().train()
    x, t, _, _ = inputs(torch.float64, batch=4)
    keys = torch.tensor([11, -5, 2**62, 0])
    state = torch.get_rng_state()
    network.key_dropout(keys)
    whole = network(x, t).sample
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network(x, t).sample, whole)
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        network.key_dropout(keys[rows])
        halves.append(network(x[rows], t[rows]).sample)
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-10, atol=1e-10)
    network.key_dropout(keys + 1)
    assert (network(x, t).sample - whole).abs().amax((1, 2, 3)).min() > 1e-3


def test_without_keys_dropout_is_the_ordinary_one():
    network = randomised(dropout=0.4).train()
    x, t, _, _ = inputs()
    network.key_dropout(torch.arange(3))
    network.key_dropout(None)
    assert not torch.equal(network(x, t).sample, network(x, t).sample)
    network.eval().key_dropout(torch.arange(7))  # keys of another batch, which are not used
    assert torch.equal(network(x, t).sample, network(x, t).sample)


def test_every_layer_has_an_index():
    layers = [m.layer for m in build_unet("jvp_small", (8, 8), 1).modules() if isinstance(m, KeyedDropout)]
    assert layers == list(range(len(layers))) and len(layers) == 11


@pytest.mark.parametrize(
    "keys, message",
    [
        (torch.zeros(2), "int64"),
        (torch.zeros(3, 1, dtype=torch.int64), "int64"),
        (torch.zeros(2, dtype=torch.int64), "2 samples, but the batch has 3"),
    ],
)
def test_wrong_keys_are_refused(keys, message):
    network, (x, t, _, _) = randomised(dropout=0.4), inputs()
    with pytest.raises(ValueError, match=message):
        network.key_dropout(keys)
        network(x, t)

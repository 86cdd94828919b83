"""Masks of keyed dropout: their values, statistics and cost, by both rules."""

import math

import pytest
import torch
from torch.func import jvp

from cm_diffusers.models import build_unet
from cm_diffusers.models.keyed_dropout import COLUMNS, KeyedDropout, kept_by_hash, kept_by_products
from tests.helpers.apple import without_float64
from tests.helpers.dispatched import Dispatched
from tests.helpers.splitmix import mix, signed, splitmix64


RULES = [1, 2]


def dropout(p, layer=0, rule=2):
    module = KeyedDropout(p, layer)
    module.rule = rule
    return module


def masks(keys, layer=0, shape=(1, 1000), p=0.5, rule=2):
    """Masks (rows, ...) of 0 and 1 / (1 - p)."""
    return dropout(p, layer, rule)(torch.ones(len(keys), *shape, dtype=torch.float64), torch.as_tensor(keys))


def many_keys():
    """Keys that differ in few bits, and random ones: (200,)."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.arange(100), torch.randint(-(2**63), 2**63 - 1, (100,), generator=generator)])


def standardised(kept, p):
    """Masks with mean 0 and variance 1."""
    return (kept.double() - (1 - p)) / math.sqrt(p * (1 - p))


# --- values


def test_masks_of_rule_1_have_the_values_of_a_reference():
    for key in (0, 1, -1, 2**63 - 1, -(2**63)):
        for layer in (0, 7):
            state = mix(mix((key + 0x9E3779B97F4A7C15) % 2**64) ^ layer)
            expected = [signed(mix(state ^ i)) >= math.floor((0.3 - 0.5) * 2**64) for i in range(60)]
            assert (masks([key], layer, (3, 4, 5), p=0.3, rule=1).flatten() > 0).tolist() == expected


def test_masks_of_rule_2_have_the_values_of_a_reference():
    for key in (0, 1, -1, 2**63 - 1, -(2**63)):
        for layer in (0, 7):

            def half(i, key=key, layer=layer):
                return splitmix64(key, (layer << 32) + i // 2) >> 32 * (i % 2) & 2**32 - 1

            def number(i, half=half):
                row, column = divmod(i, 256)
                a, b = half(256 + 2 * row), half(257 + 2 * row)
                return (a + b * half(column)) % 2**32

            expected = [signed(number(i), 32) >= math.floor((0.3 - 0.5) * 2**32) for i in range(3 * 7 * 31)]
            assert (masks([key], layer, (3, 7, 31), p=0.3).flatten() > 0).tolist() == expected


@pytest.mark.parametrize("rule", RULES)
def test_an_element_depends_on_its_key_layer_and_place_alone(rule):
    keys = many_keys()
    whole = masks(keys, 3, (4, 16, 16), rule=rule).flatten(1)
    assert torch.equal(masks(keys[150:], 3, (4, 16, 16), rule=rule).flatten(1), whole[150:])
    for shape in ((1,), (5, 7), (3, 16, 16)):
        count = math.prod(shape)
        assert torch.equal(masks(keys, 3, shape, rule=rule).flatten(1), whole[:, :count])


def test_masks_are_the_same_on_a_device_without_float64(monkeypatch):
    x, keys = torch.ones(3, 4, 8, 8), torch.tensor([1, -2, 3])
    expected = dropout(0.3)(x, keys)
    with without_float64(monkeypatch) as device:
        assert torch.equal(dropout(0.3)(x.to(device), keys.to(device)).inner, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("p, expected", [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_at_its_limits(p, expected, rule):
    assert (masks([1, 2], p=p, rule=rule) == expected).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_stays_is_scaled_and_so_are_gradients_and_tangents(dtype, rule):
    keys, x = torch.tensor([4, 5]), torch.randn(2, 3, 20).to(dtype).requires_grad_()
    factor = (masks(keys, shape=(3, 20), p=0.3, rule=rule) > 0) / torch.tensor(0.7, dtype=torch.float64)
    module, ulp = dropout(0.3, rule=rule), torch.finfo(dtype).eps
    output, tangent = jvp(lambda x: module(x, keys), (x.detach(),), (x.detach(),))
    value = module(x, keys)
    value.backward(torch.ones_like(value))
    for found in (value.detach(), output, tangent):
        torch.testing.assert_close(found.double(), factor * x.detach().double(), rtol=2 * ulp, atol=0)
    torch.testing.assert_close(x.grad.double(), factor, rtol=2 * ulp, atol=0)
    assert value.dtype == tangent.dtype == x.grad.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 5])
def test_compiled_masks_are_the_same(layer):
    module, keys = dropout(0.3, layer), many_keys()[98:102]
    compiled = torch.compile(module, fullgraph=True)
    for shape in ((3, 16, 16), (3, 7, 9)):
        x = torch.randn(4, *shape, requires_grad=True)
        found, expected = compiled(x, keys), module(x, keys)
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.autograd.grad(value.sum(), x)[0] for value in (found, expected)))


# --- cost


@pytest.mark.parametrize("channels, size", [(128, 32), (256, 16), (256, 8)])
def test_a_pass_moves_at_most_24_bytes_per_element_and_saves_one(channels, size):
    x, keys = torch.randn(4, channels, size, size, requires_grad=True), torch.arange(4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with Dispatched() as dispatched:
            dropout(0.13)(x, keys)
    assert 17 < dispatched.bytes / x.numel() < 24 and dispatched.kernels < 20
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved) == x.numel()
    with Dispatched() as dispatched:
        dropout(0.13, rule=1)(x, keys)
    assert dispatched.bytes / x.numel() > 200 and dispatched.kernels > 40


# --- statistics, with fixed seeds


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("p", [0.05, 0.13, 0.2, 0.5, 0.9])
def test_masks_keep_what_they_should(p, rule):
    mask = masks(range(500), shape=(20, 50), p=p, rule=rule)
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - p)}
    count, kept = mask.numel(), (mask > 0).double().mean().item()
    assert abs(kept - (1 - p)) < 4 * math.sqrt(p * (1 - p) / count)
    # by rows and by columns as well: chi-square against the binomial law
    for dim in (0, 1):
        rates = (mask > 0).double().flatten(1).mean(1 - dim)
        z = (rates - (1 - p)) / math.sqrt(p * (1 - p) * len(rates) / count)
        assert abs(z.square().mean().item() - 1) < 5 * math.sqrt(2 / len(z))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_rows_layers_and_positions_are_independent(p, rule):
    keys, count = many_keys(), 2000
    signs = [standardised(masks(keys, layer, (count,), p, rule) > 0, p) for layer in range(3)]
    rows = signs[0] @ signs[0].T / count
    off = rows[~torch.eye(200, dtype=bool)]
    bound = (6 if p == 0.5 else 7) / math.sqrt(count)  # products of rare events have a longer tail
    assert off.abs().max() < bound and off.std().item() == pytest.approx(count**-0.5, rel=0.05)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        across = signs[first] @ signs[second].T / count  # equal and different rows
        assert across.abs().max() < bound and across.std().item() == pytest.approx(count**-0.5, rel=0.05)
    for lag in (1, 2, 3, 8, 16, 32, 64, 100, 128, 255, 256, 257, 512, 1024):
        for sign in signs:
            correlation = (sign[:, lag:] * sign[:, :-lag]).mean().item()
            assert abs(correlation) < 5 / math.sqrt(200 * (count - lag))
    # a layer's stream is not its neighbour's stream, shifted
    for lag in range(1, 20):
        for a, b in ((signs[0][:, lag:], signs[1][:, :-lag]), (signs[1][:, lag:], signs[0][:, :-lag])):
            assert abs((a * b).mean().item()) < 5 / math.sqrt(200 * (count - lag))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_products_of_more_elements_vanish(p, rule):
    """Rule 2 adds random rows and columns, so products along rows, columns and the corners of rectangles matter."""
    rows, columns, samples = 40, COLUMNS, 300
    kept = {1: kept_by_hash, 2: kept_by_products}[rule](torch.arange(samples), 5, rows * columns, p)
    table = standardised(kept, p).view(samples, rows, columns)
    products = {
        "three in a row": table[..., :-2] * table[..., 1:-1] * table[..., 2:],
        "spread over a row": table[..., :64] * table[..., 64:128] * table[..., 192:],
        "four in a row": table[..., :-3] * table[..., 1:-2] * table[..., 2:-1] * table[..., 3:],
        "three in a column": table[:, :-2] * table[:, 1:-1] * table[:, 2:],
        "squares": table[:, :-1, :-1] * table[:, 1:, :-1] * table[:, :-1, 1:] * table[:, 1:, 1:],
        "rectangles": table[:, :20, :128] * table[:, 20:, :128] * table[:, :20, 128:] * table[:, 20:, 128:],
        "two by three": (table[:, :-1] * table[:, 1:]).unfold(2, 3, 1).prod(3),
        "samples": (table[:-1] * table[1:]).unfold(2, 2, 1).prod(3),
    }
    for name, product in products.items():
        assert abs(product.mean().item()) < 5 / math.sqrt(product.numel()), name
    # how many stay in each row and in each column: the binomial law, up to the fourth moment
    for dim, size in ((2, columns), (1, rows)):
        total = table.sum(dim).flatten() / math.sqrt(size)
        excess = (1 - 6 * p * (1 - p)) / (p * (1 - p) * size)
        assert abs(total.square().mean().item() - 1) < 5 * math.sqrt((2 + excess) / total.numel())
        assert abs(total.pow(4).mean().item() - 3 - excess) < 6 * math.sqrt(96 / total.numel()) * (1 + 10 * excess)


def test_a_column_is_not_shared_by_samples_or_layers():
    """Each column's mean over the rows of one table has the binomial law."""
    p, rows = 0.3, 64
    tables = [kept_by_products(torch.arange(50), layer, rows * COLUMNS, p).view(50, rows, COLUMNS) for layer in (0, 1)]
    means = [standardised(table, p).mean(1) * math.sqrt(rows) for table in tables]
    assert abs(means[0].square().mean().item() - 1) < 5 * math.sqrt(2 / means[0].numel())
    for a, b in ((means[0], means[1]), (means[0][1:], means[0][:-1])):
        assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())


# --- networks


@pytest.mark.parametrize("preset", ["jvp_tiny", "ddpmpp_tiny"])
def test_a_network_takes_the_rule_with_the_keys_and_keeps_it(preset):
    network = build_unet(preset, (8, 8), 1, dropout=0.3).train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, keys = torch.randn(3, 1, 8, 8), torch.rand(3), torch.arange(3)
    outputs = {}
    for rule in (1, 2, 1):
        network.key_dropout(keys, rule)
        network.key_dropout(None)  # as before a backward pass that computes activations again
        assert {m.rule for m in network.modules() if isinstance(m, KeyedDropout)} == {rule}
        network.key_dropout(keys, rule)
        output = network(x, t).sample
        assert torch.equal(outputs.setdefault(rule, output), output)
    network.key_dropout(keys)
    assert torch.equal(network(x, t).sample, outputs[2]) and not torch.equal(outputs[1], outputs[2])

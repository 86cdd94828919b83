import math
import subprocess
import sys

import pytest
import torch

from cm_diffusers.core import draws
from cm_diffusers.core.draws import Draws, SequentialDraws, derive_seed, draws_by, permutation
from tests.helpers.apple import without_float64
from tests.helpers.dispatched import Dispatched
from tests.helpers.splitmix import signed, splitmix64


# of the first rule, drawn at commit b49fad3 for seed 0, step 0 and row 1
RECORDED = {
    "normal": [-0.26856568455696106, 0.42081862688064575],
    "uniform": [0.16999447345733643],
    "keys": [8369260902373245617],
    "shared": 0.6263186931610107,
}


def test_a_row_does_not_depend_on_how_the_batch_is_split():
    whole = Draws(7, 3, range(8))
    parts = [Draws(7, 3, rows) for rows in (range(4), range(4, 8))]
    for kind in ("normal", "uniform"):
        values = getattr(whole, kind)("noise", (2, 5))
        assert torch.equal(values, torch.cat([getattr(part, kind)("noise", (2, 5)) for part in parts]))
    assert torch.equal(Draws(7, 3, [6, 1]).normal("noise"), whole.normal("noise")[[6, 1]])


def test_the_same_key_gives_the_same_numbers():
    numbers = Draws(7, 3, range(4))
    first = numbers.normal("noise", (5,))
    numbers.uniform("other", (5,))
    assert torch.equal(numbers.normal("noise", (5,)), first)
    assert torch.equal(Draws(7, 3, range(4)).normal("noise", (5,)), first)


@pytest.mark.parametrize("other", [(8, 3, "noise", 0), (7, 4, "noise", 0), (7, 3, "sigma", 0), (7, 3, "noise", 4)])
def test_another_seed_step_name_or_row_gives_other_numbers(other):
    seed, step, name, first = other
    reference = Draws(7, 3, range(4)).normal("noise", (5,))
    assert not (Draws(seed, step, range(first, first + 4)).normal(name, (5,)) == reference).any()


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_a_smaller_shape_takes_the_first_numbers(kind):
    draw = getattr(Draws(7, 3, range(4)), kind)
    whole = draw("noise", (3, 8, 8)).flatten(1)
    for shape in ((), (1,), (3,), (2, 8, 8), (5, 7)):
        count = torch.Size(shape).numel()
        assert draw("noise", shape).shape == (4, *shape)
        assert torch.equal(draw("noise", shape).reshape(4, -1), whole[:, :count])


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_blocks_of_rows_change_nothing(monkeypatch, kind):
    whole = getattr(Draws(7, 3, range(9)), kind)("noise", (5, 7))
    monkeypatch.setattr(draws, "BLOCK", 50)
    assert torch.equal(getattr(Draws(7, 3, range(9)), kind)("noise", (5, 7)), whole)


@pytest.mark.parametrize("rows", [range(5, 45, 4), [9, 2, 2], (0,), range(0)])
def test_rows_may_be_any_sequence(rows):
    whole = Draws(7, 3, range(64))
    for kind, arguments in (("normal", ("noise", (3,))), ("uniform", ("noise", (3,))), ("keys", ("noise",))):
        assert torch.equal(getattr(Draws(7, 3, rows), kind)(*arguments), getattr(whole, kind)(*arguments)[list(rows)])


def test_numbers_have_the_values_of_a_reference():
    """The reference computes the same numbers with Python's integers and `math`."""
    for seed, step, name, row in ((0, 0, "noise", 0), (12, 345, "sigma", 6789)):
        row_seed = splitmix64(derive_seed(seed, name, step) - 2**63, row)
        numbers = [splitmix64(row_seed, i) for i in range(20)]
        one = Draws(seed, step, [row])
        assert one.keys(name).item() % 2**64 == row_seed
        assert one.uniform(name, (20,))[0].tolist() == [(number >> 40) / 2**24 for number in numbers]
        pairs = []
        for number in numbers:
            radius = math.sqrt(-2 * math.log((number % 2**32 + 0.5) / 2**32))
            angle = math.pi * signed(number) / 2**63
            pairs += [radius * math.cos(angle), radius * math.sin(angle)]
        torch.testing.assert_close(one.normal(name, (40,))[0], torch.tensor(pairs), rtol=2e-7, atol=0)
        assert one.shared(name).item() == (derive_seed(seed, name, step) >> 40) / 2**24


def test_numbers_are_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        one = Draws(0, 0, range(2))
        assert {one.normal("a").dtype, one.uniform("a").dtype, one.shared("a").dtype} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def draw_all(draws):
    return draws.normal("a", (5,)), draws.uniform("a", (2, 3)), draws.keys("a")


def test_drawing_copies_nothing_from_the_host():
    """A copy to a GPU would wait for the work in its queue. "meta" stands for the GPU."""
    with Dispatched() as dispatched:
        assert [value.device.type for value in draw_all(Draws(0, 0, range(3, 40, 2), "meta"))] == ["meta"] * 3
    assert dispatched.devices and all(devices == {"meta"} for devices in dispatched.devices)
    with Dispatched() as dispatched:
        draw_all(SequentialDraws(0, 0, range(3), "meta"))
    assert {"cpu", "meta"} in dispatched.devices


def test_numbers_are_the_same_on_a_device_without_float64(monkeypatch):
    with without_float64(monkeypatch) as device:
        there = draw_all(Draws(7, 3, range(4), device))
        assert {value.device for value in there} == {device}
        there = [value.inner for value in there]
    for value, expected in zip(there, draw_all(Draws(7, 3, range(4)))):
        assert torch.equal(value, expected)


# --- statistics, with fixed seeds


def standardised(kind, name="a", step=0, rows=range(400), shape=(1000,)):
    """Numbers (rows, ...) with mean 0 and variance 1."""
    values = getattr(Draws(0, step, rows), kind)(name, shape).double()
    return values if kind == "normal" else (values - 0.5) * 12**0.5


@pytest.mark.parametrize(
    "kind, moments", [("normal", [0, 1, 0, 3, 0, 15, 0, 105]), ("uniform", [0, 1, 0, 9 / 5, 0, 27 / 7, 0, 9])]
)
@pytest.mark.parametrize("name", ["noise", "sigma", "a"])
def test_moments(kind, moments, name):
    """Mean, variance, skewness and kurtosis lie within 4 standard errors."""
    values = standardised(kind, name)
    for k in range(1, 5):
        expected, variance = moments[k - 1], moments[2 * k - 1] - moments[k - 1] ** 2
        assert abs((values**k).mean().item() - expected) < 4 * math.sqrt(variance / values.numel())


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("name, rows", [("noise", range(400)), ("sigma", range(10**6, 10**6 + 400))])
def test_distributions(kind, name, rows):
    """Kolmogorov and Smirnov's distance, of all numbers, of one number per row, and of the numbers' minima."""
    cdf = torch.special.ndtr if kind == "normal" else lambda values: values / 12**0.5 + 0.5
    values = standardised(kind, name, rows=rows)
    for sample in (values.flatten(), values[:, 0], values[0], values[:, 999]):
        levels = cdf(sample.sort().values)
        places = torch.arange(len(levels)) / len(levels)
        distance = torch.maximum(levels - places, places + 1 / len(levels) - levels).max().item()
        assert distance < 1.95 / math.sqrt(len(levels))  # exceeded with probability 0.001
    lowest = 1 - (1 - cdf(values.amin(1))) ** 1000
    assert abs(lowest.mean().item() - 0.5) < 4 / math.sqrt(12 * len(lowest))


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_rows_steps_names_and_places_are_independent(kind):
    """Correlations of values, and of their squares, are within 5 standard errors of 0."""
    rows = range(1, 401)
    values = standardised(kind, rows=rows)
    others = {
        "row": standardised(kind, rows=range(2, 402)),
        "far row": standardised(kind, rows=range(401, 801)),
        "step": standardised(kind, step=1, rows=rows),
        "name": standardised(kind, "b", rows=rows),
        "seed": (getattr(Draws(1, 0, rows), kind)("a", (1000,)).double() - (kind == "uniform") / 2)
        * (12**0.5 if kind == "uniform" else 1),
    }
    pairs = [(values, other) for other in others.values()]
    pairs += [(values[:, lag:], values[:, :-lag]) for lag in (1, 2, 3, 4, 7, 8, 16, 32, 64, 128, 256, 512)]
    pairs += [(values[:-1, 1:], values[1:, :-1]), (values[1:, 1:], values[:-1, :-1])]
    pairs += [(values.T[lag:], values.T[:-lag]) for lag in (2, 3, 5)]
    for power in (1, 2, 3):
        for a, b in pairs:
            a, b = a**power, b**power
            a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
            assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())
    # all pairs of rows, and all pairs of places
    for table in (values, values[:, :300].T):
        off = torch.corrcoef(table)[~torch.eye(len(table), dtype=bool)] * math.sqrt(table.shape[1])
        assert off.abs().max() < 6 and abs(off.std().item() - 1) < 0.05


def test_the_two_normal_numbers_of_a_pair_are_independent():
    """Their angles are uniform, and their squared radii exponential, independently of the angles."""
    x, y = standardised("normal").reshape(-1, 2).unbind(1)
    sector = ((torch.atan2(y, x) / math.pi + 1) * 8).long().clamp(max=15)
    ring = (16 * (1 - (-(x * x + y * y) / 2).exp())).long().clamp(max=15)
    counts = torch.bincount(16 * ring + sector, minlength=256).double()
    chi = ((counts - len(x) / 256) ** 2 / (len(x) / 256)).sum().item()
    assert abs(chi - 255) < 4 * math.sqrt(2 * 255)


def test_all_bits_of_keys_are_random():
    keys = Draws(0, 0, range(10_000)).keys("dropout")
    bits = torch.stack([(keys >> i) & 1 for i in range(64)]).double()
    assert (bits.mean(1) - 0.5).abs().max() < 4.5 * 0.5 / 100
    off = torch.corrcoef(bits)[~torch.eye(64, dtype=bool)]
    assert off.abs().max() < 5 / 100 and len(keys.unique()) == 10_000


# --- the rule of the first runs


def test_the_first_rule_draws_from_a_generator_per_row():
    old = SequentialDraws(7, 3, [5, 2])
    for i, row in enumerate((5, 2)):

        def generator(name, row=row):
            return torch.Generator().manual_seed(derive_seed(7, name, 3, row))

        assert torch.equal(old.normal("a", (3, 8))[i], torch.empty(3, 8).normal_(generator=generator("a")))
        assert torch.equal(old.uniform("b", (3,))[i], torch.empty(3).uniform_(generator=generator("b")))
        assert old.keys("c")[i].item() == derive_seed(7, "c", 3, row) >> 1
    assert torch.equal(
        old.shared("d"), torch.rand((), generator=torch.Generator().manual_seed(derive_seed(7, "d", 3)))
    )


def test_the_first_rule_still_gives_the_recorded_numbers():
    old = SequentialDraws(0, 0, [1])
    assert old.normal("noise", (2,))[0].tolist() == RECORDED["normal"]
    assert old.uniform("sigma").tolist() == RECORDED["uniform"]
    assert old.keys("dropout").tolist() == RECORDED["keys"] and old.shared("k").item() == RECORDED["shared"]


def test_rules_have_numbers():
    assert draws_by(1) is SequentialDraws and draws_by(2) is Draws
    with pytest.raises(ValueError, match="follow rule 3, but this version of cm_diffusers knows only 1 and 2"):
        draws_by(3)


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    numbers = Draws(0, 0, range(4))
    numbers.normal("a", (3,)), numbers.uniform("a", (3,)), permutation(10, 1)
    with numbers.dropout():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)


def dropout_mask(numbers):
    with numbers.dropout():
        return torch.nn.functional.dropout(torch.ones(1000), 0.5) == 0


def test_dropout_masks_are_the_same_in_two_passes():
    draws = Draws(0, 5, range(4))
    first = dropout_mask(draws)
    torch.rand(17)
    assert torch.equal(dropout_mask(draws), first)
    assert 400 < first.sum() < 600


@pytest.mark.parametrize("other", [Draws(0, 6, range(4)), Draws(1, 5, range(4)), Draws(0, 5, range(4, 8))])
def test_dropout_masks_differ_between_steps_seeds_and_processes(other):
    agreement = (dropout_mask(other) == dropout_mask(Draws(0, 5, range(4)))).float().mean()
    assert 0.4 < agreement < 0.6


def test_dropout_restores_the_generator_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), Draws(0, 0, range(2)).dropout():
        torch.rand(3)
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), state)


def test_permutation_is_a_keyed_permutation():
    order = permutation(1000, 3, 1)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(permutation(1000, 3, 1), order)
    for key in ((3, 2), (4, 1), ()):
        assert (permutation(1000, *key) == order).sum() < 10


def test_seeds_are_of_64_bits_and_depend_on_every_part():
    seeds = {derive_seed(*parts) for parts in ((1, "a", 2), (1, "a", 3), (2, "a", 2), (1, "b", 2), (1, "a"))}
    assert len(seeds) == 5
    assert all(0 <= seed < 1 << 64 for seed in seeds)


def test_seeds_do_not_depend_on_the_process():
    code = f"import runpy; print(runpy.run_path({draws.__file__!r})['derive_seed'](0, 'noise', 5, 3))"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) == derive_seed(0, "noise", 5, 3)


def test_dropout_on_a_cpu_seeds_its_generator_alone(monkeypatch):
    """`torch.manual_seed` also notes a stack trace for each kind of device that the machine lacks."""
    with Draws(0, 3, range(4)).dropout():
        expected = torch.rand(3)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: 1 / 0)
    with Draws(0, 3, range(4)).dropout():
        assert torch.equal(torch.rand(3), expected)

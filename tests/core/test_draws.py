import subprocess
import sys

import pytest
import torch

from cm_diffusers.core import draws
from cm_diffusers.core.draws import Draws, derive_seed, permutation


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


def test_rows_are_independent_streams():
    values = Draws(0, 0, range(2000)).normal("noise", (2,))
    correlations = torch.corrcoef(torch.stack([values[:-1, 0], values[1:, 0], values[:-1, 1]]))
    assert (correlations - torch.eye(3)).abs().max() < 4 / 2000**0.5


def test_moments():
    normal = Draws(0, 0, range(500)).normal("a", (400,)).double()
    uniform = Draws(0, 0, range(500)).uniform("a", (400,)).double()
    error = 4 / normal.numel() ** 0.5
    assert normal.mean().abs() < error
    assert normal.var().item() == pytest.approx(1, abs=error * 2**0.5)
    assert (normal**4).mean().item() == pytest.approx(3, abs=error * 96**0.5)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=error * 12**-0.5)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=error * 180**-0.5)


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

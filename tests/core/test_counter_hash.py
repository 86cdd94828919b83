import torch

from cm_diffusers.core.counter_hash import GAMMA, mix, stream
from tests.helpers.splitmix import splitmix64


# the generator's published test values for seed 1234567
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def unsigned(values):
    return [value % 2**64 for value in values.tolist()]


def test_streams_are_splitmix64():
    assert unsigned(stream(torch.tensor([1234567]), 5)[0]) == PUBLISHED
    for seed in (0, 1, -1, 2**63 - 1, -(2**63)):
        for part in (0, 7):
            expected = [splitmix64(seed, (part << 32) + i) for i in range(50)]
            assert unsigned(stream(torch.tensor([seed]), 50, part)[0]) == expected


def test_a_number_depends_on_its_seed_and_place_alone():
    seeds = torch.tensor([3, -5, 2**62])
    whole = stream(seeds, 100)
    assert torch.equal(stream(seeds[1:], 30), whole[1:, :30])
    assert torch.equal(stream(seeds, 0), whole[:, :0])


def test_mixing_is_in_place_and_changes_half_of_the_bits():
    z = torch.arange(1000) * GAMMA
    before = z.clone()
    assert mix(z) is z
    for bit in range(64):
        flipped = mix(before ^ (1 << bit if bit < 63 else -(2**63))) ^ z
        changed = sum((flipped >> i) & 1 for i in range(64)).double()
        assert abs(changed.mean().item() - 32) < 5 * 4 / 1000**0.5  # 64 bits have a standard deviation of 4

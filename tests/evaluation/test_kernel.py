import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from cm_diffusers.evaluation import kernel_distance
from tests.helpers.gaussians import normals


def test_distance_of_gaussians_is_the_closed_form_within_its_error():
    # for d = 1, E (x y + 1)^3 = 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3, so the distance is a sum of squares
    def raw(mean, std):
        return torch.tensor([mean, mean**2 + std**2, mean**3 + 3 * mean * std**2])

    difference = raw(0.0, 1.0) - raw(0.4, 1.3)
    expected = float(difference.square() @ torch.tensor([3.0, 3.0, 1.0]))
    samples = normals(30_000, 1), 0.4 + 1.3 * normals(30_000, 1, seed=1)
    value, deviation = kernel_distance(*samples, subset_size=300)
    assert abs(value - expected) < 4 * deviation / 10 < expected / 4  # 100 subsets that hardly overlap


def test_one_subset_of_all_samples_is_the_sum_over_pairs():
    a, b = normals(7, 3), normals(7, 3, seed=1)

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(kernel(f[i], f[j]) for f in (a, b) for i, j in pairs if i != j) / (7 * 6)
    expected = within - 2 * sum(kernel(a[i], b[j]) for i, j in pairs) / 49
    value, deviation = kernel_distance(a, b, subsets=3, subset_size=7)
    assert value == pytest.approx(expected, rel=1e-12)
    assert deviation == pytest.approx(0, abs=1e-12)


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features")
def test_value_and_error_bar_are_those_of_torchmetrics_on_the_same_subsets():
    a, b = normals(300, 16), 1.2 * normals(250, 16, seed=1) + 0.2
    theirs = KernelInceptionDistance(torch.nn.Identity(), subsets=20, subset_size=100)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)  # the seed of its subsets
        expected = [float(value) for value in theirs.compute()]
    assert kernel_distance(a, b, subsets=20, subset_size=100, seed=5) == pytest.approx(expected, rel=1e-9)


def test_equal_distributions_are_at_zero_within_the_error_and_the_randomness_is_left_alone():
    before = torch.get_rng_state()
    value, deviation = kernel_distance(normals(4000, 8), normals(4000, 8, seed=1), subset_size=200)
    assert abs(value) < deviation
    assert kernel_distance(normals(4000, 8), normals(4000, 8, seed=1), subset_size=200) == (value, deviation)
    assert kernel_distance(normals(4000, 8), normals(4000, 8, seed=1), subset_size=200, seed=1)[0] != value
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="subset_size 1000 is larger than the smaller set, 50 samples"):
        kernel_distance(normals(2000, 3), normals(50, 3))
    with pytest.raises(ValueError, match="subsets must be >= 1"):
        kernel_distance(normals(50, 3), normals(50, 3), subsets=0)
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(normals(50, 3), normals(50, 3) / 0, subset_size=20)

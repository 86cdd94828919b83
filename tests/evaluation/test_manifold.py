import pytest
import torch
from prdc import compute_prdc

from cm_diffusers.evaluation import density_coverage, manifold, precision_recall
from tests.helpers.gaussians import normals


def column(*values):
    return torch.tensor(values)[:, None]


def test_numbers_on_a_line_by_hand():
    real, made = column(0.0, 1.0, 3.0), column(0.5, 1.0, 1.5, 20.0)
    # balls of real: 0 +- 1, 1 +- 1, 3 +- 2; of made: .5 +- .5, 1 +- .5, 1.5 +- .5, 20 +- 18.5
    assert precision_recall(real, made, k=1) == (3 / 4, 1.0)
    assert precision_recall(real, made[:3], k=1) == (1.0, 2 / 3)
    # .5 is in two balls, 1 in three, 1.5 in two
    assert density_coverage(real, made, k=1) == (7 / 4, 1.0)
    assert density_coverage(real, made[3:].repeat(2, 1), k=1) == (0.0, 0.0)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_all_four_are_those_of_prdc(k, monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", 10_000)  # several blocks
    real, made = normals(300, 8) + 100, 1.2 * normals(250, 8, seed=1) + 100.3
    theirs = compute_prdc(real.numpy(), made.numpy(), nearest_k=k)
    assert precision_recall(real, made, k) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-12)
    assert density_coverage(real, made, k) == pytest.approx((theirs["density"], theirs["coverage"]), rel=1e-12)


def test_density_and_coverage_of_equal_gaussians_are_the_closed_forms():
    # coverage: one minus the chance that the k nearest of N - 1 + M are all real (Naeem et al. 2020, section 3)
    n, m, k = 2000, 1500, 5
    missed = 1.0
    for i in range(k):
        missed *= (n - 1 - i) / (n + m - 1 - i)
    density, coverage = density_coverage(normals(n, 4), normals(m, 4, seed=1), k)
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(1 - missed, abs=0.02)
    assert 1 - missed < 0.95  # otherwise the line above would hold for almost anything


def test_copies_are_precise_and_recalled_and_far_samples_are_neither():
    real = normals(100, 4)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    # one of two modes is precise, but recalls half of the data
    two = torch.cat([real, real + 100])
    precision, recall = precision_recall(two, normals(100, 4, seed=1))
    assert precision > 0.8 and 0.4 < recall <= 0.5


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="k must be >= 1"):
        precision_recall(normals(9, 2), normals(9, 2), k=0)
    with pytest.raises(ValueError, match="N and M >= 6"):
        density_coverage(normals(9, 2), normals(5, 2))
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(normals(9, 2), normals(9, 2) / 0)

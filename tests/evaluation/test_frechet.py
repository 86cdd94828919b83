import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from cm_diffusers.evaluation import Moments, frechet, frechet_distance
from tests.helpers.gaussians import exactly, normals


def test_distance_of_gaussians_with_axes_in_common_is_the_closed_form():
    # |m1 - m2|^2 + sum (s1 - s2)^2
    a = exactly([0.0, 1.0, 2.0], torch.tensor([1.0, 4.0, 0.25]).diag())
    b = exactly([1.0, 1.0, 0.0], torch.tensor([9.0, 4.0, 1.0]).diag(), seed=1)
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 4 + 0.25, rel=1e-12)


def test_distance_of_gaussians_with_other_axes_is_the_closed_form():
    # the eigenvalues p, q of a 2x2 product have (p^(1/2) + q^(1/2))^2 = p + q + 2 (p q)^(1/2)
    one, two = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double(), torch.tensor([[1.0, -0.6], [-0.6, 3.0]]).double()
    root_trace = ((one @ two).trace() + 2 * (one.det() * two.det()).sqrt()).sqrt()
    expected = 0.25 + one.trace() + two.trace() - 2 * root_trace
    distance = frechet_distance(exactly([0.0, 0.5], one), exactly([0.0, 1.0], two, seed=1))
    assert distance == pytest.approx(float(expected), rel=1e-12)


def test_distance_is_symmetric_and_invariant_under_rotation_and_zero_to_itself():
    a, b = normals(200, 5), normals(300, 5, seed=1) @ normals(5, 5, seed=2) + 1
    rotation = torch.linalg.qr(normals(5, 5, seed=3)).Q
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_no_distance_is_negative_by_rounding():
    for seed in range(20):
        features = 1e3 * normals(100, 5, seed=seed)
        assert 0 <= frechet_distance(features, features.flip(0)) < 1e-6


@pytest.mark.parametrize("other", [[1.0, 4.0, 9.0, 0.25, 2.0, 3.0, 1.0], [1.0, 4.0, 9.0, 0.25, 0.0, 0.0, 0.0]])
def test_features_that_are_zero_for_all_images_cost_no_digits(other):
    mix = torch.linalg.qr(normals(7, 7, seed=2)).Q  # so that singular directions are not along the axes
    deviations = torch.tensor([[4.0, 1.0, 1.0, 4.0, 0.0, 0.0, 0.0], other]).double().sqrt()
    white = exactly([0.0] * 7, torch.eye(7)) * deviations[:, None] @ mix
    expected = (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(*white) == pytest.approx(float(expected), rel=1e-12)


def test_distance_is_that_of_torchmetrics():
    a, b = normals(500, 24), normals(400, 24, seed=1) @ normals(24, 24, seed=2) + 0.5
    identity = torch.nn.Identity()
    identity.num_features = 24
    theirs = FrechetInceptionDistance(identity)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    theirs.orig_dtype = torch.float64  # it rounds its result to this type
    assert frechet_distance(a, b) == pytest.approx(theirs.compute().item(), rel=1e-9)


def test_moments_of_batches_are_those_of_the_whole_even_far_from_zero():
    features = normals(1000, 6) + 1e6
    moments = Moments()
    for batch in features.split(137):
        moments.add(batch)
    assert moments.count == 1000
    torch.testing.assert_close(moments.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.covariance, features.T.cov(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shapes", [((50, 3), (50, 4)), ((50,), (50,))])
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="features must have the shapes"):
        frechet_distance(*(torch.zeros(shape) for shape in shapes))


def test_too_few_samples_for_the_covariance_are_refused():
    with pytest.raises(ValueError, match="8 images are too few for the covariance of 8 features: at least 9"):
        frechet_distance(normals(8, 8), normals(100, 8))
    assert frechet_distance(normals(9, 8), normals(100, 8)) > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    features = normals(50, 3)
    features[7, 1] = value
    with pytest.raises(ValueError, match="1 of 50 images are not finite"):
        frechet_distance(normals(50, 3), features)


def test_a_wrong_root_is_noticed(monkeypatch):
    def halved(matrix):
        values, vectors = eigh(matrix)
        return values / 2, vectors

    eigh = torch.linalg.eigh
    monkeypatch.setattr(frechet.torch.linalg, "eigh", halved)
    with pytest.raises(ValueError, match="no square root of the covariance of 3 features"):
        frechet_distance(normals(50, 3), normals(50, 3, seed=1))

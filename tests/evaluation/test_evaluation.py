import pytest
import torch

from cm_diffusers.evaluation import frechet_distance, train_classifier


def gaussian(mean, scale, n=200_000, seed=0):
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor(mean) + noise * torch.tensor(scale)


def test_distance_of_gaussians_is_the_closed_form():
    # |m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances
    a, b = gaussian([0.0, 1.0, 2.0], [1.0, 2.0, 0.5]), gaussian([1.0, 1.0, 0.0], [3.0, 2.0, 1.0], seed=1)
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 4 + 0.25, rel=0.01)


def test_distance_of_correlated_gaussians_is_invariant_under_rotation():
    a, b = gaussian([0.0, 1.0, 2.0], [1.0, 2.0, 0.5]), gaussian([1.0, 1.0, 0.0], [3.0, 2.0, 1.0], seed=1)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_distance_of_a_set_to_itself_is_zero():
    a = gaussian([0.0, 1.0, 2.0], [1.0, 2.0, 0.5], n=100)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5,), (5,))])
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="features must have the shapes"):
        frechet_distance(*(torch.zeros(shape) for shape in shapes))


def test_classifier_learns_and_is_repeatable_and_leaves_the_randomness_alone():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    images = torch.rand(300, 1, 8, 8, generator=generator) * 0.3
    images[torch.arange(300), 0, labels * 2 + 1] += 0.6  # a bright row, another for each class
    before = torch.get_rng_state()
    one, two = (train_classifier(images, labels, epochs=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert (one(images).argmax(1) == labels).float().mean() > 0.95
    assert torch.equal(one.features(images), two.features(images))
    assert one.features(images).shape == (300, 32)

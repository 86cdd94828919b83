import torch

from cm_diffusers.evaluation import train_classifier


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

"""The adversary: the discriminator's inputs and training, and the weight of its loss."""

import pytest
import torch
from torch import nn

from cm_diffusers.core.conditions import of_classes
from cm_diffusers.core.differentiable_augmentation import differentiable_augmentation
from cm_diffusers.core.draws import Draws
from cm_diffusers.objectives.adversarial import Adversary, AdversaryOptions
from cm_diffusers.objectives.balance import Part, balanced
from cm_diffusers.objectives.base import Batch


class Watched(nn.Module):
    """A discriminator that records inputs. Its two logits are the image's mean times `weight`, and 9 times that."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.calls = []

    def forward(self, images, class_labels=None):
        self.calls.append((images, class_labels))
        return self.weight * images.mean((1, 2, 3))[:, None] * torch.tensor([1, 9])


DRAWS = Draws(0, 3, range(4))
LABELS = torch.tensor([2, 0, 1, 1])


def pictures(seed):
    return 2 * torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.fixture
def adversary():
    """An adversary whose model returns `pictures(1)` for every input."""
    return Adversary(Watched(), AdversaryOptions(gan_weight=1.0), lambda batch, draws: pictures(1))


def test_the_discriminator_sees_real_and_made_images_augmented_with_their_own_labels(adversary):
    loss = adversary.loss(Batch(pictures(0), of_classes(LABELS)), DRAWS)
    ((seen, labels),) = adversary.network.calls
    real, fake = (differentiable_augmentation(pictures(i), DRAWS, name) for i, name in enumerate(("real", "fake")))
    assert torch.equal(seen, torch.cat([real, fake]))
    assert labels.tolist() == [*LABELS.tolist(), *LABELS.tolist()]
    logits = seen.mean((1, 2, 3))[:, None] * torch.tensor([0.5, 4.5])
    hinge = ((1 - logits[:4]).relu() + (1 + logits[4:]).relu()).sum(1) / 2
    torch.testing.assert_close(loss.terms["discriminator"], hinge)
    torch.testing.assert_close(loss.total, hinge.mean())


def test_the_model_s_images_are_judged_as_the_discriminator_learned_to_see_them(adversary):
    fake = pictures(1).requires_grad_()
    loss = adversary.generator_loss(fake, of_classes(LABELS), DRAWS)
    ((seen, labels),) = adversary.network.calls
    assert torch.equal(seen, differentiable_augmentation(fake, DRAWS, "fake")) and labels is LABELS
    torch.testing.assert_close(loss, -2.5 * seen.mean((1, 2, 3)))
    loss.sum().backward()
    assert fake.grad.abs().amax((1, 2, 3)).min() > 0 and adversary.network.weight.grad is None


def test_the_optimiser_of_the_discriminator_in_numbers():
    """RAdam does not rectify its first steps. At beta 1/2 the bias-corrected mean of gradients 1 and 0 is 1/3."""
    network = Watched()
    options = AdversaryOptions(gan_weight=1.0, discriminator_learning_rate=0.03)
    optimizer = Adversary(network, options, None).optimizer()
    for gradient in (1.0, 0.0):
        network.weight.grad = torch.tensor(gradient)
        optimizer.step()
    assert network.weight.item() == pytest.approx(0.5 - 0.03 * (1 + 1 / 3), rel=1e-6)
    assert optimizer.defaults["betas"] == (0.5, 0.9) and not optimizer.defaults["weight_decay"]


@pytest.mark.parametrize("size, factor", [(1e-3, 10.0), (0.5, 2.0), (1e3, 0.01)])
def test_a_balanced_weight_stays_within_both_limits(size, factor):
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    part = Part("gan", size * w, 0.7, (0.01, 10.0))
    total, terms = balanced(Part("ctm", w * 1.0), [part], w, lambda value: value)
    assert terms["gan_weight"].item() == pytest.approx(0.7 * factor, rel=1e-3)
    assert total.item() == pytest.approx(1 + 0.7 * factor * size, rel=1e-3)

"""The discriminator of a method, which learns to tell generated images from real ones.

Hinge loss on augmented images, as in the authors' code of CTM (Kim et al. 2023, arXiv:2310.02279). Model and
discriminator take turns: a training step trains one of them and leaves the other unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cm_diffusers.core.conditions import Condition, call_network, keywords_for
from cm_diffusers.core.differentiable_augmentation import differentiable_augmentation
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.radam import RAdam
from cm_diffusers.objectives.base import Batch, Loss
from cm_diffusers.objectives.options import STEPS, Length, Options, option


@dataclass(frozen=True)
class AdversaryOptions(Options):
    gan_weight: float = option(0.0, "Weight of the adversarial loss; 0 trains without a discriminator.", "[0, 1e6]")
    discriminator_start_step: Length = option(
        0, "First training step with the adversarial loss; a number below 1 is a share of the run.", STEPS
    )
    discriminator_period: int = option(
        2,
        "Once the adversarial loss has started, one step in this many trains the discriminator in place of the model.",
        "[2, 1e6]",
    )
    discriminator_learning_rate: float = option(
        2e-3, "Learning rate of the discriminator (RAdam with betas 0.5 and 0.9).", "[1e-12, 1e3]"
    )
    discriminator_backbone: str | None = option(
        None,
        "Vision model of transformers whose features the discriminator sees: a folder or a Hub id such as"
        " facebook/dinov2-small. The default is a small convolutional network on pixels, which needs no download.",
        place="path or Hub id",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.discriminator_backbone is not None and not self.gan_weight:
            raise ValueError(
                "discriminator_backbone has no effect, because gan_weight 0 leaves out the discriminator; set"
                " gan_weight above 0."
            )


class Adversary:
    """A discriminator as the engine trains it: a network with its own optimiser and its own training steps.

    Args:
        network: returns logits (B, n) for images (B, C, H, W) and their condition.
        options: its learning rate and its turns.
        fakes: returns the images (B, C, H, W) that the model generates for a batch.
    """

    def __init__(self, network: nn.Module, options: AdversaryOptions, fakes: Callable[[Batch, Draws], Tensor]):
        self.network, self.options, self.fakes = network, options, fakes
        self.model: Callable = network

    def attach(self, model: Callable) -> None:
        """Let the discriminator's loss call `model`, the network inside an engine's wrapper (DDP)."""
        self.model = model

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam as in StyleGAN-XL (Sauer et al. 2022, arXiv:2202.00273), rectified as in the authors' code of CTM."""
        return RAdam(self.network.parameters(), self.options.discriminator_learning_rate, (0.5, 0.9))

    def is_on(self, step: int) -> bool:
        """Whether `step` has an adversarial loss."""
        return step >= self.options.discriminator_start_step

    def has_turn(self, step: int) -> bool:
        """Whether `step` trains the discriminator in place of the model."""
        since = step - self.options.discriminator_start_step
        return since >= 0 and since % self.options.discriminator_period == 0

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        """The hinge loss of the discriminator: max(0, 1 - D(real)) + max(0, 1 + D(fake)).

        `batch` has the real images; `draws` are the random numbers of the step.
        """
        with torch.no_grad():
            fake = self.fakes(batch, draws)
        real = differentiable_augmentation(batch.samples, draws, "real")
        fake = differentiable_augmentation(fake, draws, "fake")
        both, condition = torch.cat([real, fake]), batch.condition.joined(batch.condition)
        real, fake = call_network(self.model, both, condition=condition).to(fake.dtype).chunk(2)
        per_sample = ((1 - real).relu() + (1 + fake).relu()).mean(1)
        nothing = per_sample.new_zeros(0)  # there is no loss of the model by noise level
        return Loss(per_sample.mean(), nothing, nothing, {"discriminator": per_sample.detach()})

    def generator_loss(self, fake: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """-D(fake) (B,) of images `fake` (B, C, H, W) under `condition`.

        Gradients reach `fake` but not the discriminator. `draws` are the random numbers of the augmentation.
        """
        frozen = {name: value.detach() for name, value in self.network.state_dict(keep_vars=True).items()}
        pictures = differentiable_augmentation(fake, draws, "fake")
        keywords = dict(keywords_for(self.network, condition))
        return -functional_call(self.network, frozen, (pictures,), keywords).to(fake.dtype).mean(1)

"""What every training method is to the engine: a loss, and the pipeline that its result samples with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.core.denoisers import Denoiser
from cm_diffusers.core.draws import Draws
from cm_diffusers.objectives.options import in_steps
from cm_diffusers.objectives.spec import ModelSpec


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W) in [-1, 1] or latents, float32, and class labels (B,), int64, of conditional models.

    With `augment_labels` (B, n) the network is told how each image was augmented. Where class labels are left out they
    are that of no class, the network's `num_class_embeds`.
    """

    images: Tensor
    class_labels: Tensor | None = None
    augment_labels: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """`total` is back-propagated; the losses (B,), before learned weights, and noise levels (B,) are logged.

    So are the means of `terms`, the parts of the loss and their weights by name, of any shape.
    """

    total: Tensor
    per_sample: Tensor
    sigma: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def mean(cls, per_sample: Tensor, sigma: Tensor, log_variance: Tensor | None = None) -> "Loss":
        """The mean; with a learned `log_variance` (B,), all noise levels weigh alike (arXiv:2312.02696, eq. 21)."""
        weighted = per_sample if log_variance is None else (-log_variance).exp() * per_sample + log_variance
        return cls(weighted.mean(), per_sample.detach(), sigma)


@dataclass(frozen=True)
class Facts:
    """A row of the README's table of methods."""

    what: str
    teacher: str
    target: str
    times: str
    distance: str
    weight: str
    paper: str
    jvp: str = "no"


class Objective(ABC):
    """A method. It knows nothing of Accelerate, datasets, files or the Hub; the engine drives it.

    Args:
        network: what is trained, a model of diffusers called as `network(sample, label, class_labels=...)`.
        spec: its parameterisation.
        options: the method's own settings, an instance of its `Options`.
        total_steps: length of the run, for curricula that are given as shares of it.
        pretrained: whether `network` is a trained model already.
        teacher: the denoiser that is distilled, for methods that have one.

    A method sets `sigma_min`, the lowest level of its samplers, `floor`, where EDM's scalings make its denoiser the
    identity, and `keeps`, what saved networks may predict that it trains as they are, beside its own `prediction`.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    sigma_min: ClassVar[float]
    floor: float
    keeps: ClassVar[tuple[str, ...]] = ()
    two_times: ClassVar[bool] = False  # whether its network is told where to jump to
    compares_neighbours: ClassVar[bool] = False  # whether it trains on a difference that bfloat16 would round away
    teaches: ClassVar[bool] = False  # whether it makes teachers, and trains on augmented images and left-out labels
    terms: ClassVar[tuple[str, ...]] = ()  # names of the terms of its losses
    facts: ClassVar[Facts]

    def __init__(
        self,
        network: nn.Module,
        spec: ModelSpec,
        options: Any,
        total_steps: int,
        pretrained: bool = False,
        teacher: Denoiser | None = None,
    ):
        self.network, self.spec, self.total_steps = network, spec, total_steps
        self.options = in_steps(options, total_steps)
        self.model: Callable = network  # the engine puts the wrapped (DDP, compiled, autocast) network here
        self.teacher = teacher
        if spec.prediction != "edm":
            self.floor = 0.0  # only EDM's scalings can have another
        self.auxiliary: dict[str, nn.Module] = {}  # other networks that are state: saved in checkpoints
        self.adversary = None  # an `Adversary`: a second player, with turns of its own
        self.average: Callable[[Tensor], Tensor] = lambda value: value  # over processes; the engine puts its own here

    @classmethod
    def prediction(cls, options: Any) -> str:
        """What the method's networks predict, if they are not saved ones of a kind that it keeps."""
        return "edm"

    @classmethod
    def adapt(cls, network: nn.Module, spec: ModelSpec) -> nn.Module:
        """A network with this parameterisation as the method trains it, for example with a second time."""
        return network

    def denoiser(self, network: Callable | None = None) -> Denoiser:
        """D of the trained network, or of another one with the same parameterisation; the identity at the floor."""
        return self.spec.denoiser(self.model if network is None else network, self.floor)

    def model_for(self, batch: Batch) -> Callable:
        """`model`, told in every call how the images of `batch` were augmented, where they were."""
        if batch.augment_labels is None:
            return self.model
        return partial(self.model, augment_labels=batch.augment_labels)

    def key_dropout(self, draws: Draws) -> None:
        """Tie the dropout masks to the rows of the coming batch, in networks that can."""
        for network in (self.network, *self.auxiliary.values()):
            if hasattr(network, "key_dropout"):
                network.key_dropout(draws.keys("dropout"))

    @abstractmethod
    def loss(self, batch: Batch, draws: Draws) -> Loss:
        """The loss of `batch`; a pure function of the weights, `batch` and `draws` (whose `step` curricula read)."""

    @abstractmethod
    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        """The pipeline that samples with `network`, which holds the trained weights or an average of them."""

    def after_step(self, step: int) -> None:
        """Called after the optimiser's step number `step`, for methods that keep a moving target."""

    def describe(self, step: int) -> dict[str, float]:
        """Values of the curricula at `step`, for the log."""
        return {}

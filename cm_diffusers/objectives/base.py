"""What every training method is to the engine: a loss, and the pipeline that its result samples with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.core.conditions import NOTHING, Condition
from cm_diffusers.core.denoisers import Denoiser
from cm_diffusers.core.draws import Draws
from cm_diffusers.objectives.spec import ModelSpec


if TYPE_CHECKING:
    from cm_diffusers.objectives.adversarial import Adversary


@dataclass(frozen=True)
class Batch:
    """Samples (B, ...), float32, as images in [-1, 1] or latents, and what the network is told of each of them."""

    samples: Tensor
    condition: Condition = NOTHING


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
class Summary:
    """What a method is in words, for the README's table of methods and for model cards."""

    what: str
    target: str
    times: str
    distance: str
    weight: str
    paper: str
    teacher: str = "a diffusion model"  # where it has one


class Objective(ABC):
    """A method. It knows nothing of Accelerate, datasets, files or the Hub; the engine drives it.

    Args:
        network: what is trained, a model of diffusers, called as `core.conditions.call_network` does.
        spec: its parameterisation.
        options: the method's own settings, an instance of its `Options`.
        total_steps: length of the run, for curricula; the options are resolved for it, see `Options.resolved`.
        pretrained: whether `network` is a trained model already.
        teacher: the denoiser that is distilled, for methods that have one.

    A method sets `sigma_min`, the lowest level of its samplers, `floor`, where EDM's scalings make its denoiser the
    identity, and of the declarations below those that hold; the engine, the table of methods and the tests of all
    methods read them. Its `Options` are `TeacherOptions` where it can have a teacher, and `AdversaryOptions` where it
    can have a discriminator, which the engine builds and hands on as `discriminator`.

    Raises:
        ValueError: there is no teacher, and the method needs one.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    sigma_min: ClassVar[float]
    floor: float
    needs_teacher: ClassVar[bool] = False  # whether there is nothing to learn without one
    needs_tangents: ClassVar[bool] = False  # whether it follows the network's forward derivative
    two_times: ClassVar[bool] = False  # whether its network is told where to jump to
    has_target: ClassVar[bool] = False  # whether it compares with an average of the network, `auxiliary["target"]`
    passes: ClassVar[int] = 1  # passes of the network with gradient in a step
    compares_neighbours: ClassVar[bool] = False  # whether it trains on a difference that bfloat16 would round away
    trains_teachers: ClassVar[bool] = False  # whether its models teach; it can train with `augment`, `label_dropout`
    native_predictions: ClassVar[tuple[str, ...]] = ()  # of saved networks it trains as they are, beside `prediction`
    levels: ClassVar[tuple[str, ...]] = ("sigma_data", "sigma_min", "sigma_max")  # that its scheduler's config holds
    terms: ClassVar[tuple[str, ...]] = ()  # names of the terms of its losses
    summary: ClassVar[Summary]

    def __init__(
        self,
        network: nn.Module,
        spec: ModelSpec,
        options: Any,
        total_steps: int,
        pretrained: bool = False,
        teacher: Denoiser | None = None,
    ):
        if self.needs_teacher and teacher is None:
            raise ValueError(missing_teacher(self.name))
        self.network, self.spec, self.total_steps = network, spec, total_steps
        self.options = options.resolved(total_steps, pretrained)
        self.model: Callable = network
        self.teacher = teacher
        if spec.prediction != "edm":
            self.floor = 0.0  # only EDM's scalings can have another
        self.auxiliary: dict[str, nn.Module] = {}  # other networks that are state: saved in checkpoints
        self.adversary: Adversary | None = None  # a second player, with turns of its own
        self.average: Callable[[Tensor], Tensor] = lambda value: value

    def attach(self, model: Callable, average: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        """Hand over what an engine makes for the losses, which call `network` itself in one process without this.

        Args:
            model: takes the place of `network` in the losses, and is called as it is: wrapped (DDP), compiled, cast.
            average: gives the mean over all processes of a tensor of any shape.
        """
        self.model, self.average = model, average

    @classmethod
    def prediction(cls, options: Any) -> str:
        """What the method's networks predict, if they are not saved ones with one of its `native_predictions`."""
        return "edm"

    @classmethod
    def adapt(cls, network: nn.Module, spec: ModelSpec) -> nn.Module:
        """A network with this parameterisation as the method trains it, for example with a second time."""
        return network

    def denoiser(self, network: Callable | None = None) -> Denoiser:
        """D of the trained network, or of another one with the same parameterisation; the identity at the floor."""
        return self.spec.denoiser(self.model if network is None else network, self.floor)

    def key_dropout(self, draws: Draws) -> None:
        """Tie the dropout masks to the rows of the coming batch, in networks that can."""
        for network in (self.network, *self.auxiliary.values()):
            key_dropout: Callable | None = getattr(network, "key_dropout", None)
            if key_dropout is not None:
                key_dropout(draws.keys("dropout"))

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


def missing_teacher(method: str) -> str:
    """What is said where a method lacks the teacher that it needs."""
    return f"{method} distils a teacher: give --pretrained_teacher_model, a diffusion model's folder or Hub id."

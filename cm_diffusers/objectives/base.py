"""The interface between training methods and the engine: a loss, and the pipeline that samples with the result."""

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
    """Training samples (B, ...), float32, and their condition. Samples are images in [-1, 1] or latents."""

    samples: Tensor
    condition: Condition = NOTHING


@dataclass(frozen=True)
class Loss:
    """The loss of a batch. `total` is back-propagated; the log receives the rest.

    Args:
        total: a scalar.
        per_sample: the losses (B,), before learned weights, without gradient.
        sigma: the noise levels (B,).
        terms: parts of the loss and their weights by name, of any shape; their means are logged.
    """

    total: Tensor
    per_sample: Tensor
    sigma: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def mean(cls, per_sample: Tensor, sigma: Tensor, log_variance: Tensor | None = None) -> "Loss":
        """The loss whose total is the mean of `per_sample` (B,) at the noise levels `sigma` (B,).

        A learned `log_variance` (B,) gives all noise levels the same weight (arXiv:2312.02696, eq. 21).
        """
        weighted = per_sample if log_variance is None else (-log_variance).exp() * per_sample + log_variance
        return cls(weighted.mean(), per_sample.detach(), sigma)


@dataclass(frozen=True)
class Summary:
    """A description of a method, for the README's table of methods and for model cards."""

    what: str
    target: str
    times: str
    distance: str
    weight: str
    paper: str
    teacher: str = "a diffusion model"  # if it has one


class Objective(ABC):
    """A training method, which the engine drives. It does not depend on Accelerate, datasets, files or the Hub.

    A method sets `sigma_min`, the lowest level of its samplers, and `floor`, the level at which EDM's scalings make
    its denoiser the identity. It also sets those declarations below that differ from their defaults; the engine, the
    table of methods and the tests of all methods read them. Its `Options` derive from `TeacherOptions` if it can have
    a teacher. They derive from `AdversaryOptions` if it can have a discriminator, which the engine builds and passes
    as `discriminator`.

    Args:
        network: the diffusers model to train, which `core.conditions.call_network` calls.
        spec: its parameterisation.
        options: the settings of the method, an instance of its `Options`.
        total_steps: training steps of the run, for curricula. The options are resolved for it (`Options.resolved`).
        pretrained: whether `network` is already trained.
        teacher: the denoiser to distil, for methods with a teacher.

    Raises:
        ValueError: the method needs a teacher and has none.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    sigma_min: ClassVar[float]
    floor: float
    needs_teacher: ClassVar[bool] = False  # whether it cannot train without a teacher
    needs_tangents: ClassVar[bool] = False  # whether it needs the network's forward derivative
    two_times: ClassVar[bool] = False  # whether its network also receives the time to jump to
    has_target: ClassVar[bool] = False  # whether it has a target network, the average in `auxiliary["target"]`
    passes: ClassVar[int] = 1  # passes of the network with gradient in a step
    compares_neighbours: ClassVar[bool] = False  # whether it trains on a difference that bfloat16 would round away
    trains_teachers: ClassVar[bool] = False  # whether its models can teach; allows `augment` and `label_dropout`
    native_predictions: ClassVar[tuple[str, ...]] = ()  # of saved networks that it trains unchanged
    levels: ClassVar[tuple[str, ...]] = ("sigma_data", "sigma_min", "sigma_max")  # in the config of its scheduler
    terms: ClassVar[tuple[str, ...]] = ()  # names of the terms in its losses
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
            self.floor = 0.0  # only EDM's scalings can have another floor
        self.auxiliary: dict[str, nn.Module] = {}  # other networks with state, which checkpoints contain
        self.adversary: Adversary | None = None  # the discriminator, which has its own training steps
        self.average: Callable[[Tensor], Tensor] = lambda value: value

    def attach(self, model: Callable, average: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        """Set the model that losses call, and the average over processes.

        Without this call losses use `network` itself, in one process.

        Args:
            model: takes the place of `network` in the losses, which call it like `network`: wrapped (DDP), compiled
                or cast.
            average: returns the mean over all processes of a tensor of any shape.
        """
        self.model, self.average = model, average

    @classmethod
    def prediction(cls, options: Any) -> str:
        """The prediction of the method's networks under `options`.

        A saved network with one of `native_predictions` keeps its own prediction.
        """
        return "edm"

    @classmethod
    def adapt(cls, network: nn.Module, spec: ModelSpec) -> nn.Module:
        """Turn `network`, whose parameterisation is `spec`, into the network that the method trains.

        For example, the result has a second time input. By default it is `network` itself.
        """
        return network

    def denoiser(self, network: Callable | None = None) -> Denoiser:
        """The denoiser D of the trained network, or of another `network` with the same parameterisation.

        It is the identity at `floor`.
        """
        return self.spec.denoiser(self.model if network is None else network, self.floor)

    def key_dropout(self, draws: Draws) -> None:
        """Tie the dropout masks of the next batch to the rows of `draws`, in networks with keyed dropout."""
        networks: list[Any] = [self.network, *self.auxiliary.values()]
        keyed = [network for network in networks if hasattr(network, "key_dropout")]
        keys = draws.keys("dropout") if keyed else None
        for network in keyed:
            network.key_dropout(keys, draws.rule)

    @abstractmethod
    def loss(self, batch: Batch, draws: Draws) -> Loss:
        """The loss of `batch`: a pure function of the weights, `batch` and `draws`. Curricula read `draws.step`."""

    @abstractmethod
    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        """The pipeline that samples with `network`, which holds the trained weights or an average of them."""

    def after_step(self, step: int) -> None:
        """Update the target network after training step number `step`, in methods that have one."""

    def describe(self, step: int) -> dict[str, float]:
        """Values of the curricula at `step`, for the log."""
        return {}


def missing_teacher(method: str) -> str:
    """The error message for `method`, the name of a method that lacks its teacher."""
    return f"{method} distils a teacher: give --pretrained_teacher_model, a diffusion model's folder or Hub id."

"""The settings of CTM (`ctm.py`)."""

from dataclasses import dataclass, replace
from typing import Self

from cm_diffusers.objectives.adversarial import AdversaryOptions
from cm_diffusers.objectives.consistency import SOLVERS, check_distance, distance_option
from cm_diffusers.objectives.options import PRETRAINING, STEPS, Length, TeacherOptions, option


@dataclass(frozen=True)
class CTMOptions(TeacherOptions, AdversaryOptions):
    trajectory: str | None = option(
        None,
        "What leads from t to u: the ODE of the teacher (default where one is given), the ODE of the model's own"
        " denoiser (default without a teacher), or the straight line from the data, as CT.",
        choices=["teacher", "self", "data"],
    )
    solver: str = option("heun", "Solver of that ODE; DDIM's step is Euler's.", choices=list(SOLVERS))
    solver_steps: int = option(
        17, "Most steps of the grid from t to u; their number k is drawn with weight k.", "[1, 1e6]"
    )
    num_scales: int = option(
        18, "Levels of the Karras grid (18 for CIFAR-10, 40 for ImageNet-64 in the paper).", "[2, 1e6]"
    )
    mu: float = option(0.999, "Decay of the average that jumps on from s to the data.", "[0, 1]")
    distance: str = distance_option("pseudo_huber", "; the paper's is lpips")
    huber_c: float = option(0.03, "c of the pseudo-Huber distance; 0 is the plain norm.", "[0, 1e6]")
    dsm_weight: float = option(1.0, "Weight of the diffusion model's loss.", "[0, 1e6]")
    balance: str = option(
        "adaptive",
        "The weights of the other losses: as they are (fixed), or times the ratio of CTM's gradient to theirs at the"
        " last layer.",
        choices=["adaptive", "fixed"],
    )
    pretrain_steps: Length = option(
        0,
        "First steps, or below 1 their share of the run, with the diffusion model's loss alone.",
        STEPS,
        phases=PRETRAINING,
    )
    p_mean: float = option(-1.2, "Mean of ln sigma of half of the diffusion model's noise levels.", "[-20, 20]")
    p_std: float = option(1.2, "Standard deviation of the same; the other half covers the high levels.", "[1e-3, 10]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.trajectory == "teacher") and self.pretrained_teacher_model is None:
            raise ValueError("trajectory 'teacher' needs a teacher: give --pretrained_teacher_model.")
        if self.trajectory in ("self", "data") and self.pretrained_teacher_model is not None:
            raise ValueError(
                f"trajectory {self.trajectory!r} would not use the teacher; to start from its weights give it as"
                " --pretrained_model_name_or_path."
            )
        check_distance(self.distance)
        if self.solver_steps >= self.num_scales:
            raise ValueError(f"solver_steps must be below num_scales, {self.num_scales}; got {self.solver_steps}.")
        shares = [0 < length < 1 for length in (self.pretrain_steps, self.discriminator_start_step)]
        comparable = shares[0] == shares[1] or not self.discriminator_start_step  # else once the run's length is known
        if self.gan_weight and comparable and self.discriminator_start_step < self.pretrain_steps:
            raise ValueError(
                f"discriminator_start_step must be at least pretrain_steps, {self.pretrain_steps}: before, there is"
                " nothing to judge."
            )

    def resolved(self, total_steps: int, pretrained: bool = False, dimensions: int | None = None) -> Self:
        options = super().resolved(total_steps, pretrained, dimensions)
        if self.trajectory is None:
            options = replace(options, trajectory="self" if self.teacher is None else "teacher")
        return options

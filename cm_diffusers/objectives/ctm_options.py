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
        "Path from level t to level u: the teacher's ODE (teacher), the ODE of the model's own denoiser (self), or the"
        " straight line from the data as in CT (data). The default is teacher if there is one, else self.",
        choices=["teacher", "self", "data"],
    )
    solver: str = option(
        "heun", "Solver of the ODE from level t to level u; in sigma, ddim equals euler.", choices=list(SOLVERS)
    )
    solver_steps: int = option(
        17,
        "Largest number of solver steps from level t to level u; a number k is drawn with a probability in proportion"
        " to k.",
        "[1, 1e6]",
    )
    num_scales: int = option(
        18, "Levels in the Karras grid; the paper uses 18 for CIFAR-10 and 40 for ImageNet-64.", "[2, 1e6]"
    )
    mu: float = option(
        0.999, "EMA decay of the target network, which continues jumps from level s to the data.", "[0, 1]"
    )
    distance: str = distance_option("pseudo_huber", " The paper uses lpips.")
    huber_c: float = option(
        0.03, "Constant c of the pseudo-Huber distance sqrt(|a - b|^2 + c^2) - c; 0 gives the plain norm.", "[0, 1e6]"
    )
    dsm_weight: float = option(1.0, "Weight of the diffusion loss (denoising score matching).", "[0, 1e6]")
    balance: str = option(
        "adaptive",
        "How to weigh the diffusion and adversarial losses: by their weights alone (fixed), or also by the ratio of"
        " the CTM loss's gradient to theirs at the last layer (adaptive).",
        choices=["adaptive", "fixed"],
    )
    pretrain_steps: Length = option(
        0,
        "First training steps with the diffusion loss alone; a number below 1 is a share of the run.",
        STEPS,
        phases=PRETRAINING,
    )
    p_mean: float = option(
        -1.2,
        "Mean of ln(sigma) for half of the noise levels in the diffusion loss; the other half covers high levels.",
        "[-20, 20]",
    )
    p_std: float = option(
        1.2,
        "Standard deviation of ln(sigma) for half of the noise levels in the diffusion loss; the other half covers"
        " high levels.",
        "[1e-3, 10]",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.trajectory == "teacher") and self.pretrained_teacher_model is None:
            raise ValueError("trajectory 'teacher' needs a teacher: give --pretrained_teacher_model.")
        if self.trajectory in ("self", "data") and self.pretrained_teacher_model is not None:
            raise ValueError(
                f"trajectory {self.trajectory!r} would not use the teacher; to start from the teacher's weights, give"
                " it as --pretrained_model_name_or_path."
            )
        check_distance(self.distance)
        if self.solver_steps >= self.num_scales:
            raise ValueError(f"solver_steps must be below num_scales, {self.num_scales}; got {self.solver_steps}.")
        shares = [0 < length < 1 for length in (self.pretrain_steps, self.discriminator_start_step)]
        comparable = shares[0] == shares[1] or not self.discriminator_start_step  # else `resolved` repeats this check
        if self.gan_weight and comparable and self.discriminator_start_step < self.pretrain_steps:
            raise ValueError(
                f"discriminator_start_step must be at least pretrain_steps, {self.pretrain_steps}, because pretraining"
                f" has no adversarial loss; got {self.discriminator_start_step}."
            )

    def resolved(self, total_steps: int, pretrained: bool = False, dimensions: int | None = None) -> Self:
        options = super().resolved(total_steps, pretrained, dimensions)
        if self.trajectory is None:
            options = replace(options, trajectory="self" if self.teacher is None else "teacher")
        return options

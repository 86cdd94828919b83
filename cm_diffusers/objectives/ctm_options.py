"""The settings of CTM (`ctm.py`)."""

from dataclasses import dataclass

from cm_diffusers.objectives.adversarial import AdversaryOptions
from cm_diffusers.objectives.consistency import DISTANCES, SOLVERS, TEACHER_HELP, check_distance
from cm_diffusers.objectives.options import Length, check_between, option


@dataclass(frozen=True)
class CTMOptions(AdversaryOptions):
    pretrained_teacher_model: str | None = option(None, TEACHER_HELP)
    trajectory: str | None = option(
        None,
        "What leads from t to u: the ODE of the teacher (default where one is given), the ODE of the model's own"
        " denoiser (default without a teacher), or the straight line from the data, as CT.",
        choices=["teacher", "self", "data"],
    )
    solver: str = option("heun", "Solver of that ODE; DDIM's step is Euler's.", choices=list(SOLVERS))
    solver_steps: int = option(17, "Most steps of the grid from t to u; their number k is drawn with weight k.")
    num_scales: int = option(18, "Levels of the Karras grid (18 for CIFAR-10, 40 for ImageNet-64 in the paper).")
    mu: float = option(0.999, "Decay of the average that jumps on from s to the data.")
    distance: str = option("pseudo_huber", "Distance of estimate and target; the paper's is lpips.", choices=DISTANCES)
    huber_c: float = option(0.03, "c of the pseudo-Huber distance; 0 is the plain norm.")
    dsm_weight: float = option(1.0, "Weight of the diffusion model's loss.")
    balance: str = option(
        "adaptive",
        "The weights of the other losses: as they are (fixed), or times the ratio of CTM's gradient to theirs at the"
        " last layer.",
        choices=["adaptive", "fixed"],
    )
    pretrain_steps: Length = option(
        0, "First steps, or below 1 their share of the run, with the diffusion model's loss alone."
    )
    p_mean: float = option(-1.2, "Mean of ln sigma of half of the diffusion model's noise levels.")
    p_std: float = option(1.2, "Standard deviation of the same; the other half covers the high levels.")

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
        check_between("num_scales", self.num_scales, 2, 1 << 20)
        check_between("solver_steps", self.solver_steps, 1, self.num_scales - 1)
        check_between("mu", self.mu, 0, 1)
        check_between("huber_c", self.huber_c, 0, 1e6)
        check_between("dsm_weight", self.dsm_weight, 0, 1e6)
        shares = [0 < length < 1 for length in (self.pretrain_steps, self.discriminator_start_step)]
        comparable = shares[0] == shares[1] or not self.discriminator_start_step  # else once the run's length is known
        if self.gan_weight and comparable and self.discriminator_start_step < self.pretrain_steps:
            raise ValueError(
                f"discriminator_start_step must be at least pretrain_steps, {self.pretrain_steps}: before, there is"
                " nothing to judge."
            )
        check_between("p_mean", self.p_mean, -20, 20)
        check_between("p_std", self.p_std, 1e-3, 10)

"""Easy consistency distillation, ECD: ECT with a teacher (named in Geng et al. 2024, arXiv:2406.14548, section 3).

Unlike ECT the point at r is not on the straight line to the data but where the teacher's ODE leads from x_t in one
solver step; where r = 0, its end is the target. The student starts from the teacher's weights.
"""

from dataclasses import dataclass

from torch import Tensor

from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.denoisers import Denoiser
from cm_diffusers.objectives.base import Summary
from cm_diffusers.objectives.consistency import SOLVERS, teacher_step
from cm_diffusers.objectives.ect import ECT, ECTOptions
from cm_diffusers.objectives.options import PRETRAINING, STEPS, Length, TeacherOptions, option


@dataclass(frozen=True)
class ECDOptions(ECTOptions, TeacherOptions):
    solver: str = option("heun", "Solver of the teacher's ODE.", choices=list(SOLVERS))
    pretrain_steps: Length | None = option(
        0,
        "Steps with r = 0, or below 1 their share of the run, where the teacher's denoised image is the target.",
        STEPS,
        phases=PRETRAINING,
    )
    huber_c: float = option(
        0.03, "c of the pseudo-Huber distance; this one is iCT's for 32x32 colour images.", "[0, 1e6]"
    )


class ECD(ECT):
    """E[ w(t, r) d(D(x_t, t), sg D(ODE step of the teacher from x_t to r, r)) ]."""

    teacher: Denoiser
    name = "ecd"
    Options = ECDOptions
    needs_teacher = True
    summary = Summary(
        what="ECT from a teacher, 1 to 4 calls",
        target="itself at r < t, no gradient",
        times="ln sigma ~ N(-1.1, 2^2)",
        distance="pseudo-Huber, c = 0.03",
        weight="1 / (t - r)",
        paper="[Geng et al. 2024](https://arxiv.org/abs/2406.14548), sec. 3",
    )

    def point_at(
        self, r: Tensor, *, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, condition: Condition
    ) -> Tensor:
        return teacher_step(self.teacher, x_t, t=t, u=r, condition=condition, solver=self.options.solver)

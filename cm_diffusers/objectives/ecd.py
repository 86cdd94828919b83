"""Easy consistency distillation, ECD: ECT with a teacher (named in Geng et al. 2024, arXiv:2406.14548, section 3).

The point at r is where one solver step of the teacher's ODE leads from x_t; in ECT it lies on the straight line to
the data. For r = 0 the end of this step is the target. The student starts from the teacher's weights.
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
    solver: str = option(
        "heun", "Solver for the step along the teacher's ODE; in sigma, ddim equals euler.", choices=list(SOLVERS)
    )
    pretrain_steps: Length | None = option(
        0,
        "First training steps with the teacher's denoised image as target (r = 0); a number below 1 is a share of the"
        " run.",
        STEPS,
        phases=PRETRAINING,
    )
    huber_c: float = option(
        0.03,
        "Constant c of the pseudo-Huber distance sqrt(|a - b|^2 + c^2) - c. The default is iCT's for colour images of"
        " 32 x 32.",
        "[0, 1e6]",
    )


class ECD(ECT):
    """E[ w(t, r) d(D(x_t, t), sg D(ODE step of the teacher from x_t to r, r)) ].

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import ECD, Batch, ModelSpec
        >>> spec = ModelSpec(sigma_data=0.5)
        >>> unet, trained = (build_unet("tiny", (8, 8), channels=1) for _ in range(2))
        >>> method = ECD(unet, spec, ECD.Options(), total_steps=1000, teacher=spec.denoiser(trained))
        >>> method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4))).total.backward()
        >>> pipe = method.pipeline(unet)
    """

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

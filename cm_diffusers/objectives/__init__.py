"""The training methods, one file each."""

from cm_diffusers.objectives.base import Batch, Loss, ModelSpec, Objective
from cm_diffusers.objectives.diffusion import Diffusion
from cm_diffusers.objectives.ect import ECT


OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (Diffusion, ECT)}

__all__ = ["OBJECTIVES", "Batch", "Diffusion", "ECT", "Loss", "ModelSpec", "Objective"]

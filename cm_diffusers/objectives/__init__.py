"""The training methods, one file each."""

from cm_diffusers.objectives.base import Batch, Loss, ModelSpec, Objective
from cm_diffusers.objectives.cd import CD
from cm_diffusers.objectives.ct import CT
from cm_diffusers.objectives.diffusion import Diffusion
from cm_diffusers.objectives.ecd import ECD
from cm_diffusers.objectives.ect import ECT
from cm_diffusers.objectives.ict import ICT


OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (Diffusion, CT, ICT, CD, ECT, ECD)}

__all__ = ["CD", "CT", "ECD", "ECT", "ICT", "OBJECTIVES", "Batch", "Diffusion", "Loss", "ModelSpec", "Objective"]

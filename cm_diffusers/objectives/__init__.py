"""The training methods, one file for each."""

from cm_diffusers.objectives.base import Batch, Loss, Objective
from cm_diffusers.objectives.cd import CD
from cm_diffusers.objectives.cdm import CDM
from cm_diffusers.objectives.ct import CT
from cm_diffusers.objectives.ctm import CTM
from cm_diffusers.objectives.diffusion import Diffusion
from cm_diffusers.objectives.ecd import ECD
from cm_diffusers.objectives.ect import ECT
from cm_diffusers.objectives.ict import ICT
from cm_diffusers.objectives.lcm import LCM
from cm_diffusers.objectives.mean_flow import MeanFlow
from cm_diffusers.objectives.scm import SCD, SCT
from cm_diffusers.objectives.spec import ModelSpec
from cm_diffusers.objectives.tcd import TCD


METHODS = (Diffusion, CDM, CT, ICT, CD, LCM, TCD, ECT, ECD, SCT, SCD, MeanFlow, CTM)
OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in METHODS}

__all__ = ["OBJECTIVES", "Batch", "Loss", "ModelSpec", "Objective", *(cls.__name__ for cls in METHODS)]

"""Schedulers with the interface of diffusers.

They import only torch, numpy, diffusers and `core`, so that their code can be saved with a pipeline.
"""

from cm_diffusers.registration import of_the_library
from cm_diffusers.schedulers.ctm import CTMScheduler, CTMSchedulerOutput
from cm_diffusers.schedulers.multistep_consistency import (
    MultistepConsistencyScheduler,
    MultistepConsistencySchedulerOutput,
)
from cm_diffusers.schedulers.trigflow import TrigFlowScheduler, TrigFlowSchedulerOutput


__all__ = [
    "CTMScheduler",
    "CTMSchedulerOutput",
    "MultistepConsistencyScheduler",
    "MultistepConsistencySchedulerOutput",
    "TrigFlowScheduler",
    "TrigFlowSchedulerOutput",
]

of_the_library(CTMScheduler, MultistepConsistencyScheduler, TrigFlowScheduler)

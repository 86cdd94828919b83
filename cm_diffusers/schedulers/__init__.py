"""Schedulers in the form of diffusers. Each file imports only torch, numpy and diffusers, so that it can travel."""

from cm_diffusers.schedulers.multistep_consistency import (
    MultistepConsistencyScheduler,
    MultistepConsistencySchedulerOutput,
)
from cm_diffusers.schedulers.trigflow import TrigFlowScheduler, TrigFlowSchedulerOutput


__all__ = [
    "MultistepConsistencyScheduler",
    "MultistepConsistencySchedulerOutput",
    "TrigFlowScheduler",
    "TrigFlowSchedulerOutput",
]

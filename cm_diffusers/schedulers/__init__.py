"""Schedulers in the form of diffusers. Each file imports only torch, numpy and diffusers, so that it can travel."""

from cm_diffusers.schedulers.multistep_consistency import (
    MultistepConsistencyScheduler,
    MultistepConsistencySchedulerOutput,
)


__all__ = ["MultistepConsistencyScheduler", "MultistepConsistencySchedulerOutput"]

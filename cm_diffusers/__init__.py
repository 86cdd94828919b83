"""Consistency models and their relatives for diffusers: train them, share them, sample them in one to four steps."""

import cm_diffusers.parent  # noqa: F401  (first: it is to see what is there before the imports that take seconds)


# isort: split
import sys

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin  # diffusers looks its bases up in this namespace

from cm_diffusers.models import (
    DiTModel,
    EDMUNet2DModel,
    JVPUNet2DModel,
    TwoTimeModel,
)
from cm_diffusers.models.raw_sigma_unet import RawSigmaUNet2DModel  # of published checkpoints
from cm_diffusers.models.shuffle_unet import ShuffleUNet2DModel  # of published checkpoints
from cm_diffusers.pipelines import (
    ConsistencyPipeline,
    CTMPipeline,
    DenoisingPipeline,
    MeanFlowPipeline,
    TrigFlowPipeline,
)
from cm_diffusers.schedulers import CTMScheduler, MultistepConsistencyScheduler, TrigFlowScheduler


__version__ = "0.1.0"
__all__ = [
    "CTMPipeline",
    "CTMScheduler",
    "ConsistencyPipeline",
    "DenoisingPipeline",
    "DiTModel",
    "EDMUNet2DModel",
    "JVPUNet2DModel",
    "MeanFlowPipeline",
    "MultistepConsistencyScheduler",
    "TrigFlowPipeline",
    "TrigFlowScheduler",
    "TwoTimeModel",
]


def _register(*classes: type) -> None:
    """Let diffusers find our classes, so that saved models load without `trust_remote_code`.

    `save_pretrained` then writes ["cm_diffusers", <class>], `DiffusionPipeline.from_pretrained` finds our pipelines by
    name, and downloads from the Hub take `cm_diffusers` for a known library.
    """
    for cls in classes:
        cls.__module__ = __name__
        if issubclass(cls, DiffusionPipeline) and not hasattr(diffusers, cls.__name__):
            setattr(diffusers, cls.__name__, cls)
    setattr(diffusers.pipelines, __name__, sys.modules[__name__])


_register(ConsistencyPipeline, CTMPipeline, DenoisingPipeline, MeanFlowPipeline, TrigFlowPipeline)
_register(CTMScheduler, MultistepConsistencyScheduler, TrigFlowScheduler)
_register(DiTModel, EDMUNet2DModel, JVPUNet2DModel, RawSigmaUNet2DModel, ShuffleUNet2DModel, TwoTimeModel)
ConsistencyPipeline._scheduler_class = MultistepConsistencyScheduler

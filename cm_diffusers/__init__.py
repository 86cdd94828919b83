"""Consistency models and their relatives for diffusers: train them, share them, sample them in one to four steps.

Importing the library takes no time, because each class is loaded at its first use. The classes are registered with
diffusers as soon as diffusers is imported, so `DiffusionPipeline.from_pretrained` reads saved models without
`trust_remote_code`.
"""

import cm_diffusers.parent  # noqa: F401  (first: it must see the parent process before imports that take seconds)


# isort: split
import importlib
import sys
from typing import TYPE_CHECKING, Any

from cm_diffusers.registration import when_diffusers_is_imported


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

    from cm_diffusers.models import (
        DiTModel,
        EDMUNet2DModel,
        JVPUNet2DModel,
        RawSigmaUNet2DModel,
        ShuffleUNet2DModel,
        TwoTimeModel,
    )
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

PIPELINES = ("ConsistencyPipeline", "CTMPipeline", "DenoisingPipeline", "MeanFlowPipeline", "TrigFlowPipeline")
HOMES = {
    **dict.fromkeys(PIPELINES, "cm_diffusers.pipelines"),
    **dict.fromkeys(("CTMScheduler", "MultistepConsistencyScheduler", "TrigFlowScheduler"), "cm_diffusers.schedulers"),
    **dict.fromkeys(("DiTModel", "EDMUNet2DModel", "JVPUNet2DModel", "TwoTimeModel"), "cm_diffusers.models"),
    **dict.fromkeys(("RawSigmaUNet2DModel", "ShuffleUNet2DModel"), "cm_diffusers.models"),  # for published checkpoints
    # diffusers looks up its base classes in this namespace
    **dict.fromkeys(("DiffusionPipeline", "ModelMixin", "SchedulerMixin"), "diffusers"),
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})


when_diffusers_is_imported(sys.modules[__name__], PIPELINES)

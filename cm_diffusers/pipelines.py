"""The package `cm_diffusers.pipelines`, whose files are in the top-level folder `pipelines/`.

A wheel installs that folder inside this package.
"""

from pathlib import Path


_here = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_here / "pipelines", _here.parent / "pipelines") if folder.is_dir()][:1]

from cm_diffusers.pipelines.class_names import name_classes  # noqa: E402
from cm_diffusers.pipelines.consistency import ConsistencyPipeline  # noqa: E402
from cm_diffusers.pipelines.ctm import CTMPipeline  # noqa: E402
from cm_diffusers.pipelines.denoising import DenoisingPipeline  # noqa: E402
from cm_diffusers.pipelines.mean_flow import MeanFlowPipeline  # noqa: E402
from cm_diffusers.pipelines.trigflow import TrigFlowPipeline  # noqa: E402
from cm_diffusers.registration import of_the_library  # noqa: E402
from cm_diffusers.schedulers import MultistepConsistencyScheduler  # noqa: E402


__all__ = [
    "CTMPipeline",
    "ConsistencyPipeline",
    "DenoisingPipeline",
    "MeanFlowPipeline",
    "TrigFlowPipeline",
    "name_classes",
]

of_the_library(CTMPipeline, ConsistencyPipeline, DenoisingPipeline, MeanFlowPipeline, TrigFlowPipeline)
ConsistencyPipeline._scheduler_class = MultistepConsistencyScheduler

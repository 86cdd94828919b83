"""Yield the checkpoints of a training run as models while the run goes on."""

import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from cm_diffusers.engine.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    copy_checkpoint,
    list_checkpoints,
    load_checkpoint,
)
from cm_diffusers.engine.config import Config, parse_config
from cm_diffusers.engine.data.description import DataDescription, DescribedData
from cm_diffusers.engine.files import RunFiles, remove
from cm_diffusers.engine.lock import is_locked
from cm_diffusers.engine.saved.export import exported
from cm_diffusers.engine.saved.text import TextModel
from cm_diffusers.engine.training.build import SavedModels, build_objective, load_models
from cm_diffusers.engine.training.state import exported_weights
from cm_diffusers.objectives import OBJECTIVES, Objective
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.sampling import with_our_interface


PAUSE = 5.0  # seconds between two checks of the folder


def follow(
    run: Path, accelerator: Accelerator, done: Collection[int], aside: Path
) -> Iterator[tuple[int, ImagePipeline]]:
    """Yield (step, exported model) for each checkpoint of a run until the run ends.

    A stopped run also counts as ended; after its resumption the same call yields the further checkpoints.

    Args:
        run: the folder of the run.
        accelerator: the processes, which all get the same models.
        done: steps to leave out.
        aside: a folder for links to the checkpoint in use, because the run can delete it meanwhile.

    Raises:
        ValueError: the folder is not that of a run, or a checkpoint is damaged or does not describe its images.
    """
    if not (run / RunFiles.SETTINGS).is_file():
        raise ValueError(f"watch {str(run)!r} is not the folder of a run: it holds no config.yaml.")
    config = parse_config(["--config", str(run / RunFiles.SETTINGS)], list(OBJECTIVES), "")
    models, objective, done = None, None, set(done)
    while True:
        [step] = broadcast_object_list([_next_step(run, done, aside) if accelerator.is_main_process else None])
        if step is None:
            if accelerator.is_main_process and config.run.max_train_steps not in done:
                tqdm.write("The run has stopped before its last step. Repeat this command once the run is resumed.")
            return
        done.add(step)
        try:
            checkpoint = load_checkpoint(aside)
        except DamagedCheckpoint as error:
            raise ValueError(f"checkpoint {step} of {run}: {error}") from None
        if models is None or objective is None:
            models = load_models(config)
            objective = _objective(config, models, checkpoint)
        weights = exported_weights(checkpoint.tensors, config.run)
        yield step, with_our_interface(exported(objective, weights, models.vae)).to(accelerator.device)


def _objective(config: Config, models: SavedModels, checkpoint: Checkpoint) -> Objective:
    """The training method of a run, without its images: the checkpoint describes them."""
    if isinstance(models.teacher, TextModel):
        raise ValueError("watch does not measure text-to-image models. The run itself draws pictures of prompts.")
    if "data" not in checkpoint.state:
        raise ValueError(
            "the checkpoints of this run hold no description of its images. Resume the run for one more checkpoint."
        )
    if config.model.sigma_data is None:
        config = replace(config, model=replace(config.model, sigma_data=checkpoint.state["config"]["sigma_data"]))
    data = DescribedData(DataDescription.from_dict(checkpoint.state["data"]), config.data, models.vae)
    return build_objective(config, models, data, data)[1]


def _next_step(run: Path, done: Collection[int], aside: Path) -> int | None:
    """Wait for a checkpoint that is not `done`, link it to `aside`, and return its step; None at the run's end."""
    while True:
        faults = []
        running = is_locked(run)  # checked first, so that the last checkpoint before the end is seen
        for step, folder in reversed(list_checkpoints(run)):
            if step not in done:
                remove(aside)
                try:
                    copy_checkpoint(folder, aside, {})
                    return step
                except FileNotFoundError:  # the run has deleted it just now
                    continue
                except DamagedCheckpoint as error:  # or is deleting it
                    faults.append(f"checkpoint {step} of {run}: {error}")
        if not running:
            remove(aside)
            if faults:
                raise ValueError(faults[0])
            return None
        time.sleep(PAUSE)

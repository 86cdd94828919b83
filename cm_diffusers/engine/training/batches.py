"""What a method gets of the data: samples and their condition, as they are or as they are trained on."""

from typing import Any

import torch

from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.labelled_augmentation import augment
from cm_diffusers.engine.config import Config
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.scan import crops
from cm_diffusers.engine.saved.stock import nulls_of
from cm_diffusers.objectives import Batch, Objective
from cm_diffusers.pipelines.class_names import null_class


def as_they_are(raw: dict[str, Any], data: ImageData, device: torch.device) -> Batch:
    """Rows of `data` as float32 on `device`: images in [-1, 1], or latents."""
    images = raw["images"]
    images = images if torch.is_tensor(images) else crops(images, data.resolution)
    images = images.to(device, non_blocking=True)
    if data.vae is None:  # else they are latents
        images = images.float() / 127.5 - 1
    return Batch(images, Condition(raw["condition"]).to(device))


def cropped(raw: dict[str, Any], data: ImageData, draws: Draws) -> dict[str, Any]:
    """Rows of `data`, those that are still to be cropped at places that are drawn."""
    if torch.is_tensor(raw["images"]):
        return raw
    return {**raw, "images": crops(raw["images"], data.resolution, draws.uniform("crop", (2,)).cpu())}


def as_trained(batch: Batch, draws: Draws, config: Config, objective: Objective) -> Batch:
    """The batch mirrored, augmented and with dropped labels, as far as the settings ask for that."""
    images, condition = batch.samples, batch.condition
    if config.data.random_flip:
        flip = draws.uniform("flip") < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if config.data.augment:
        images, labels = augment(images, draws, config.data.augment)
        condition = condition.also(augment_labels=labels)
    if config.model.label_dropout:
        dropped = draws.uniform("label dropout") < config.model.label_dropout
        condition = condition.with_nulls(nulls_of(null_class(objective.network))).dropped(dropped)
    return Batch(images, condition)

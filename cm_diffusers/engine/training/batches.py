"""Batches for a training method: samples with their conditioning, before and after augmentation."""

from typing import Any

import torch

from cm_diffusers.core.arrays import sent
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.labelled_augmentation import augment
from cm_diffusers.engine.config import Config
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.scan import crops
from cm_diffusers.engine.saved.stock import nulls_of
from cm_diffusers.objectives import Batch, Objective
from cm_diffusers.pipelines.class_names import null_class


def as_they_are(raw: dict[str, Any], data: ImageData, device: torch.device) -> Batch:
    """Convert rows of a dataset to a batch (B, C, H, W) on `device`, without augmentation.

    Args:
        raw: one item of `data.batches`: "images" and "condition". Images of various sizes are cropped in the centre.
        data: the dataset, of images or of latents.
        device: the device of the result.

    Returns:
        float32 images in [-1, 1], or the latents unchanged.
    """
    images = raw["images"]
    images = images if torch.is_tensor(images) else crops(images, data.resolution)
    images = sent(images, device)
    if data.vae is None:  # latents need no scaling
        images = images.float() / 127.5 - 1
    return Batch(images, data.conditioned(raw["condition"]).to(device))


def cropped(raw: dict[str, Any], data: ImageData, draws: Draws) -> dict[str, Any]:
    """Crop images at random places.

    Args:
        raw: one item of `data.batches`. It is returned unchanged if its images form one tensor (B, C, H, W).
        data: the dataset, whose resolution is the size of the crops.
        draws: the random numbers of the training step.

    Returns:
        `raw` with its images as one uint8 tensor (B, C, H, W).
    """
    if torch.is_tensor(raw["images"]):
        return raw
    return {**raw, "images": crops(raw["images"], data.resolution, draws.uniform("crop", (2,)).cpu())}


def as_trained(batch: Batch, draws: Draws, config: Config, objective: Objective) -> Batch:
    """Apply the random flip, the augmentation and the dropout of labels or prompts of the settings to a batch.

    Args:
        batch: samples (B, C, H, W) and their conditioning.
        draws: the random numbers of the training step.
        config: the settings; only those of these transformations count.
        objective: the training method, whose network has the null class for dropped labels.
    """
    images, condition = batch.samples, batch.condition
    if config.data.random_flip:
        flip = draws.uniform("flip") < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if config.data.augment:
        images, labels = augment(images, draws, config.data.augment)
        condition = condition.also(augment_labels=labels)
    if config.model.label_dropout:
        dropped = draws.uniform("label dropout") < config.model.label_dropout
        condition = condition.with_nulls(nulls_of(null_class(objective.network), images.device)).dropped(dropped)
    if config.data.proportion_empty_prompts:
        condition = condition.dropped(draws.uniform("prompt dropout") < config.data.proportion_empty_prompts)
    return Batch(images, condition)

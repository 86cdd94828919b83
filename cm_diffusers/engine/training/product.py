"""What a run makes of its weights: a pipeline with its pictures and its card, saved in a folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from torch import Tensor

from cm_diffusers.engine.commands import command
from cm_diffusers.engine.config import Config
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.pictures.diagnostics import save_diagnostics
from cm_diffusers.engine.pictures.preview import save_preview
from cm_diffusers.engine.saved.export import exported, save_pipeline
from cm_diffusers.engine.sharing.card import RunSummary, card_facts, draw_grids, model_card
from cm_diffusers.engine.training.batches import as_they_are
from cm_diffusers.engine.training.levels import check_place, with_better_levels
from cm_diffusers.objectives import Batch, Objective


@dataclass
class Product:
    """The model of a run on images or latents.

    Args:
        config: the resolved settings.
        objective: the training method.
        data: the dataset.
        device: the device of the run.
    """

    config: Config
    objective: Objective
    data: ImageData
    device: torch.device

    def pipeline(self, weights: Mapping[str, Tensor]) -> DiffusionPipeline:
        """The pipeline with a copy of `weights` (any shape), named as in a checkpoint."""
        return exported(self.objective, weights, self.data.vae)

    def check(self, pipeline: DiffusionPipeline) -> None:
        """Check, before training, that the model can be completed as the settings ask.

        Raises:
            ValueError: --search_levels is set, and the levels of this model can't be searched.
        """
        if self.config.run.search_levels:
            check_place(pipeline, self.data)

    def completed(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """The pipeline as it is saved at the end of the run: with the levels of --search_levels."""
        if not self.config.run.search_levels:
            return pipeline
        return with_better_levels(pipeline, self.data, self.config.run.search_levels, self.device)

    def draw(self, pipeline: DiffusionPipeline, samples: Path) -> tuple[dict[str, Path], dict[str, float]]:
        """Draw the pictures of a moment of the run.

        Args:
            pipeline: the model.
            samples: the file for the samples; others lie beside it.

        Returns:
            The files by title, and numbers by name. Latents have no diagnostics.
        """
        save_preview(pipeline, samples)
        pictures, numbers = {"samples": samples} if samples.exists() else {}, {}
        batch = self._shown()
        if self.data.vae is None and batch.samples.shape[1] in (1, 3):
            file = samples.with_name(f"{samples.stem}-diagnostics.png")
            numbers = save_diagnostics(
                self.objective.denoiser(pipeline.unet),
                batch.samples,
                batch.condition,
                file,
                teacher=self.objective.teacher,
                sigma_max=self.objective.spec.sigma_max,
                network=pipeline.unet if self.objective.needs_tangents else None,
            )
            pictures["diagnostics"] = file
        return pictures, numbers

    def _shown(self) -> Batch:
        """Eight images for the diagnostics."""
        if not hasattr(self, "_raw"):
            self._raw = next(self.data.batches(ProcessShare(8, 1, 0, 1), self.config.run.seed))
        return as_they_are(self._raw, self.data, self.device)

    def grids(self, pipeline: DiffusionPipeline, folder: Path) -> dict[str, dict[str, str]]:
        """Draw the pictures of the card into the model's `folder`; see `card_facts`."""
        return draw_grids(pipeline, folder)

    def facts(
        self, pipeline: DiffusionPipeline, run: RunSummary, grids: Mapping[str, Mapping[str, str]]
    ) -> dict[str, Any]:
        """The facts of the card as JSON values, from facts of the run and the result of `grids`."""
        return card_facts(self.config, self.objective, pipeline, run, grids)

    def card(self, facts: Mapping[str, Any], name: str, metrics: Path) -> ModelCard:
        """The card with the `name` of the model, and with the numbers in the file `metrics` if it exists."""
        return model_card(facts, name, metrics)

    def save(
        self, pipeline: DiffusionPipeline, folder: Path, verify: bool, complete: Callable[[Path], object]
    ) -> None:
        """Save the model in `folder`; `verify` and `complete` are those of `save_pipeline`."""
        save_pipeline(pipeline, folder, variant=self.config.run.export_variant, verify=verify, complete=complete)

    def next_command(self, folder: Path) -> str:
        """Lines for the user on how to sample the saved model in `folder`."""
        images = folder.parent / "images"
        return (
            f"Sample it:  {command('sample')} --pretrained_model_name_or_path {folder} --num_samples 64"
            f" --output_dir {images}"
        )

"""Conditions other than labels, through training, resumption, export and sampling, by methods of each kind."""

import copy
import shutil

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from cm_diffusers.core.conditions import Condition
from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.processes import start_accelerator
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.batches import as_they_are
from cm_diffusers.engine.training.trainer import Trainer
from cm_diffusers.objectives import OBJECTIVES, ModelSpec
from tests.helpers.training_runs import differences, flags, read_log


VECTOR = 5
SETTINGS = {
    "ect": {"pretrain_steps": 1, "stage_steps": 1},
    "cd": {"num_scales": 8},
    "scd": {"tangent_warmup_steps": 2},
    "ctm": {"num_scales": 8, "solver_steps": 2},
}


class ConditionedNetwork(ModelMixin, ConfigMixin):
    """A small convolutional network conditioned on a vector (B, 5) or an image (B, 1, H, W), not on a label.

    It also works without the condition, because training first tries each network on blank images.
    """

    @register_to_config
    def __init__(self, kind="vector", two_times=False, sample_size=8, in_channels=1, num_class_embeds=None):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels + (kind == "image"), 8, 3, padding=1)
        self.time = nn.Linear(4 if two_times else 2, 8)
        self.vector = nn.Linear(VECTOR, 8) if kind == "vector" else None
        self.conv_out = nn.Conv2d(8, in_channels, 3, padding=1)

    def adapt_condition(self, condition):
        """The data's `image` is `beside` here, because each network has its own names."""
        return {{"image": "beside"}.get(name, name): entry for name, entry in condition.entries.items()}

    def forward(self, sample, timestep, target_timestep=None, vector=None, beside=None, return_dict=True):
        times = [timestep] if target_timestep is None else [timestep, target_timestep]
        times = [torch.as_tensor(time).to(sample).expand(len(sample)) for time in times]
        features = self.time(torch.stack([f(time) for time in times for f in (torch.sin, torch.cos)], 1))
        if vector is not None:
            features = features + self.vector(vector)
        if self.config.kind == "image":
            sample = torch.cat([sample, torch.zeros_like(sample) if beside is None else beside], 1)
        output = self.conv_out(nn.functional.silu(self.conv_in(sample) + features[..., None, None]))
        return UNet2DOutput(output) if return_dict else (output,)


class ConditionedData(ImageData):
    """The digits, each with a vector of its own or with its upside-down image as the condition."""

    kind = "vector"

    @property
    def condition(self):
        if self.kind == "image":
            return {"image": self.images.flip(2).float() / 127.5 - 1}
        return {"vector": torch.randn(len(self.images), VECTOR, generator=torch.Generator().manual_seed(5))}


def trainer_of(folder, method, kind, teacher_folder):
    taught = {"pretrained_teacher_model": teacher_folder} if method in ("cd", "scd") else {}
    config = parse_config(
        flags(
            folder,
            method,
            class_conditional=None,
            max_train_steps=4,
            checkpointing_steps=2,
            **SETTINGS[method],
            **taught,
        ),
        [method],
        "",
    )
    data = ConditionedData(config.data, class_conditional=False, show_progress=False)
    data.kind = kind
    torch.manual_seed(0)
    network = ConditionedNetwork(kind, two_times=method == "ctm")
    spec = ModelSpec(0.8, "angle", prediction="trigflow" if method == "scd" else "edm")
    teacher = spec.denoiser(copy.deepcopy(network).requires_grad_(False)) if taught else None
    config = config.resolved() if not taught else config
    objective = OBJECTIVES[method](network, spec, config.options, 4, True, teacher)
    return Trainer(config, objective, data, start_accelerator(mixed_precision="no"))


def fit(trainer):
    trainer.resume()
    with Stopping() as stopping:
        trainer.fit(stopping)
    return trainer


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("method", SETTINGS)
def test_a_condition_that_is_no_label_trains_resumes_exports_and_samples(tmp_path, method, kind):
    whole, resumed, teacher = (tmp_path / name for name in ("whole", "resumed", "teacher"))
    for folder in (whole, resumed, teacher):
        folder.mkdir()
    trainer = fit(trainer_of(whole, method, kind, teacher))
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "log.jsonl", resumed)
    fit(trainer_of(resumed, method, kind, teacher))
    assert differences(resumed, whole) == [] and read_log(resumed) == read_log(whole)

    told = {name: entry[:2] for name, entry in trainer.data.condition.items()}
    pipe = trainer.exported()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "pipeline")
    again = type(pipe).from_pretrained(
        tmp_path / "pipeline", unet=ConditionedNetwork.from_pretrained(tmp_path / "pipeline" / "unet")
    )
    again.set_progress_bar_config(disable=True)

    def images(pipe, told):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return pipe(condition=told, generator=generators, num_inference_steps=2, output_type="pt").images

    found = images(again, told)
    assert found.equal(images(pipe, told))
    others = {name: entry.flip(0) for name, entry in told.items()}
    assert not images(again, others).equal(found)
    with pytest.raises(ValueError, match="must agree"):
        images(again, {name: entry[:1] for name, entry in told.items()})


def test_the_condition_reaches_the_loss(tmp_path):
    trainer = trainer_of(tmp_path, "ect", "vector", tmp_path)
    raw = next(trainer.data.batches(trainer.share, 0))
    batch = as_they_are(raw, trainer.data, trainer.accelerator.device)
    assert set(batch.condition.entries) == {"vector"} and isinstance(batch.condition, Condition)

"""torch.export exports every network of the library with a dynamic batch size."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from cm_diffusers import RawSigmaUNet2DModel, ShuffleUNet2DModel
from cm_diffusers.models import (
    DiTModel,
    EDMUNet2DModel,
    TwoTimeModel,
    build_unet,
)
from tests.helpers.breadth import narrowed


DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 2, "sample_size": 8}
LABELS = torch.tensor([0, 1, 2, 3, 4])
TIMES = torch.rand(5, generator=torch.Generator().manual_seed(0))


def edm(channel_mult=(1,), **config):
    return EDMUNet2DModel(8, 1, 1, 8, channel_mult, 1, **config)


NETWORKS = {  # a network, and its arguments besides a sample and a time
    "jvp": lambda: (build_unet("jvp_tiny", (8, 8), 1, 10), {"class_labels": LABELS}),
    "ddpmpp, classes left out": lambda: (edm(num_class_embeds=10, augment_channels=9), {}),
    "ddpmpp, classes": lambda: (edm(num_class_embeds=10), {"class_labels": LABELS}),
    "adm, two times": lambda: (edm(architecture="adm", two_times=True), {"target_timestep": TIMES / 2}),
    "ve": lambda: (edm((1, 1), preconditioning="ve", encoder_type="residual"), {}),
    "two times": lambda: (
        TwoTimeModel.from_network(build_unet("jvp_tiny", (8, 8), 1)),
        {"target_timestep": TIMES / 2},
    ),
    "dit": lambda: (dit(), {"class_labels": LABELS}),
    "dit, no class": lambda: (dit(), {}),
    "raw sigma": lambda: (RawSigmaUNet2DModel(8, 1, 1, 32), {}),
    "shuffle": lambda: (ShuffleUNet2DModel(8, 1, 1, 8, (2, 4), 8), {}),
}


def dit():
    return DiTModel.from_transformer(DiTTransformer2DModel(in_channels=1, num_embeds_ada_norm=10, **DIT))


@pytest.mark.parametrize("name", narrowed(NETWORKS, "jvp", "adm, two times", "dit"))
def test_an_export_takes_any_batch(name):
    network, more = NETWORKS[name]()
    shapes = {key: {0: torch.export.Dim.AUTO} for key in ("sample", "timestep", *more)}
    few = {key: value[:2] for key, value in more.items()}
    sample = torch.randn(5, 1, 8, 8)
    program = torch.export.export(network.eval(), (sample[:2], TIMES[:2]), few, dynamic_shapes=shapes)
    with torch.no_grad():
        exported, plain = program.module()(sample, TIMES, **more), network(sample, TIMES, **more)
    torch.testing.assert_close(exported.sample, plain.sample, rtol=1e-4, atol=1e-5)


def test_keyed_dropout_is_exported_for_any_batch_as_well():
    network = edm(dropout=0.5).eval()
    network.key_dropout(torch.tensor([1, 2]))
    shapes = {"sample": {0: torch.export.Dim.AUTO}, "timestep": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(network, (torch.randn(2, 1, 8, 8), TIMES[:2]), dynamic_shapes=shapes)
    assert program.module()(torch.randn(3, 1, 8, 8), TIMES[:3]).sample.shape == (3, 1, 8, 8)

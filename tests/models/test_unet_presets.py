import pytest
import torch
from diffusers import UNet2DModel

from cm_diffusers.models import (
    EDM_PRESETS,
    UNET_PRESETS,
    EDMUNet2DModel,
    build_unet,
    keep_time_embedding_in_float32,
)


@pytest.mark.parametrize(
    "preset, channels, millions",
    [("tiny", 1, 0.19), ("small", 1, 2.6), ("base", 1, 6.9), ("cifar10", 3, 45), ("imagenet64", 3, 276)],
)
def test_presets_have_their_size(preset, channels, millions):
    with torch.device("meta"):
        network = build_unet(preset, (64, 64), channels)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert preset in UNET_PRESETS


@pytest.mark.parametrize(
    "preset, channels, classes, millions",
    [
        ("ddpmpp_tiny", 1, None, 0.189),
        ("ddpmpp_32", 3, None, 55.7),
        ("ddpmpp_64", 3, None, 61.8),
        ("adm_64", 3, 1000, 295.9),
    ],
)
def test_presets_of_edm_have_the_size_of_the_paper(preset, channels, classes, millions):
    with torch.device("meta"):
        network = build_unet(preset, (64, 64), channels, classes, 0.1, augment_channels=9)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.002)
    assert preset in EDM_PRESETS and isinstance(network, EDMUNet2DModel)
    config = network.config
    assert (config.augment_channels, config.num_class_embeds, config.dropout) == (9, classes, 0.1)


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (2, 2)])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("classes", [None, 10])
def test_output_has_the_shape_of_the_input(size, channels, classes):
    network = build_unet("tiny", size, channels, classes)
    labels = torch.tensor([3, 9]) if classes else None
    x = torch.randn(2, channels, *size)
    assert network(x, torch.tensor([-1000.0, 1095.0]), class_labels=labels).sample.shape == x.shape
    assert network.config.sample_size == (size[0] if size[0] == size[1] else size)
    assert (network.config.in_channels, network.config.num_class_embeds) == (channels, classes)


def test_network_reads_level_class_and_image():
    network, x = build_unet("tiny", (8, 8), 1, 10), torch.randn(1, 1, 8, 8)

    def output(x=x, label=5.0, class_label=1):
        return network(x, torch.tensor([label]), class_labels=torch.tensor([class_label])).sample

    reference = output()
    for other in (output(x=x + 1), output(label=6.0), output(class_label=2)):
        assert (other - reference).abs().max() > 1e-4


@pytest.mark.parametrize(
    "preset, size, factor",
    [("tiny", (7, 8), 2), ("small", (28, 30), 4), ("imagenet64", (8, 12), 8), ("ddpmpp_64", (8, 12), 8)],
)
def test_sizes_that_cannot_be_halved_are_refused(preset, size, factor):
    with pytest.raises(ValueError, match=f"use multiples of {factor}"):
        build_unet(preset, size, 1)


def test_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'huge'; choose one of tiny, small.*ddpmpp_32"):
        build_unet("huge", (8, 8), 1)
    with pytest.raises(ValueError, match="'tiny' has no input for augmentation labels. .* ddpmpp_tiny"):
        build_unet("tiny", (8, 8), 1, augment_channels=9)


def test_dropout_is_active_in_training_alone():
    network, x, t = build_unet("tiny", (8, 8), 1, dropout=0.5), torch.randn(1, 1, 8, 8), torch.tensor([1.0])
    assert not torch.equal(network(x, t).sample, network(x, t).sample)
    network.eval()
    assert torch.equal(network(x, t).sample, network(x, t).sample)


def test_a_saved_network_is_the_same_network(tmp_path):
    network = build_unet("tiny", (8, 12), 3, 10).eval()
    network.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path).eval()
    arguments = (torch.randn(2, 3, 8, 12), torch.tensor([-100.0, 700.0]), torch.tensor([1, 2]))
    with torch.no_grad():
        assert torch.equal(again(*arguments).sample, network(*arguments).sample)


def time_embeddings(network, labels):
    """The embedding of `labels` that the blocks of `network` receive under bfloat16 autocast."""
    seen = []
    network.down_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["temb"]), with_kwargs=True
    )
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        network(torch.zeros(len(labels), 1, 8, 8), labels)
    return seen[0]


def test_time_embedding_stays_in_float32_under_autocast():
    labels = torch.tensor([1095.5, 1095.6])
    plain, kept = (build_unet("tiny", (8, 8), 1) for _ in range(2))
    kept.load_state_dict(plain.state_dict())
    keys = list(kept.state_dict())
    keep_time_embedding_in_float32(kept)
    with torch.no_grad():
        exact = plain.time_embedding(plain.time_proj(labels))
    assert time_embeddings(plain, labels).dtype == torch.bfloat16
    embedded = time_embeddings(kept, labels)
    assert embedded.dtype == torch.float32
    torch.testing.assert_close(embedded, exact, rtol=1e-6, atol=1e-6)
    assert list(kept.state_dict()) == keys

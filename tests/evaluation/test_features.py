import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers import ViTImageProcessorPil as Processor

from cm_diffusers.evaluation import features, load_extractor, train_classifier
from cm_diffusers.evaluation.hub_networks import HubFeatures


SETTINGS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"height": 32, "width": 24}}
MODELS = {
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=(32, 24),
            patch_size=8,
            num_labels=16,  # as many as the outputs of other layers
        )
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5)
    ),
    "dinov2": lambda: Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=8)
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny models with their processors, like those on the Hub."""
    paths = {}
    for kind, make in MODELS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make()
        paths[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(paths[kind])
        Processor(**SETTINGS, resample=2).save_pretrained(paths[kind])
    return {kind: str(path) for kind, path in paths.items()}


def images(channels=3, size=(80, 60)):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, channels, *size), generator=generator) / 255


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_features_of_a_hub_classifier_are_what_its_logits_are_made_of(folders, kind):
    extractor = load_extractor(folders[kind])
    features = extractor(images())
    model = extractor.network.model
    pixels = images(size=(32, 24))  # these need no resizing
    mean, std = (torch.tensor(SETTINGS[key])[:, None, None] for key in ("image_mean", "image_std"))
    logits = model(pixel_values=(pixels - mean) / std).logits
    torch.testing.assert_close(extractor.network.head(extractor(pixels)), logits)
    assert features.shape == (3, 16 if kind == "vit" else 12)


def test_images_are_prepared_as_the_models_own_processor_does(folders):
    pictures = [
        Image.fromarray(np.asarray(image.permute(1, 2, 0) * 255).round().astype(np.uint8)) for image in images()
    ]
    pixels = Processor(**SETTINGS, resample=2)(pictures, return_tensors="pt")["pixel_values"]
    extractor = load_extractor(folders["vit"])
    seen = []
    extractor.network.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    extractor(images())
    assert (seen[0] - pixels).abs().max() < 1.01 / 255 / 0.2  # the processor rounds once more


@pytest.mark.parametrize("resample", [2, 3])
def test_edges_are_resized_as_the_models_own_processor_does(folders, tmp_path, resample):
    """Bicubic resizing overshoots at edges; PIL clips the result to the range of pixels."""
    ViTForImageClassification.from_pretrained(folders["vit"]).save_pretrained(tmp_path)
    processor = Processor(**SETTINGS, resample=resample)
    processor.save_pretrained(tmp_path)
    edges = torch.zeros(1, 3, 40, 30)
    edges[..., 11:] = 1  # along one axis only, because PIL clips after each axis
    picture = Image.fromarray((edges[0].permute(1, 2, 0) * 255).to(torch.uint8).numpy())
    seen, extractor = [], load_extractor(str(tmp_path))
    extractor.network.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    extractor(edges)
    assert (seen[0] - processor(picture, return_tensors="pt")["pixel_values"]).abs().max() < 1.01 / 255 / 0.2
    mean, std = (torch.tensor(SETTINGS[key])[:, None, None] for key in ("image_mean", "image_std"))
    assert -1e-6 < (seen[0] * std + mean).min() and (seen[0] * std + mean).max() < 1 + 1e-6


@pytest.mark.parametrize(
    "processor, size",
    [
        ({"size": {"height": 32, "width": 24}}, (32, 24)),
        ({"size": {"shortest_edge": 40}}, (40, 40)),
        ({"size": 30}, (30, 30)),
        ({}, (224, 224)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 28}, "do_center_crop": True}, (32, 28)),
        ({"size": 40, "crop_size": 32, "do_center_crop": True}, (32, 32)),
        ({"size": {"shortest_edge": 40}, "crop_size": 32, "do_center_crop": False}, (40, 40)),
    ],
)
def test_images_get_the_size_that_the_model_sees_after_its_processor_s_cropping(processor, size):
    network = HubFeatures(torch.nn.Identity(), {"do_normalize": False, **processor}, None)
    assert network.size == size
    network.model.forward = lambda pixel_values: type("Output", (), {"pooler_output": pixel_values})
    assert network(images()).shape == (3, 3, *size)


def test_features_of_dinov2_are_the_normed_class_token(folders):
    extractor = load_extractor("dinov2", weights=folders["dinov2"])
    pixels = images(size=(32, 24))
    mean, std = (torch.tensor(SETTINGS[key])[:, None, None] for key in ("image_mean", "image_std"))
    token = extractor.network.model(pixel_values=(pixels - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(pixels), token)


class Mean(torch.nn.Module):
    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, images):
        return self.weight * images.mean((2, 3))


class Broken(torch.nn.Module):
    def forward(self, images):
        return images / 0 if images.shape[1] == 1 else images


instance = Mean(2.0)


def test_a_module_is_an_extractor_itself_or_by_its_name():
    assert torch.allclose(load_extractor(Mean())(images()), images().mean((2, 3)))
    assert torch.equal(load_extractor(f"{__name__}:Mean")(images()), load_extractor(Mean())(images()))
    assert torch.allclose(load_extractor(f"{__name__}:instance")(images()), 2 * images().mean((2, 3)))
    assert load_extractor(Mean()).name == "Mean"


def test_fingerprints_tell_weights_and_code_and_preparation(folders, tmp_path):
    class Other(Mean):
        def forward(self, images):
            return images.amax((2, 3))

    assert load_extractor(Mean()).fingerprint == load_extractor(Mean()).fingerprint
    marks = {load_extractor(module).fingerprint for module in (Mean(), Mean(2.0), Other())}
    path = tmp_path / "vit"
    ViTForImageClassification.from_pretrained(folders["vit"]).save_pretrained(path)
    Processor(**SETTINGS, resample=3).save_pretrained(path)
    marks |= {load_extractor(name).fingerprint for name in (folders["vit"], str(path))}
    assert len(marks) == 5


def test_images_are_rounded_as_files_are():
    exact = torch.full((1, 3, 2, 2), 100 / 255)
    extractor = load_extractor(Mean())
    assert torch.equal(extractor(exact + 0.4 / 255), extractor(exact))
    assert not torch.equal(extractor(exact + 0.6 / 255), extractor(exact))


def test_many_images_are_taken_in_parts():
    many = torch.rand(250, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    extractor = load_extractor(Mean())
    assert torch.equal(extractor(many), torch.cat([extractor(image[None]) for image in many]))


def test_the_classifier_knows_its_shape_and_needs_labels():
    reference = images(1, (8, 8)), torch.tensor([0, 1, 2])
    extractor = load_extractor("classifier", reference=reference)
    assert extractor(reference[0]).shape == (3, 32)
    assert extractor.fingerprint == load_extractor("classifier", reference=reference).fingerprint
    assert extractor.fingerprint != load_extractor("classifier", reference=reference, seed=1).fingerprint
    for wrong in (images(3, (8, 8)), images(1, (16, 8))):
        with pytest.raises(ValueError, match=r"is for images of shape \(1, 8, 8\) \(C, H, W\)"):
            extractor(wrong)
    with pytest.raises(ValueError, match="these have no labels"):
        load_extractor("classifier", reference=(images(), None))


@pytest.mark.parametrize("n, epochs", [(3, 20), (10, 20), (11, 19), (100, 2), (201, 1)])
def test_the_classifier_is_shown_about_so_many_images(monkeypatch, n, epochs):
    """With 200 images to show: up to 10 images for 20 epochs each, more images about 200 times in total."""
    shown = []

    def train(images, labels, seed, epochs):
        shown.append(epochs)
        return train_classifier(images[:3], labels[:3], seed, 1)

    monkeypatch.setattr(features, "CLASSIFIER_IMAGES", 200)
    monkeypatch.setattr(features, "train_classifier", train)
    load_extractor("classifier", reference=(torch.zeros(n, 1, 4, 4), torch.arange(n) % 3))
    assert shown == [epochs]


@pytest.mark.parametrize("normalised", [True, False])
def test_images_are_normalised_where_the_processor_does(normalised):
    seen = []
    network = HubFeatures(torch.nn.Identity(), {**SETTINGS, "do_normalize": normalised}, None)
    network.model.forward = lambda pixel_values: (seen.append(pixel_values), type("", (), {"pooler_output": 0}))[1]
    pixels = images(size=(32, 24))
    network(pixels)
    mean, std = (torch.tensor(SETTINGS[key])[:, None, None] for key in ("image_mean", "image_std"))
    torch.testing.assert_close(seen[0], (pixels - mean) / std if normalised else pixels)


@pytest.mark.parametrize(
    "wrong", [images() * 2 - 1, images() * 255, images()[0], images()[:0], images() * float("nan")]
)
def test_images_of_another_range_or_shape_are_refused(wrong):
    with pytest.raises(ValueError, match=r"finite values in \[0, 1\]"):
        load_extractor(Mean())(wrong)


def test_features_of_another_shape_or_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"must give \(B, d\)"):
        load_extractor(Broken())(images())
    with pytest.raises(ValueError, match="not finite"):
        load_extractor(torch.nn.Sequential(Broken(), torch.nn.Flatten()))(images(1))


def test_unknown_extractors_and_weights_are_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("nonsense", "someone/nothing", str(tmp_path)):
        with pytest.raises(ValueError, match=f"'{name}' can't be loaded"):
            load_extractor(name)
    with pytest.raises(ValueError, match="'facebook/dinov2-large' can't be loaded"):
        load_extractor("dinov2")
    with pytest.raises(ValueError, match="can't be imported"):
        load_extractor("no_such_module:Net")
    with pytest.raises(ValueError, match="can't be imported"):
        load_extractor(f"{__name__}:Nothing")
    with pytest.raises(ValueError, match="must be an nn.Module"):
        load_extractor(f"{__name__}:images")
    with pytest.raises(ValueError, match="not for 'classifier'"):
        load_extractor("classifier", weights=folders["vit"])
    with pytest.raises(ValueError, match="1 or 3 channels; got 2"):
        load_extractor(folders["vit"])(images(2))

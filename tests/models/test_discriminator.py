import copy

import pytest
import torch
from torch.func import functional_call
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetForImageClassification

from cm_diffusers.engine.saved.discriminators import build_discriminator, load_backbone
from cm_diffusers.models.discriminator import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PatchDiscriminator,
    ProjectedDiscriminator,
    ProjectionHead,
)


SIZES = [(8, 8), (16, 16), (28, 28), (16, 24), (9, 31)]
KINDS = ("patch", "dinov2", "resnet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of models with random weights, saved as on the Hub: not as backbones with selected output features."""
    root = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    vit = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    text = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20)
    models = {"dinov2": Dinov2Model(vit), "resnet": ResNetForImageClassification(resnet), "bert": BertModel(text)}
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


@pytest.fixture
def build(folders):
    def make(kind, channels=3, num_classes=None):
        torch.manual_seed(0)
        if kind == "patch":
            return PatchDiscriminator(channels, num_classes, width=8)
        return build_discriminator(channels, num_classes, folders[kind], image_size=56 if kind == "resnet" else None)

    return make


def images(rows=4, channels=3, size=(16, 16), seed=2):
    return 2 * torch.rand(rows, channels, *size, generator=torch.Generator().manual_seed(seed)) - 1


def test_a_head_is_the_formula():
    torch.manual_seed(0)
    head, features, labels = ProjectionHead(8, 5), torch.randn(3, 8, 2, 4), torch.tensor([4, 0, 4])
    weight, bias, embedding = head.linear.weight[0, :, 0, 0], head.linear.bias, head.embedding.weight
    logits = head(features, labels)
    assert logits.shape == (3, 8)
    for b in range(3):
        for i in range(2):
            for j in range(4):
                h = features[b, :, i, j]
                expected = weight @ h + bias[0] + embedding[labels[b]] @ h / 8**0.5
                torch.testing.assert_close(logits[b, 4 * i + j], expected)
    head.embedding = None
    expected = (weight @ features.flatten(2)) + bias
    torch.testing.assert_close(head(features), expected)


def test_channels_double_until_eight_times_as_many():
    model = PatchDiscriminator(3, width=8, levels=6)
    convolutions = [layer for layer in model.features if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [8, 16, 32, 64, 64, 64]
    assert model.head.linear.in_channels == 64


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(build, kind, channels, size):
    x = images(2, channels, size)
    logits = build(kind, channels)(x)
    patches = {"patch": (size[0] // 8) * (size[1] // 8), "dinov2": 2 * 4 * 4, "resnet": 4 * 4 + 7 * 7}
    assert logits.shape == (2, patches[kind]) and logits.isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_sees_another_and_nothing_is_random_or_remembered(build, kind):
    model, x, labels = build(kind, num_classes=3).train(), images(4), torch.tensor([2, 0, 1, 1])
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    logits = model(x, labels)
    torch.testing.assert_close(torch.cat([model(x[:1], labels[:1]), model(x[1:], labels[1:])]), logits)
    assert torch.equal(model(x, labels), logits) and torch.equal(model.eval()(x, labels), logits)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name for name, _ in model.named_buffers()} <= {"mean", "std"}


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("size", [(8, 8), (16, 24)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_and_every_image_gets_a_gradient(build, kind, size, num_classes):
    model, x = build(kind, 1, num_classes), images(4, 1, size).requires_grad_()
    labels = None if num_classes is None else torch.tensor([2, 0, 1, 1])
    model(x, labels).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_depend_on_the_class(build, kind):
    model, x = build(kind, num_classes=3), images()
    first, second = (model(x, torch.full((4,), label)) for label in (0, 2))
    assert (first - second).abs().amax(1).min() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_labels_missing_or_not_expected(build, kind):
    with pytest.raises(ValueError, match="missing: the discriminator is conditional on 3 classes"):
        build(kind, num_classes=3)(images())
    with pytest.raises(ValueError, match="unconditional .num_classes=None"):
        build(kind)(images(), torch.zeros(4).long())


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_is_all_that_training_changes(build, kind):
    model, x = build(kind), images()
    other = build(kind)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    # called as by the generator's loss: the weights get no gradient
    frozen = {name: value.detach() for name, value in model.state_dict().items()}
    x.requires_grad_()
    functional_call(model, frozen, (x,)).sum().backward()
    assert x.grad.abs().max() > 0 and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["dinov2", "resnet"])
def test_the_backbone_is_frozen_and_hidden_but_moves_along(build, kind):
    model, x = build(kind), images()
    model = ProjectedDiscriminator(model.backbone.train(), 3, image_size=56)
    model.train().requires_grad_(True)
    inner = list(model.backbone.parameters())
    assert inner and not any(parameter.requires_grad for parameter in inner)
    assert not any(module.training for module in model.backbone.modules())
    assert {name.split(".")[0] for name in model.state_dict()} == {"stems", "heads"}
    assert not {id(p) for p in inner} & {id(p) for p in model.parameters()}
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    reference = model(x)
    assert model.to(torch.float64)(x.double()).dtype == torch.float64
    torch.testing.assert_close(model(x.double()).float(), reference, rtol=1e-4, atol=1e-4)
    assert {value.dtype for value in model.backbone.parameters()} == {torch.float64}
    model.to("meta")
    assert all(parameter.is_meta for parameter in model.backbone.parameters())


def test_loading_gives_the_saved_weights_and_all_stages(folders):
    for name, cls, prefix in (("dinov2", Dinov2Model, ""), ("resnet", ResNetForImageClassification, "resnet.")):
        backbone, saved = load_backbone(folders[name]), cls.from_pretrained(folders[name]).state_dict()
        assert len(backbone.channels) == 2
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, saved[prefix + key]), key


def test_the_backbone_sees_images_as_those_of_imagenet(build):
    vit, resnet = build("dinov2", 1), build("resnet")
    assert vit.image_size == (28, 28) and resnet.image_size == (56, 56)
    assert ProjectedDiscriminator(resnet.backbone, 3).image_size == (224, 224)
    x = images(2, 1, (28, 28))
    seen = vit._prepare(x)
    assert seen.shape == (2, 3, 28, 28)
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD)):
        torch.testing.assert_close(seen[:, channel] * std + mean, (x[:, 0] + 1) / 2)
    # a ramp stays a ramp, except at the border
    ramp = torch.linspace(-1, 1, 14)[None, None, :, None].expand(1, 1, 14, 20)
    rows = vit._prepare(ramp)[0, 0, 1:-1] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    assert rows.shape == (26, 28) and (rows - rows[:, :1]).abs().max() < 1e-6
    torch.testing.assert_close(rows.diff(dim=0), torch.full((25, 28), 0.5 / 13), rtol=1e-4, atol=1e-6)
    # shrinking averages, so stripes become grey
    stripes = torch.tensor([-1.0, 1.0, 1.0, -1.0]).repeat(28)[None, None, :, None].expand(1, 1, 112, 112)
    assert (vit._prepare(stripes)[0, 0, 2:-2] * IMAGENET_STD[0] + IMAGENET_MEAN[0] - 0.5).abs().max() < 0.05


def test_the_default_is_on_pixels():
    torch.manual_seed(0)
    model = build_discriminator(3, 10, None)
    assert isinstance(model, PatchDiscriminator)
    assert model(images(size=(32, 32)), torch.tensor([1, 2, 3, 9])).shape == (4, 16)


def test_what_can_not_be_built(folders, tmp_path):
    (tmp_path / "config.json").write_text((tmp_path.parent / folders["dinov2"] / "config.json").read_text())
    for name in (str(tmp_path / "nothing"), folders["bert"], str(tmp_path)):
        with pytest.raises(ValueError, match="facebook/dinov2-small") as error:
            build_discriminator(3, None, name)
        assert repr(name) in str(error.value)
    with pytest.raises(ValueError, match="2 channels"):
        build_discriminator(2, None, folders["dinov2"])
    with pytest.raises(ValueError, match="image_size 64"):
        build_discriminator(3, None, None, image_size=64)
    with pytest.raises(ValueError, match="4x9 are too small: 3 levels need 8"):
        PatchDiscriminator(1, width=8)(torch.zeros(1, 1, 4, 9))
    for options, message in (({"width": 6}, "multiple of 4"), ({"width": 0}, "multiple of 4"), ({"levels": 0}, "0")):
        with pytest.raises(ValueError, match=message):
            PatchDiscriminator(1, **options)
    with pytest.raises(ValueError, match="multiple of 8"):
        ProjectedDiscriminator(load_backbone(folders["resnet"]), 1, width=12)


def test_weights_that_are_missing_are_not_made_up(folders, tmp_path):
    model = Dinov2Model.from_pretrained(folders["dinov2"])
    weights = {name: value for name, value in model.state_dict().items() if "layer.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="lacks weights, .*layer.1.mlp"):
        load_backbone(str(tmp_path))


def test_a_backbone_saved_in_half_precision_is_loaded_in_float32(folders, tmp_path):
    Dinov2Model.from_pretrained(folders["dinov2"]).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {value.dtype for value in load_backbone(str(tmp_path)).parameters()} == {torch.float32}

"""Class names, which a network stores and its pipelines understand."""

import json
import logging

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DiffusionPipeline

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler, TwoTimeModel
from cm_diffusers.pipelines import name_classes
from cm_diffusers.sampling import sample_images


NAMES = dict(enumerate("zero one two three four five six seven eight nine".split()))


@pytest.fixture
def pipe(tiny_unet):
    network = tiny_unet()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe = ConsistencyPipeline(network, MultistepConsistencyScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, class_labels, **arguments):
    arguments = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", **arguments}
    return pipe(class_labels=class_labels, **arguments).images


def seen_labels(pipe, **arguments):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    images(pipe, **{"class_labels": None, **arguments})
    hook.remove()
    return seen[0]


def test_a_name_is_as_good_as_its_label(pipe):
    name_classes(pipe.unet, NAMES)
    assert pipe.id2label == NAMES and pipe.classes == list(range(10))
    assert pipe.get_label_ids(["three", "nine"]) == [3, 9] and pipe.get_label_ids("three") == [3]
    for named in ("three", ["three"], ("three",), np.array(["three"])):
        assert torch.equal(images(pipe, named), images(pipe, 3))
    assert torch.equal(images(pipe, "three", batch_size=2), images(pipe, [3, 3]))
    assert torch.equal(images(pipe, ["three", 4, "nine"]), images(pipe, [3, 4, 9]))


def test_names_are_saved_and_loaded_with_the_network_without_a_warning(pipe, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    name_classes(pipe.unet, NAMES)
    stock = ConsistencyModelPipeline(pipe.unet, CMStochasticIterativeScheduler())
    two_times = TwoTimeModel.from_network(pipe.unet)
    name_classes(two_times, NAMES)
    for saved, folder in ((pipe, tmp_path / "ours"), (stock, tmp_path / "stock")):
        saved.save_pretrained(folder)
        assert "three" in json.loads((folder / "unet" / "config.json").read_text())["_id2label"].values()
        assert DiffusionPipeline.from_pretrained(folder).unet.config["_id2label"]["3"] == "three"
        assert ConsistencyPipeline.from_pretrained(folder).id2label == NAMES
    two_times.save_pretrained(tmp_path / "two")
    again = TwoTimeModel.from_pretrained(tmp_path / "two")
    assert again.config["_id2label"] == two_times.config["_id2label"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_labels_without_a_name_have_no_image_and_are_not_drawn(pipe):
    name_classes(pipe.unet, {"3": "c", 1: "a"})
    assert pipe.id2label == {1: "a", 3: "c"} and pipe.classes == [1, 3]
    assert set(seen_labels(pipe, batch_size=50)) == {1, 3}
    generators = [torch.Generator().manual_seed(seed) for seed in range(50)]
    assert set(seen_labels(pipe, generator=generators)) == {1, 3}
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    sample_images(pipe, range(5))
    assert seen == [1, 3, 1, 3, 1]


def test_without_names_all_labels_are_drawn_as_ever(pipe):
    expected = torch.Generator().manual_seed(0)
    torch.randn(50, 1, 8, 8, generator=expected)
    assert seen_labels(pipe, batch_size=50) == torch.randint(10, (50,), generator=expected).tolist()
    assert pipe.id2label is None and pipe.classes == list(range(10))


def test_one_class_may_have_several_names_and_one_name_several_classes(pipe):
    name_classes(pipe.unet, {0: "tench, Tinca tinca", 1: "crane", 2: "goldfish", 3: "crane, lifting machine"})
    assert pipe.get_label_ids(["Tinca tinca", "tench", "tench, Tinca tinca", "lifting machine"]) == [0, 0, 0, 3]
    assert pipe.get_label_ids("crane") == [1]  # the whole name of a class
    name_classes(pipe.unet, {0: "crane", 1: "crane"})
    with pytest.raises(ValueError, match=r"Several classes are called 'crane'; give one of their labels \[0, 1\]"):
        pipe.get_label_ids("crane")


def test_names_can_be_forgotten(pipe):
    name_classes(pipe.unet, NAMES)
    name_classes(pipe.unet, None)
    assert pipe.id2label is None


@pytest.mark.parametrize("labels", ["ten", ["one", "ten"]])
def test_unknown_names_are_errors_that_show_the_known_ones(pipe, labels):
    name_classes(pipe.unet, NAMES)
    with pytest.raises(ValueError, match="has no class 'ten'; it has 'zero', 'one'.*id2label"):
        images(pipe, labels)


def test_a_model_without_names_asks_for_labels(pipe):
    with pytest.raises(ValueError, match="does not know the names of its classes; give their labels"):
        images(pipe, "three")


@pytest.mark.parametrize(
    "id2label, message",
    [
        ({10: "ten"}, r"integers in \[0, 9\], got 10"),
        ({-1: "minus"}, r"integers in \[0, 9\], got -1"),
        ({"a": "b"}, r"integers in \[0, 9\], got 'a'"),
        ({0: 1}, "must be text, got 1 for the label 0"),
        ({}, "must map labels to names"),
        (["zero"], "must map labels to names"),
    ],
)
def test_names_that_can_not_be_meant_are_errors(tiny_unet, id2label, message):
    with pytest.raises(ValueError, match=message):
        name_classes(tiny_unet(), id2label)


def test_an_unconditional_network_has_no_classes_to_name(tiny_unet):
    with pytest.raises(ValueError, match="unconditional network can't be named"):
        name_classes(tiny_unet(num_classes=None), {0: "zero"})

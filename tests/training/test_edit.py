"""edit.py, called as by a user."""

import numpy as np
import pytest
from diffusers import EDMEulerScheduler
from PIL import Image

from cm_diffusers import DenoisingPipeline
from cm_diffusers.models import EDMUNet2DModel
from cm_diffusers.pipelines.class_names import name_classes
from tests.helpers.scripts import load_script
from tests.helpers.stock_pipelines import randomised
from tests.pipelines.test_editing import MASK, PIPELINES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models by kind: with RGB pixels, and with two classes."""
    folder = tmp_path_factory.mktemp("models")

    def network():
        return randomised(EDMUNet2DModel(8, 3, 3, 8, (1,), 1, num_class_embeds=2))

    for kind, build in PIPELINES.items():
        pipe = build(network())
        name_classes(pipe.unet, {0: "cat", 1: "dog"})
        pipe.save_pretrained(folder / kind)
    DenoisingPipeline(network(), EDMEulerScheduler()).save_pretrained(folder / "diffusion")
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Files to edit: two of the model's size, a small one, a grey one, a mask, and an invalid one."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    files = {
        "a": Image.fromarray(pixels),
        "b": Image.fromarray(255 - pixels),
        "small": Image.fromarray(pixels[:4, :4]),
        "grey": Image.fromarray(pixels[..., 0]),
        "mask": Image.fromarray((MASK.numpy() * 255).astype(np.uint8)),
    }
    for name, picture in files.items():
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "none.png").write_text("words")
    return tmp_path


@pytest.fixture
def edit(models, pictures):
    script = load_script("edit")

    def edit(task, *words, kind="consistency"):
        words = [str(pictures / word) if str(word).endswith(".png") else str(word) for word in words]
        paths = ["--pretrained_model_name_or_path", str(models / kind), "--output_dir", str(pictures / "out")]
        script.edit(script.parse_args([task, *words, *paths, "--device", "cpu", "--overwrite"]))
        made = sorted((pictures / "out" / "images").iterdir())
        return np.stack([np.asarray(Image.open(file)) for file in made]), Image.open(pictures / "out" / "grid.png")

    return edit


@pytest.mark.parametrize("kind", PIPELINES)
def test_inpainted_pictures_keep_what_the_mask_leaves(edit, pictures, kind):
    words = ("--images", "a.png", "b.png", "--mask", "mask.png", "--num_samples", 3, "--num_inference_steps", 2)
    made, grid = edit("inpaint", *words, "--class_labels", "dog", kind=kind)
    assert made.shape == (6, 8, 8, 3) and grid.width > 2 * grid.height * 0.9  # two rows of four
    for i, name in enumerate("aaabbb"):
        given = np.asarray(Image.open(pictures / f"{name}.png"))
        assert np.array_equal(made[i][MASK == 0], given[MASK == 0])
    assert not np.array_equal(made[0], made[1])
    again, _ = edit("inpaint", *words[:1], "b.png", *words[3:], "--class_labels", 1, kind=kind)
    assert np.abs(again.astype(int) - made[3:]).max() <= 1  # a sample depends only on its picture and seed


TASKS = {
    "outpaint": ("--images", "small.png", "--top", 1, "--left", 2),
    "colorize": ("--images", "grey.png"),
    "super_resolve": ("--images", "small.png"),
    "denoise": ("--images", "a.png", "--noise_level", 0.5, "--class_labels", "cat"),
    "change": ("--images", "a.png", "--noise_level", 2, "--num_inference_steps", 2),
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_is_that_method(edit, models, pictures, task):
    made, grid = edit(task, *TASKS[task])
    pipe = load_script("edit").load_pipeline(str(models / "consistency"))
    name = TASKS[task][1]
    arguments = {
        "outpaint": {"top": 1, "left": 2},
        "denoise": {"noise_level": 0.5, "class_labels": 0},
        "change": {"noise_level": 2, "num_inference_steps": 2},
    }.get(task, {})
    call = (lambda image, **more: pipe(image=image, **more)) if task == "change" else getattr(pipe, task)
    expected = call(Image.open(pictures / name), generator=[0], **arguments).images[0]
    assert np.abs(made[0].astype(int) - np.asarray(expected)).max() <= 1
    assert made.shape == (1, 8, 8, 3) and grid.width > 2 * 32


def test_a_diffusion_model_changes_pictures_and_does_not_edit_them(edit):
    edit("change", "--images", "a.png", "--noise_level", 2, kind="diffusion")
    with pytest.raises(ValueError, match="inpaint needs a model that jumps to clean images.*DenoisingPipeline"):
        edit("inpaint", "--images", "a.png", "--mask", "mask.png", kind="diffusion")


def test_interpolation_is_between_noises_or_with_trajectories_between_pictures(edit, pictures):
    made, _ = edit("interpolate", "--num_images", 4, "--class_labels", 1)
    assert made.shape == (4, 8, 8, 3) and not np.array_equal(made[0], made[3])
    made, _ = edit("interpolate", "--images", "a.png", "b.png", "--class_labels", 1, kind="ctm")
    assert made.shape == (8, 8, 8, 3)
    with pytest.raises(ValueError, match="needs two --images"):
        edit("interpolate", kind="ctm")
    with pytest.raises(ValueError, match="only trajectory models can find the noise"):
        edit("interpolate", "--images", "a.png", "b.png")


@pytest.mark.parametrize(
    "words, message",
    [
        (("inpaint", "--images", "a.png"), "inpaint needs --mask"),
        (("denoise", "--images", "a.png"), "denoise needs --noise_level"),
        (("colorize",), "colorize needs --images"),
        (("colorize", "--images", "grey.png", "--mask", "mask.png"), "mask has no effect on colorize"),
        (("inpaint", "--images", "none.png", "--mask", "mask.png"), "none.png' can't be read as a picture"),
        (("inpaint", "--images", "missing.png", "--mask", "mask.png"), "missing.png' can't be read as a picture"),
        (("inpaint", "--images", "small.png", "--mask", "mask.png"), "8 x 8 pixels, got 4 x 4"),
        (("change", "--images", "a.png"), "needs a noise_level"),
        (("interpolate", "--num_samples", 2), "num_samples has no effect"),
        (("interpolate", "--noise_level", 2), "noise_level has no effect"),
        (("denoise", "--images", "a.png", "--noise_level", 1, "--sigmas", 3), "denoise takes one step"),
        (("colorize", "--images", "grey.png", "--class_labels", "cow"), "cow"),
        (("colorize", "--images", "grey.png", "--class_labels", 0, 1), "one for all or one per picture, 1; got 2"),
        (("colorize", "--images", "grey.png", "--num_samples", 0), "num_samples must be at least 1"),
        (("colorize", "--images", "grey.png", "--revision", "main"), "revision has no effect"),
    ],
)
def test_what_can_not_be_done_is_said_and_earlier_images_stay(edit, pictures, words, message):
    edit("colorize", "--images", "grey.png")
    before = sorted((pictures / "out" / "images").iterdir())
    with pytest.raises(ValueError, match=message):
        edit(*words)
    assert sorted((pictures / "out" / "images").iterdir()) == before

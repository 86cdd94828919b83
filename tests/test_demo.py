"""The demo, through gradio's client and in a browser."""

import importlib
import socket
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from gradio_client import Client, handle_file
from huggingface_hub import constants
from PIL import Image

from cm_diffusers import (
    CTMPipeline,
    CTMScheduler,
    DenoisingPipeline,
    MeanFlowPipeline,
    TrigFlowPipeline,
    TrigFlowScheduler,
    TwoTimeModel,
)
from cm_diffusers.demo import Demo, main
from cm_diffusers.models import EDMUNet2DModel, build_unet
from cm_diffusers.sampling import CAPTION, load_pipeline, sample_images
from tests.helpers.browser import chromium


def random_weights(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def consistency_model(num_classes=3):
    """A consistency model of stock classes."""
    network = random_weights(build_unet("tiny", (8, 8), 1, num_classes))
    return ConsistencyModelPipeline(network, CMStochasticIterativeScheduler())


def trajectory_model(channels=3, **settings):
    network = random_weights(TwoTimeModel.from_network(build_unet("jvp_tiny", (8, 8), channels, 3)))
    return CTMPipeline(network, CTMScheduler(time_label="angle", **settings))


class Page:
    """A served page, with a count of its network's calls."""

    def __init__(self, demo):
        self.demo, self.calls = demo, 0
        demo.pipeline.unet.register_forward_hook(self._count)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.page = demo.page()
        self.page.launch(server_port=port, prevent_thread_lock=True, quiet=True, show_error=True)
        self.client = Client(self.page.local_url, verbose=False)

    def _count(self, *_):
        self.calls += 1

    def ask(self, name, **values):
        """The outputs of a click, with pictures as arrays."""
        self.calls = 0
        answers = self.client.predict(api_name=f"/{name}", **values)
        return [np.asarray(Image.open(a)) if a.endswith(".png") else a for a in answers]


def served(demo):
    page = Page(demo)
    yield page
    page.client.close()
    page.page.close()


@pytest.fixture(scope="module")
def consistency(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    consistency_model().save_pretrained(folder)
    yield from served(Demo(load_pipeline(str(folder)), "a/model"))


@pytest.fixture(scope="module")
def trajectory():
    yield from served(Demo(trajectory_model(), "a/trajectory"))


ROW = 242 + CAPTION  # row height of a grid of four, in pixels


def test_a_click_gives_a_grid_of_the_seeds_images_and_their_levels(consistency):
    grid, levels = consistency.ask("sample", steps=1, seed=5, count=3)
    assert levels == "80" and consistency.calls == 1 and grid.shape == (2 * ROW, 2 * 242, 3)
    images = sample_images(consistency.demo.pipeline, range(5, 8), num_inference_steps=1)
    assert images.std() > 0.05
    for i, image in enumerate(images):
        row, column = divmod(i, 2)
        shown = grid[ROW * row : ROW * row + 240 : 30, 242 * column : 242 * column + 240 : 30, 0]
        assert np.array_equal(shown, (image[..., 0] * 255).round().astype(np.uint8))


def test_the_slider_sets_the_number_of_network_calls(consistency):
    one, _ = consistency.ask("sample", steps=1, count=1)
    three, levels = consistency.ask("sample", steps=3, count=1)
    assert consistency.calls == 3 and len(levels.split(", ")) == 3 and levels.startswith("80, ")
    assert not np.array_equal(one, three)


def test_guidance_is_for_models_that_know_no_class():
    labelled = EDMUNet2DModel(8, 1, 1, 8, (1,), 1, num_class_embeds=3, label_dropout=0.1)
    network = random_weights(labelled)
    demo = Demo(DenoisingPipeline(network, EDMEulerScheduler()), "a/model")
    sliders = {
        name: [block for block in one.page().blocks.values() if getattr(block, "label", "") == "Guidance"]
        for name, one in (("labelled", demo), ("plain", Demo(trajectory_model(), "b/model")))
    }
    assert [block.visible for block in sliders["labelled"]] == [True]
    assert [block.visible for block in sliders["plain"]] == [False]
    plain, guided = (np.asarray(demo.sample(2, "", 0.0, 1, 0, 1, scale)[0]) for scale in (1, 3))
    images = sample_images(demo.pipeline, range(1), [0], num_inference_steps=2, guidance_scale=3)
    assert not np.array_equal(plain, guided)
    assert np.array_equal(guided[:480:60, :480:60, 0], (images[0, ..., 0] * 255).round().astype(np.uint8))


def test_a_list_of_levels_goes_before_the_number_of_steps(consistency):
    given, levels = consistency.ask("sample", steps=5, sigmas="80, 0.8", count=1)
    assert levels == "80, 0.8" and consistency.calls == 2
    assert np.array_equal(given, consistency.ask("sample", sigmas="80 0.8", count=1)[0])
    assert not np.array_equal(given, consistency.ask("sample", steps=2, count=1)[0])


def test_the_same_seed_gives_the_same_image_whatever_is_beside_it(consistency):
    alone, _ = consistency.ask("sample", steps=2, seed=7, count=1)
    beside, _ = consistency.ask("sample", steps=2, seed=6, count=2)
    assert np.abs(alone[:480:60, :480:60].astype(int) - beside[:240:30, 242:482:30]).max() <= 1  # up to rounding
    assert not np.array_equal(beside[:240, :240], beside[:240, 242:482])


def test_a_class_is_that_of_all_images(consistency):
    chosen, _ = consistency.ask("sample", label="2", seed=0, count=3)
    turn, _ = consistency.ask("sample", seed=0, count=3)
    images = sample_images(consistency.demo.pipeline, range(3), [2, 2, 2], num_inference_steps=1)
    assert np.array_equal(chosen[:240:30, :240:30, 0], (images[0, ..., 0] * 255).round().astype(np.uint8))
    same = [np.array_equal(chosen[y : y + 240, x : x + 240], turn[y : y + 240, x : x + 240]) for y, x in PLACES]
    assert same == [False, False, True]


PLACES = [(0, 0), (0, 242), (ROW, 0)]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sigmas": "0.8, 80"}, "must fall strictly"),
        ({"sigmas": "80, low"}, "must be falling numbers such as 80, 0.8; got '80, low'"),
        ({"sigmas": "100"}, "must not exceed sigma_max=80.0"),
        ({"sigmas": ","}, "non-empty list"),
        ({"seed": None}, "Seed is empty; give a number"),
        ({"seed": -1}, "less than minimum value 0"),
        ({"steps": 100}, "greater than maximum value"),
    ],
)
def test_what_can_t_be_done_is_an_error_on_the_page(consistency, values, message):
    with pytest.raises(Exception, match=message):
        consistency.ask("sample", **values)
    assert consistency.calls == 0


def controls(page):
    """The labels of the controls on the served page."""
    components = page.page.config["components"]
    return {c["props"].get("label") for c in components if c["props"].get("visible") is not False}


def test_a_page_shows_the_controls_that_its_model_has(consistency, trajectory):
    assert {"Steps", "Noise levels (sigma)", "Class", "Seed"} <= controls(consistency)
    assert not {"Gamma", "Jump"} & controls(consistency)
    assert {"Gamma", "Sample", "Jump", "Invert"} <= controls(trajectory)


UNET, JVP = (random_weights(build_unet(preset, (8, 8), 1)) for preset in ("tiny", "jvp_tiny"))
OTHERS = {  # a pipeline, the levels of three steps, network calls
    "diffusion": (DenoisingPipeline(UNET, EDMEulerScheduler()), "80, 2.515, 0.002", 5),
    "consistency": (TrigFlowPipeline(JVP, TrigFlowScheduler()), "80, 1.655, 0.6344", 3),
    "heun": (TrigFlowPipeline(JVP, TrigFlowScheduler(solver="heun")), "80, 2.515, 0.002", 5),
    "mean flow": (
        MeanFlowPipeline(random_weights(TwoTimeModel.from_network(JVP)), FlowMatchEulerDiscreteScheduler()),
        "inf, 2, 0.5",
        3,
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_model_has_a_page(kind):
    pipeline, levels, calls = OTHERS[kind]
    page = next(served(Demo(pipeline, "a/model")))
    assert {"Noise levels (sigma)", "Class", "Gamma"} & controls(page) == {"Noise levels (sigma)"}
    grid, used = page.ask("sample", steps=3, count=2)
    assert used == levels and page.calls == calls and grid.std() > 10


def test_gamma_is_that_of_the_slider(trajectory):
    chain, anew = (trajectory.ask("sample", steps=2, gamma=gamma, count=1)[0] for gamma in (0, 1))
    assert trajectory.calls == 2 and not np.array_equal(chain, anew)


def test_a_jump_from_a_sample(trajectory):
    picture, noisy, moved = trajectory.ask("jump", picture=None, seed=3, label="1", start=5, end=0.5)
    assert trajectory.calls == 2 + 1  # the sample and the jump
    image = sample_images(trajectory.demo.pipeline, range(3, 4), [1], num_inference_steps=2)[0]
    assert np.array_equal(picture[:240:30, :240:30], (image * 255).round().astype(np.uint8))
    x = torch.from_numpy(2 * image - 1).permute(2, 0, 1)[None]
    x = x + 5 * torch.randn((2, *x.shape), generator=torch.Generator().manual_seed(3))[1]
    expected = trajectory.demo.pipeline.jump(x, 5.0, 0.5, [1]) / 2
    for shown, sample in ((noisy, x / 11), (moved, expected)):
        pixels = ((sample[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
        assert np.abs(shown[:240:30, :240:30] - pixels.numpy()).max() <= 1


def test_an_inversion_of_an_upload(trajectory, tmp_path):
    """The upload is a wide RGBA picture; half of its middle is transparent, and so white, and half is blue."""
    pixels = np.zeros((40, 80, 4), np.uint8)
    pixels[:, 40:] = (0, 0, 255, 255)
    Image.fromarray(pixels).save(tmp_path / "upload.png")
    upload = handle_file(tmp_path / "upload.png")
    picture, noise, again, lost = trajectory.ask("invert", picture=upload, label="2", steps=2)
    assert trajectory.calls == 2 * 18 + 2  # Heun up, jumps down
    assert (picture[:240, :90] > 240).all() and (picture[:240, 150:240] == (0, 0, 255)).all()
    pipeline, labels = trajectory.demo.pipeline, {"class_labels": [2]}
    images = torch.from_numpy(picture[:240:30, :240:30].copy()).permute(2, 0, 1)[None] / 255
    found = pipeline.invert(images, **labels)
    expected = pipeline(latents=found, num_inference_steps=2, gamma=0, output_type="np", **labels).images[0]
    assert np.abs(again[:240:30, :240:30] - expected * 255).max() <= 2
    pixels = [p[:240:30, :240:30].astype(float) / 127.5 for p in (picture, again)]
    assert np.sqrt(((pixels[0] - pixels[1]) ** 2).mean()) == pytest.approx(float(lost), abs=0.01)
    assert noise.std() > 10


def drawn(folder, pixels, layer=None):
    """The value of an image editor: a picture, and strokes on it."""
    Image.fromarray(pixels).save(folder / "picture.png")
    value = {"background": handle_file(folder / "picture.png"), "layers": [], "composite": None}
    if layer is not None:
        Image.fromarray(layer).save(folder / "layer.png")
        composite = Image.alpha_composite(Image.fromarray(pixels).convert("RGBA"), Image.fromarray(layer))
        composite.save(folder / "composite.png")
        value["layers"] = [handle_file(folder / "layer.png")]
        value["composite"] = handle_file(folder / "composite.png")
    return value


def test_edits_of_a_picture_are_those_of_the_pipeline(trajectory, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    layer = np.zeros((8, 8, 4), np.uint8)
    layer[2:5, 3:] = (255, 0, 0, 255)
    mask = torch.from_numpy(layer[..., 3] > 0).float()
    value, pipeline = drawn(tmp_path, pixels, layer), trajectory.demo.pipeline
    image, strokes = pixels[None] / 255, np.where(layer[..., 3:] > 0, layer[..., :3], pixels)[None] / 255
    half = torch.nn.functional.avg_pool2d(torch.from_numpy(image).movedim(-1, 1), 2)
    call = {"class_labels": 1, "num_inference_steps": 3, "generator": [5, 6], "batch_size": 2, "output_type": "np"}
    expected = {
        "Inpaint": pipeline.inpaint(image, mask, **call),
        "Outpaint": pipeline.outpaint(half, **call),
        "Colorize": pipeline.colorize(image @ np.array([[0.299], [0.587], [0.114]]), **call),
        "Enlarge": pipeline.super_resolve(half, **call),
        "Change": pipeline(image=strokes, noise_level=2.0, **call),
    }
    for kind, made in expected.items():
        known, grid = trajectory.ask(
            "edit", kind=kind, drawn=value, label="1", seed=5, steps=3, noise_level=2.0, count=2
        )
        assert trajectory.calls == 3 and known.std() > 5
        for i in range(2):
            shown = grid[:240:30, 242 * i : 242 * i + 240 : 30].astype(int)
            assert np.abs(shown - made.images[i] * 255).max() <= 2, kind
    noisy, grid = trajectory.ask("edit", kind="Denoise", drawn=value, label="1", seed=5, noise_level=0.5, count=2)
    assert trajectory.calls == 1 and np.array_equal(grid[:240, :240], grid[:240, 242:482])  # no new noise is drawn


def test_edits_are_those_that_the_model_can_do(consistency, trajectory):
    assert trajectory.demo._edits() == ["Inpaint", "Outpaint", "Colorize", "Enlarge", "Denoise", "Change"]
    assert consistency.demo._edits() == ["Inpaint", "Outpaint", "Enlarge", "Denoise", "Change", "Interpolate"]
    for kind in ("diffusion", "heun", "mean flow"):
        assert Demo(OTHERS[kind][0], "a/model")._edits() == ["Change"]
    grid = consistency.demo.edit("Interpolate", None, 1, 3, 2, 1.0, 4)[1]
    assert np.asarray(grid).std() > 5


def test_without_a_picture_the_sample_of_the_seed_is_edited(consistency):
    known = consistency.demo.edit("Enlarge", {"background": None, "layers": []}, 1, 3, 2, 1.0, 2)[0]
    image = sample_images(consistency.demo.pipeline, range(3, 4), [1], num_inference_steps=2)[0, ..., 0]
    halves = image.reshape(4, 2, 4, 2).mean((1, 3))
    assert np.abs(np.asarray(known.convert("L"))[30:240:60, 30:240:60] - halves * 255).max() <= 1
    with pytest.raises(ValueError, match="Nothing is painted"):
        consistency.demo.edit("Inpaint", None, 1, 3, 2, 1.0, 2)
    with pytest.raises(ValueError, match="Noise level is empty"):
        consistency.demo.edit("Change", None, 1, 3, 2, None, 2)


def test_a_file_that_is_no_picture_is_an_error_on_the_page(trajectory, tmp_path):
    (tmp_path / "words.png").write_text("words")
    with pytest.raises(Exception, match="cannot identify image file"):
        trajectory.ask("invert", picture=handle_file(tmp_path / "words.png"))


@pytest.mark.parametrize(
    "levels, message",
    [
        ((0.5, 5), "not trained to jump to higher levels"),
        ((500, 5), r"must lie in \[0.002, 80.0\]"),
        ((5, None), "To noise level is empty"),
    ],
)
def test_a_jump_that_can_t_be_is_an_error_on_the_page(trajectory, levels, message):
    with pytest.raises(Exception, match=message):
        trajectory.ask("jump", picture=None, start=levels[0], end=levels[1])


def test_a_model_of_latents_has_no_page():
    with pytest.raises(ValueError, match="makes 4 channels"):
        Demo(trajectory_model(channels=4), "a/latent")


def test_no_model_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(SystemExit) as end:
            main([name])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and name in error


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "cm_diffusers.demo")
    with pytest.raises(SystemExit) as end:
        importlib.import_module("cm_diffusers.demo")
    assert end.value.code == 2
    assert capsys.readouterr().err == 'error: the demo needs gradio: pip install "cm-diffusers[demo]"\n'


@pytest.mark.slow
def test_in_a_browser_a_picture_appears_and_the_slider_changes_it(consistency, tmp_path):
    with chromium() as browser:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(browser, 60)
        browser.get(consistency.page.local_url)

        def find(kind, label):
            return wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, f"{kind}[aria-label*='{label}']"))[0]

        def shown():
            picture = browser.find_elements(By.CSS_SELECTOR, "img[src*='/file=']")
            return picture[0].get_attribute("src") if picture else None

        def click():
            before = shown()
            browser.find_element(By.XPATH, "//button[normalize-space()='Make images']").click()
            wait.until(lambda _: shown() not in (None, before))
            levels = browser.find_elements(By.TAG_NAME, "textarea")[-1].get_attribute("value")
            browser.save_screenshot(str(tmp_path / f"{len(levels)}.png"))
            return levels

        slider = find("input[type=range]", "Steps")
        assert click() == "80"
        slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        levels = click()
        assert levels.startswith("80, ") and len(levels.split(", ")) == 3
        assert len(list(tmp_path.glob("*.png"))) == 2

"""Whole samplers give the pipeline's images: in PyTorch, as programs for any batch, and in onnxruntime alone."""

import json

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler, TrigFlowPipeline, TrigFlowScheduler
from cm_diffusers.core.conditions import of_classes
from cm_diffusers.core.guidance import guide
from cm_diffusers.engine.deploy import program
from cm_diffusers.engine.deploy.program import _case, check_sampler, export_sampler
from cm_diffusers.engine.deploy.sampler import Sampler
from cm_diffusers.models import EDMUNet2DModel
from cm_diffusers.pipelines.class_names import name_classes
from tests.helpers.breadth import narrowed
from tests.helpers.scripts import load_script
from tests.helpers.stock_pipelines import autoencoder_kl, randomised
from tests.pipelines.test_guidance import KINDS, network_of


JUMPING = [kind for kind in KINDS if kind in ("consistency", "ctm", "trigflow", "mean flow")]


def pipeline_of(kind):
    pipe = KINDS[kind][0](network_of(kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent_pipeline():
    network = randomised(EDMUNet2DModel(4, 4, 4, 8, (1,), 1, num_class_embeds=3))
    pipe = ConsistencyPipeline(network, MultistepConsistencyScheduler(clip_denoised=False), autoencoder_kl(3))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def described(sampler):
    return {"inputs": sampler.example(), "steps": len(sampler.noise_levels)}


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize(
    "levels", [{}, {"num_inference_steps": 3}, {"sigmas": [80.0, 2.0, 0.5]}], ids=["default", "number", "sigmas"]
)
@pytest.mark.parametrize("kind", JUMPING)
def test_a_sampler_is_the_pipeline_s_call(kind, levels, guidance):
    pipe = pipeline_of(kind)
    sampler = Sampler(pipe, guidance, **levels)
    given, call = _case(pipe, described(sampler), 3)
    wanted = pipe(**call, **levels, output_type="pt").images
    with torch.no_grad():
        made = sampler(**given)
        torch.testing.assert_close(made, sampler(**given), rtol=0, atol=0)  # a second call gives the same images
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)
    assert made.shape == (3, 1, 8, 8) and made.std() > 0.003
    adds = len(sampler.noise_levels) > 1 and kind not in ("ctm", "mean flow")
    assert ("renoise" in given) == adds and sampler.noise_levels == pipe.noise_levels[:-1]


def test_the_share_of_new_noise_is_that_of_gamma():
    pipe = pipeline_of("ctm")
    for gamma, adds in ((0.0, False), (0.7, True)):
        sampler = Sampler(pipe, gamma=gamma, num_inference_steps=2)
        given, call = _case(pipe, described(sampler), 2)
        wanted = pipe(**call, gamma=gamma, num_inference_steps=2, output_type="pt").images
        assert ("renoise" in given) == adds
        torch.testing.assert_close(sampler(**given), wanted, rtol=0, atol=1e-6)


def test_latents_are_decoded_inside():
    pipe = latent_pipeline()
    sampler = Sampler(pipe, num_inference_steps=2)
    given, call = _case(pipe, described(sampler), 2)
    wanted = pipe(**call, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(sampler(**given), wanted, rtol=0, atol=1e-6)
    assert wanted.shape == (2, *pipe.image_shape)


def test_the_pipeline_stays_as_it_is():
    pipe = pipeline_of("consistency")
    pipe(class_labels=1, sigmas=[5.0, 1.0])
    before = pipe.scheduler.sigmas.tolist(), pipe.scheduler.step_index
    Sampler(pipe, num_inference_steps=4)
    assert (pipe.scheduler.sigmas.tolist(), pipe.scheduler.step_index) == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("denoising", "flow", "trigflow heun"))])
def test_models_that_do_not_jump_are_refused(kind):
    with pytest.raises(ValueError, match="models can be exported. Distil it first"):
        Sampler(pipeline_of(kind))


def test_guidance_needs_a_null_class():
    pipe = ConsistencyPipeline(network_of("consistency", label_dropout=0.0), MultistepConsistencyScheduler())
    with pytest.raises(ValueError, match="guidance needs a model with a null class"):
        Sampler(pipe, guidance=True)


EXPORTS = {
    "consistency, guided": (lambda: pipeline_of("consistency"), {"guidance": True, "num_inference_steps": 2}),
    "ctm": (lambda: pipeline_of("ctm"), {"gamma": 0.5, "num_inference_steps": 2}),
    "trigflow": (lambda: pipeline_of("trigflow"), {"num_inference_steps": 1}),
    "mean flow, guided": (lambda: pipeline_of("mean flow"), {"guidance": True, "num_inference_steps": 2}),
    "latents": (latent_pipeline, {"num_inference_steps": 1}),
    "half precision": (lambda: pipeline_of("consistency"), {"dtype": torch.float16, "num_inference_steps": 1}),
}


@pytest.mark.parametrize("name", narrowed(EXPORTS, "trigflow"))
def test_programs_take_any_batch_and_onnxruntime_gives_the_pipeline_s_images(name, tmp_path):
    build, settings = EXPORTS[name]
    pipe = build()
    levels = {key: value for key, value in settings.items() if key not in ("guidance", "dtype")}
    found = export_sampler(pipe, tmp_path, **settings)
    assert found["inputs"]["noise"]["shape"] == ["batch", *pipe.sample_shape]
    loaded = torch.export.load(tmp_path / found["torch_export"]).module()
    given, call = _case(pipe, found, 5)
    wanted = pipe(**call, **levels, output_type="pt").images
    half = found["dtype"] == "float16"
    torch.testing.assert_close(loaded(**given), wanted, rtol=0, atol=0.01 if half else 1e-5)
    checked = check_sampler(pipe, tmp_path, found, **levels)  # with batches of 1, 2 and 5
    assert checked["largest_difference"] <= (0.01 if half else 1e-5)
    assert checked["onnxruntime_seconds"] > 0 and checked["pipeline_seconds"] > 0


def test_halves_of_a_guided_batch_are_cut_and_not_chunked():
    """`chunk` becomes a sequence in ONNX, at which onnxscript's optimizer fails if the batch size is dynamic."""
    f = torch.randn(4, 3)
    told = of_classes(torch.tensor([1, 2]))
    made = guide(lambda both: f, told, told, 2.5)
    assert torch.equal(made, f[2:] + 2.5 * (f[:2] - f[2:]))


# --- the script


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "pipeline"
    network = randomised(EDMUNet2DModel(8, 1, 1, 8, (1,), 1, num_class_embeds=3))
    name_classes(network, {0: "cat", 2: "dog"})
    ConsistencyPipeline(network, MultistepConsistencyScheduler()).save_pretrained(folder)
    return folder


def export(model, folder, *words):
    script = load_script("export")
    paths = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(folder)]
    script.export(script.parse_args([*paths, *map(str, words)]))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """The script's output, with the page and a dummy runtime."""
    runtime, folder = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("exported")
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        (runtime / name).write_text(name)
    export(model, folder, "--num_inference_steps", 1, "--page", "--runtime_dir", runtime)
    return folder


def test_the_description_says_what_an_app_has_to_know(exported, model):
    found = json.loads((exported / "sampler.json").read_text())
    assert found["model"] == model.parent.name and found["image_shape"] == [1, 8, 8]
    assert found["classes"] == {"0": "cat", "2": "dog"}
    (sampler,) = found["samplers"]
    assert (exported / sampler["onnx"]).is_file() and (exported / sampler["torch_export"]).is_file()
    assert sampler["steps"] == 1 and sampler["sigmas"] == pytest.approx([80])
    assert {name: value["shape"] for name, value in sampler["inputs"].items()} == {
        "noise": ["batch", 1, 8, 8],
        "class_labels": ["batch"],
    }
    assert sampler["checked"]["largest_difference"] <= 1e-5
    assert str(model.parent) not in (exported / "sampler.json").read_text()


def test_the_page_holds_its_runtime_or_names_where_it_is(exported, tmp_path):
    page = (exported / "app.js").read_text()
    assert 'new URL("runtime/", import.meta.url)' in page and "RUNTIME_URL" not in page
    assert (exported / "runtime" / "ort.wasm.bundle.min.mjs").read_text() == "ort.wasm.bundle.min.mjs"
    card = (exported / "README.md").read_text()
    assert "sdk: static" in card and "app_file: index.html" in card
    from cm_diffusers.engine.deploy.page import RUNTIME_VERSION, write_page

    write_page(tmp_path, "user/model", str(tmp_path))
    assert f"onnxruntime-web@{RUNTIME_VERSION}/dist/" in (tmp_path / "app.js").read_text()
    assert "models:\n- user/model" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="lacks ort.wasm.bundle.min.mjs, .*onnxruntime-web"):
        write_page(tmp_path, "user/model", str(tmp_path), tmp_path)


@pytest.mark.wide
def test_a_graph_that_differs_is_not_left(model, tmp_path, monkeypatch):
    monkeypatch.setitem(program.TOLERANCE, "float32", -1.0)
    with pytest.raises(ValueError, match="1_step.onnx differs from the pipeline by"):
        export(model, tmp_path)
    assert not list(tmp_path.glob("*.onnx")) and not (tmp_path / "sampler.json").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--num_inference_steps", 2, "--sigmas", 80, 1), "num_inference_steps has no effect"),
        (("--runtime_dir", "dist"), "runtime_dir has no effect without --page"),
        (("--sigmas", 1, 80), "fall strictly"),
        (("--gamma", 0.5), "gamma"),
        (("--guidance",), "guidance needs a model with a null class"),
    ],
)
def test_what_can_not_be_exported_is_said(model, tmp_path, words, message):
    with pytest.raises((ValueError, TypeError), match=message):
        export(model, tmp_path, *words)


def test_a_package_that_is_missing_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="onnxruntime is not installed. Install it with: pip install onnxruntime"):
        export(model, tmp_path)


def test_a_stock_folder_is_exported(tmp_path):
    network = randomised(EDMUNet2DModel(8, 1, 1, 8, (1,), 1))
    ConsistencyModelPipeline(network, CMStochasticIterativeScheduler()).save_pretrained(tmp_path / "stock")
    pipe = load_script("export").load_pipeline(str(tmp_path / "stock"))
    pipe.set_progress_bar_config(disable=True)
    sampler = Sampler(pipe, num_inference_steps=2)
    given, call = _case(pipe, described(sampler), 2)
    wanted = pipe(**call, num_inference_steps=2, output_type="np").images
    assert list(given) == ["noise", "renoise"]
    np.testing.assert_allclose(sampler(**given).detach().permute(0, 2, 3, 1), wanted, rtol=0, atol=1e-6)


def test_diffusion_models_of_trigflow_are_told_by_their_solver():
    with pytest.raises(ValueError, match="By its solver this TrigFlowPipeline is a diffusion model"):
        Sampler(TrigFlowPipeline(network_of("trigflow"), TrigFlowScheduler(solver="euler")))

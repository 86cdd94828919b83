"""Text-to-image pipelines as teachers: prompts in, the pipeline's own steps out."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from cm_diffusers.engine.saved.lora import add_lora
from cm_diffusers.engine.saved.start import guided
from cm_diffusers.engine.saved.text import encode_prompts, free_encoders, read_text_to_image, too_long
from cm_diffusers.models.text_unet import with_guidance_input
from tests.helpers.stock_text_pipelines import TEXT_TO_IMAGE
from tests.helpers.tiny_text import CONTEXT, PIPELINES


PROMPTS = ["two red circles above a blue square", "a green triangle"]


def recorded(pipe, prompts, scale):
    """The noisy latents of the first step of a call, its time, and the clean latents that the scheduler estimates."""
    steps, step = [], pipe.scheduler.step

    def keep(output, time, sample, *args, **kwargs):
        result = step(output, time, sample, *args, **{**kwargs, "return_dict": True})
        steps.append((sample, time, result.pred_original_sample))
        return (result.prev_sample,)

    pipe.scheduler.step = keep
    pipe.set_progress_bar_config(disable=True)
    pipe(prompts, guidance_scale=scale, num_inference_steps=3, output_type="latent")
    return steps[1]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", PIPELINES)
def test_a_prompt_guides_as_in_the_pipeline_s_own_step(kind, scale, prediction):
    pipe = PIPELINES[kind]()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    sample, time, clean = recorded(pipe, PROMPTS, scale)
    model, condition = read_text_to_image(pipe), encode_prompts(pipe, PROMPTS)
    sigma = model.spec.process.sigma(torch.full((2,), float(time)).double()).float()
    x = sample / model.spec.process.alpha(sigma)[:, None, None, None]
    with torch.no_grad():
        found = guided(model, scale, nulls=condition.nulls)(x, sigma, condition)
    torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-5 * clean.abs().max().item())


def test_a_line_says_what_was_found():
    line = str(read_text_to_image(PIPELINES["sdxl"]()))
    assert line.startswith(
        "StableDiffusionXLPipeline, 0.1 M parameters, predicts epsilon on a scaled_linear VP schedule"
    )
    assert line.endswith("2 text encoder(s), 8 x 8 pixels")


def test_prompts_differ_and_do_not_depend_on_their_batch():
    pipe = PIPELINES["sdxl"]()
    both = encode_prompts(pipe, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = encode_prompts(pipe, [prompt])
        for name, entry in alone.entries.items():
            torch.testing.assert_close(entry[0], both.entries[name][i])
    assert not torch.allclose(both.entries["text"][0], both.entries["text"][1])
    assert both.entries["sizes"].tolist() == [[8, 8, 0, 0, 8, 8]] * 2


def test_prompts_beyond_the_context_are_named():
    pipe = PIPELINES["sd"]()
    long = " ".join(["a red circle"] * 5)
    assert too_long(pipe, [*PROMPTS, long]) == [long]
    assert encode_prompts(pipe, [long]).entries["text"].shape[1] == CONTEXT


def test_encoders_leave_once_the_prompts_are_encoded():
    pipe = PIPELINES["sdxl"]()
    encode_prompts(pipe, PROMPTS)
    free_encoders(pipe)
    assert all(getattr(pipe, part) is None for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    with pytest.raises(ValueError, match="has no tokenizer, tokenizer_2, text_encoder, text_encoder_2"):
        encode_prompts(pipe, PROMPTS)


@pytest.mark.parametrize("prompts", [[], [None], ["a", 7]])
def test_what_is_no_prompt_is_refused(prompts):
    with pytest.raises(ValueError, match="prompts must be one or more texts"):
        encode_prompts(PIPELINES["sd"](), prompts)


def test_what_is_no_teacher_is_refused():
    with pytest.raises(ValueError, match="this is a StableDiffusion3Pipeline; this version reads Stable"):
        read_text_to_image(TEXT_TO_IMAGE["sd3"]()[0])
    pipe = PIPELINES["sd"]()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="it is a few-step model already"):
        read_text_to_image(pipe)
    pipe = PIPELINES["sd"]()
    pipe.register_modules(unet=with_guidance_input(pipe.unet, 8))
    with pytest.raises(ValueError, match="a few-step model already \\(by its scheduler or its guidance input\\)"):
        read_text_to_image(pipe)
    pipe = PIPELINES["sd"]()
    for scheduler in (EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler(), DDIMScheduler(prediction_type="sample")):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match="says that its network predicts '(edm|flow|sample)'. This version"):
            read_text_to_image(pipe)
    pipe.scheduler = DDIMScheduler.from_config(PIPELINES["sd"]().scheduler.config, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="has zero terminal SNR .*it predicts v_prediction or sample"):
        read_text_to_image(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(PIPELINES["sd"]().scheduler.config)
    read_text_to_image(pipe)
    add_lora(pipe.unet, rank=2)
    with pytest.raises(ValueError, match="its network has adapters: default. .*fuse_lora"):
        read_text_to_image(pipe)

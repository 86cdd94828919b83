"""Text-to-image U-Nets behind a condition: the steps of diffusers' own pipelines."""

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.denoisers import Guided
from cm_diffusers.engine.saved.stock import read_scheduler
from cm_diffusers.models.text_unet import guidance_embedding, wanted_entries, with_conditions
from tests.helpers.stock_text_pipelines import TEXT_TO_IMAGE, WIDTH


def recorded(pipe, scale, **inputs):
    """The first step of a pipeline's call: noisy latents, time, and the clean latents that its scheduler estimates."""
    steps, step = [], pipe.scheduler.step

    def keep(output, time, sample, *args, **kwargs):
        kwargs["return_dict"] = True
        result = step(output, time, sample, *args, **kwargs)
        clean = getattr(result, "pred_original_sample", None)
        steps.append((sample, time, result.denoised if clean is None else clean))
        return (result.prev_sample, clean)

    pipe.scheduler.step = keep
    pipe.set_progress_bar_config(disable=True)
    pipe(**inputs, guidance_scale=scale, num_inference_steps=4, output_type="latent")
    return steps[1]


def condition_of(pipe, inputs, rows=1):
    """The condition of a call with these embeddings, and the null rows of its entries."""
    entries = {"text": inputs["prompt_embeds"]}
    nulls = {"text": inputs["negative_prompt_embeds"][0]} if "negative_prompt_embeds" in inputs else {}
    if "pooled" in wanted_entries(pipe.unet):
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        entries |= {"pooled": inputs["pooled_prompt_embeds"], "sizes": torch.tensor([[size, size, 0, 0, size, size]])}
        nulls["pooled"] = inputs["negative_pooled_prompt_embeds"][0]
    return Condition(entries), nulls


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_denoiser_estimates_what_the_pipeline_s_own_step_does(kind, scale, prediction):
    pipe, inputs = TEXT_TO_IMAGE[kind]()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    inputs.pop("guidance_scale", None)
    sample, time, clean = recorded(pipe, scale, **inputs, generator=torch.Generator().manual_seed(0))
    spec = read_scheduler(pipe.scheduler)
    condition, nulls = condition_of(pipe, inputs)
    denoiser = spec.denoiser(with_conditions(pipe.unet))
    sigma = spec.process.sigma(torch.as_tensor(time)[None].double()).float()
    x = sample / spec.process.alpha(sigma)
    guided = denoiser if scale == 1 else Guided(denoiser, scale, nulls)
    with torch.no_grad():
        found = guided(x, sigma, condition)
    torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-5 * clean.abs().max().item())


def test_guidance_is_an_input_of_latent_consistency_models():
    pipe, inputs = TEXT_TO_IMAGE["lcm"]()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    calls = []
    pipe.unet.register_forward_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pipe(**inputs, guidance_scale=8.5, num_inference_steps=4, output_type="latent", generator=generator)
    (sample, time), kwargs, output = calls[1]
    network = with_conditions(pipe.unet)
    keywords = network.adapt_condition(Condition({"text": inputs["prompt_embeds"], "guidance": torch.tensor([8.5])}))
    torch.testing.assert_close(keywords["timestep_cond"], kwargs["timestep_cond"])
    with torch.no_grad():
        torch.testing.assert_close(network(sample, time, **keywords).sample, output[0])


@pytest.mark.parametrize("channels", [8, 9, 256])
def test_the_guidance_embedding_is_that_of_diffusers(channels):
    pipe, _ = TEXT_TO_IMAGE["lcm"]()
    scale = torch.tensor([1.0, 2.5, 8.0])
    torch.testing.assert_close(
        guidance_embedding(scale, channels),
        pipe.get_guidance_scale_embedding(scale - 1, channels),
        rtol=1e-5,
        atol=1e-3,
    )


def test_conditions_that_do_not_fit_are_refused():
    unet = with_conditions(TEXT_TO_IMAGE["sd"]()[0].unet)
    text = torch.zeros(2, 3, WIDTH)
    for entries in ({}, {"text": text, "pooled": text[:, 0]}, {"class_labels": torch.zeros(2)}):
        with pytest.raises(ValueError, match="needs the entries text; it has"):
            unet.adapt_condition(Condition(entries))
    sdxl = with_conditions(TEXT_TO_IMAGE["sdxl"]()[0].unet)
    with pytest.raises(ValueError, match="needs the entries text, pooled, sizes; it has text"):
        sdxl.adapt_condition(Condition({"text": text}))
    sdxl.register_to_config(addition_embed_type="image")
    with pytest.raises(ValueError, match="additional input 'image'"):
        with_conditions(sdxl)

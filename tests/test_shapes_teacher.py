"""The teacher of the world of shapes: its parts, a few steps of its training, and its saved pipeline."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from cm_diffusers.engine.saved.text import encode_prompts, read_text_to_image, too_long
from cm_diffusers.toys import shapes, shapes_teacher
from cm_diffusers.toys.shapes_teacher import (
    CONTEXT,
    WORDS,
    MeanLatents,
    Size,
    drawn_prompts,
    embedded,
    encoded,
    held_out_prompts,
    judge_prompts,
    make_autoencoder,
    make_teacher,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    sampled,
    tokens_of,
    train_unet,
)


TINY = Size(2, 2, 2, pictures=8, autoencoder_batch=4, text_batch=4, batch=4)
PROMPTS = ["two red circles above a blue square", "a green triangle"]


def quiet(line):
    pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline after two steps, and the folder where it is saved."""
    folder = tmp_path_factory.mktemp("teacher")
    return make_teacher(folder, say=quiet, size=TINY), folder


def test_every_word_of_the_prompts_is_one_token_of_its_own():
    known = shapes.prompts() + shapes.prompts(held_out=True)
    assert {word for prompt in known for word in prompt.split()} == set(WORDS)
    tokenizer = make_tokenizer()
    tokens = [tokenizer(word).input_ids for word in WORDS]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert all(len(ids) == 3 and (ids[0], ids[2]) == (start, end) for ids in tokens)
    assert len({ids[1] for ids in tokens} - {start, end}) == len(WORDS)
    assert tokenizer.decode(tokenizer(PROMPTS[0]).input_ids, skip_special_tokens=True).strip() == PROMPTS[0]


def test_prompts_fit_the_context_and_differ(saved):
    known = shapes.prompts() + shapes.prompts(held_out=True)
    assert not too_long(saved[0], known)
    tokens = tokens_of(saved[0].tokenizer, known)
    assert tokens.shape == (len(known), CONTEXT) and len(tokens.unique(dim=0)) == len(known)
    lengths = [len(saved[0].tokenizer(prompt).input_ids) for prompt in known]
    assert max(lengths) < CONTEXT  # the encoder is causal: the paddings see all words


def test_the_u_net_has_one_to_three_million_parameters():
    assert 1e6 < sum(weight.numel() for weight in make_unet().parameters()) < 3e6


def test_latents_have_unit_variance_and_are_decoded_by_the_stock_rule():
    vae = make_autoencoder(Size(40, 0, 0, 0, autoencoder_batch=16), say=quiet)
    random = np.random.default_rng(0)
    named = shapes.prompts()[:64]
    latents = encoded(vae, named, seed=1)
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    pictures = torch.from_numpy(np.stack([shapes.draw(prompt, random) for prompt in named]))
    found = vae.decode(vae.encode(pictures).latents).sample
    black = (pictures + 1).square().mean()
    assert (found - pictures).square().mean() < 0.5 * black


def averages(prompts, random):
    """Latents (n, 4, 8, 8) of prompts without an autoencoder: scaled mean colours of 4 x 4 pixels, and zeros."""
    pictures = torch.from_numpy(np.stack([shapes.draw(prompt, random) for prompt in prompts]))
    return F.pad(3 * (F.avg_pool2d(pictures, 4) + 0.8), (0, 0, 0, 0, 0, 1))


def test_the_text_encoder_learns_what_is_where(monkeypatch):
    heads, random = [], np.random.default_rng(0)
    monkeypatch.setattr(shapes_teacher, "MeanLatents", lambda kind=MeanLatents: heads.append(kind()) or heads[-1])
    named = drawn_prompts(1000)
    size, tokenizer = Size(0, 100, 0, 0, text_batch=64), make_tokenizer()
    encoder = make_text_encoder(tokenizer, latents := averages(named, random), named, size, say=quiet)
    others = held_out_prompts(60)
    wanted = averages(others, random)
    with torch.no_grad():
        found = heads[0](encoder(tokens_of(tokenizer, others)).last_hidden_state)
    assert F.mse_loss(found, wanted) < 0.8 * F.mse_loss(latents.mean(0).expand_as(wanted), wanted)


def test_the_head_puts_each_cell_in_its_place():
    head = MeanLatents()
    with torch.no_grad():
        for weight in head.parameters():
            weight.zero_()
        head.cells.copy_(torch.eye(4, shapes_teacher.WIDTH))
        head.out = torch.nn.Linear(shapes_teacher.WIDTH, 64, bias=False)
        head.out.weight.zero_()
        head.out.weight[:16, 1] = torch.arange(16.0)  # the first channel of the cell at the top right
        head.out.weight[63, 2] = 7.0  # the last pixel of the last channel of the cell at the bottom left
        found = head(torch.zeros(1, 3, shapes_teacher.WIDTH))[0]
    assert torch.equal(found[0, :4, 4:].flatten(), torch.arange(16.0))
    assert found[3, 7, 3] == 7 and found.count_nonzero() == 16


def test_a_few_steps_lower_the_loss(saved):
    latents = 0.1 * torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    unet = UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(16,), attention_head_dim=2, cross_attention_dim=shapes_teacher.WIDTH, norm_num_groups=4,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(**saved[0].components | {"unet": unet}, requires_safety_checker=False)
    lines = []
    list(train_unet(pipeline, latents, shapes.prompts()[:8], Size(0, 0, 200, 0, batch=8), say=lines.append))
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in lines)
    assert last < 0.7 * first


def test_embeddings_are_those_of_the_pipeline_with_the_empty_prompt_first(saved):
    text, rows = embedded(saved[0], [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    wanted = encode_prompts(saved[0], PROMPTS)
    assert rows.tolist() == [1, 2, 1] and len(text) == 3
    torch.testing.assert_close(text[0], wanted.nulls["text"])
    torch.testing.assert_close(text[1:], wanted.entries["text"])


def test_training_is_determined_by_the_seed(saved, tmp_path):
    parts = ("vae", "unet", "text_encoder")
    again = make_teacher(tmp_path, say=quiet, size=TINY)
    other = make_teacher(tmp_path, seed=1, say=quiet, size=TINY)
    for part in parts:
        first, second, third = (getattr(pipe, part).state_dict() for pipe in (saved[0], again, other))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not all(torch.equal(first[name], third[name]) for name in first)


def test_the_saved_pipeline_gives_the_same_pictures(saved):
    pipeline, folder = saved
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    first, second = (sampled(pipe, PROMPTS, num_inference_steps=3) for pipe in (pipeline, loaded))
    assert first.shape == (2, 3, 32, 32) and abs(first).max() <= 1
    assert np.array_equal(first, second)


def test_the_saved_pipeline_is_read_as_a_teacher(saved):
    model = read_text_to_image(saved[0])
    assert "predicts v_prediction on a scaled_linear VP schedule of 1000 steps" in str(model)
    assert "32 x 32 pixels" in str(model) and model.sample_shape == (4, 8, 8)
    assert encode_prompts(saved[0], PROMPTS).entries["text"].shape == (2, CONTEXT, shapes_teacher.WIDTH)


@pytest.mark.parametrize("scheduler", [None, LCMScheduler])
def test_pictures_do_not_depend_on_the_batch(saved, scheduler):
    pipeline = StableDiffusionPipeline(**saved[0].components, requires_safety_checker=False)
    if scheduler:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    both = sampled(pipeline, PROMPTS, num_inference_steps=2)
    alone = sampled(pipeline, PROMPTS[::-1], num_inference_steps=2, batch_size=1)
    np.testing.assert_allclose(both, alone[::-1], atol=1e-4)
    other = sampled(pipeline, PROMPTS, seed=1, num_inference_steps=2)
    assert abs(both - other).max() > 0.01


def test_the_judge_sees_the_pictures_of_the_pipeline():
    """A pipeline that draws the prompts is right for all; one that shifts them by a place is right for hardly any."""

    class Draws:
        def __init__(self, shift):
            self.shift, self.random = shift, np.random.default_rng(0)

        def set_progress_bar_config(self, disable):
            assert disable

        def __call__(self, prompts, **options):
            shifted = prompts[self.shift :] + prompts[: self.shift]
            pictures = np.stack([shapes.draw(prompt, self.random) for prompt in shifted])
            return SimpleNamespace(images=(pictures.transpose(0, 2, 3, 1) + 1) / 2)

    named = held_out_prompts(50)
    assert judge_prompts(Draws(0), named, batch_size=20) == 1
    assert judge_prompts(Draws(1), named, batch_size=20) < 0.1


def test_held_out_prompts_are_mixed_and_always_the_same():
    named = held_out_prompts(400)
    assert named[:100] == held_out_prompts(100) and len(set(named)) == 400
    assert set(named) < set(shapes.prompts(held_out=True))
    counts = [sum(f" {place} " in prompt for prompt in named) for place in shapes.PLACES]
    assert min(counts) > 60
    assert any(a > b for a, b in itertools.pairwise(named))

"""The card of a few-step text-to-image model: a LoRA with its scheduler, or a whole pipeline."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

import cm_diffusers
from cm_diffusers.engine.config import Config
from cm_diffusers.engine.files import HUB_CARDS, RunFiles
from cm_diffusers.engine.shareable import hub_id
from cm_diffusers.engine.sharing.card import RunSummary, card_facts, model_card, read_facts
from cm_diffusers.objectives import Objective


TEMPLATE = HUB_CARDS / "text_card.md"
STEPS = 4  # in the code on the card


def text_card_facts(
    config: Config,
    objective: Objective,
    pipeline: DiffusionPipeline,
    run: RunSummary,
    grids: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the facts for the card of `pipeline` as JSON values, without its name.

    Args:
        config: the settings of the run.
        objective: the method.
        pipeline: the student.
        run: further facts of the run.
        grids: by title, a picture in the model's folder ("file") and its prompts ("prompts", a list).
    """
    unet, args, options = pipeline.unet, config.model, config.options
    plain = SimpleNamespace(unet=unet, scheduler=pipeline.scheduler, default_steps=(STEPS,))
    facts = card_facts(config, objective, plain, run, grids)
    lora = args.lora_rank is not None
    trained = [weight for name, weight in unet.named_parameters() if not lora or "lora_" in name]
    scale = f"scale {args.teacher_guidance_scale:g}"
    if options.draws_guidance:
        scale = f"scales {options.w_min:g} to {options.w_max:g}"
    own = unet.config.sample_size * pipeline.vae_scale_factor
    size = config.data.size or (own, own)
    prompts = [prompt for grid in grids.values() for prompt in grid["prompts"]]
    if config.data.prompts is not None:
        facts |= {"dataset": "prompts alone, without images"}
    return facts | {
        "rows": "images with captions" if config.data.prompts is None else "prompts",
        "base": hub_id(options.teacher),
        "base_revision": args.teacher_revision,
        "base_variant": args.teacher_variant,
        "loras": [hub_id(name) or "a local LoRA" for name in args.teacher_lora or []],
        "fused": not lora or config.run.fuse,
        "rank": args.lora_rank,
        "parameters": sum(weight.numel() for weight in trained),
        "scheduler": type(pipeline.scheduler).__name__,
        "guidance": scale,
        "guidance_input": guidance_input(config),
        "size": None if size == (own, own) else list(size),  # the pipeline's default
        "prompt": prompts[0] if prompts else "a photo of a cat",
    }


def guidance_input(config: Config) -> float | None:
    """The guidance scale in the code on the card, the middle of the trained range; None without an input for it."""
    if config.model.unet_time_cond_proj_dim is None:
        return None
    return (config.options.w_min + config.options.w_max) / 2


def text_snippet(facts: Mapping[str, Any], repo: str) -> str:
    """Return Python code that loads the model with diffusers and makes an image.

    Args:
        facts: from `text_card_facts`.
        repo: Hub id or folder of the model.
    """
    name, scheduler = json.dumps(repo), facts["scheduler"]
    lines = ["from diffusers import DiffusionPipeline", ""]
    if facts["fused"]:
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({name})")
    else:
        lines[0] += f", {scheduler}"
        source = {"revision": facts["base_revision"], "variant": facts["base_variant"]}
        more = "".join(f", {key}={json.dumps(value)}" for key, value in source.items() if value is not None)
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({json.dumps(facts['base'] or 'the teacher')}{more})")
        for lora in facts["loras"]:
            lines += [f"pipe.load_lora_weights({json.dumps(lora)})", "pipe.fuse_lora()", "pipe.unload_lora_weights()"]
        lines.append(f"pipe.load_lora_weights({name})")
        lines.append(f'pipe.scheduler = {scheduler}.from_pretrained({name}, subfolder="scheduler")')
    prompt, scale = json.dumps(facts["prompt"], ensure_ascii=False), facts["guidance_input"] or 1
    size = "" if facts["size"] is None else ", height={}, width={}".format(*facts["size"])
    lines.append(f"image = pipe({prompt}{size}, num_inference_steps={STEPS}, guidance_scale={scale:g}).images[0]")
    return "\n".join(lines)


def card_of_any_model(facts: Mapping[str, Any], repo: str, metrics: Path) -> ModelCard:
    """Make the card of a text-to-image model or of another model.

    Args:
        facts: from `text_card_facts`, or from `card_facts`.
        repo: the name of the model in the card.
        metrics: path of metrics.json, which can be missing.

    Raises:
        ValueError: the metrics are damaged, or the front matter of the card can't be read back.
    """
    return text_card(facts, repo) if "guidance_input" in facts else model_card(facts, repo, metrics)


def usage(folder: Path, config: Config) -> str:
    """Return Python code that loads a saved model on this machine, and makes an image.

    Args:
        folder: the folder of the model, beside the facts of its card.
        config: the settings of the run.
    """
    here = {"base": config.options.teacher, "loras": config.model.teacher_lora or []}
    return text_snippet({**read_facts(folder.parent / RunFiles.FACTS), **here}, str(folder))


def text_card(facts: Mapping[str, Any], repo: str) -> ModelCard:
    """Make the card of a few-step text-to-image model, which is saved as its README.md.

    Args:
        facts: from `text_card_facts`.
        repo: the name of the model in the card: its Hub id, or the name of its folder.

    Raises:
        ValueError: the front matter of the card can't be read back.
    """
    kind = [] if facts["fused"] else ["lora"]
    family = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}.get(facts["scheduler"], facts["method"])
    tags = ["cm_diffusers", "text-to-image", *kind, *dict.fromkeys([family, facts["method"]])]
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
        datasets=facts["datasets"],
        base_model=facts["base_model"],
        license=facts["licence"],
    )
    if facts["base_model"]:
        card_data["base_model_relation"] = "finetune" if facts["fused"] else "adapter"
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=repo.split("/")[-1],
        snippet=text_snippet(facts, repo),
        version=cm_diffusers.__version__,
        **{**facts, "recipe": yaml.safe_dump(facts["recipe"], sort_keys=False).strip()},
    )
    if yaml.safe_load(str(card).split("---")[1]) != card.data.to_dict():
        raise ValueError(
            "the front matter of the model card can't be read back. This is a bug of cm_diffusers; please report it."
        )
    return card

"""The tables of README and docs/numbers.md, written from hub_cards/results.yaml.

    python benchmarks/published.py

The command replaces what stands between `<!-- numbers: NAME -->` and `<!-- end -->` in both files. A test compares.
"""

import re
from pathlib import Path

import numpy as np
import yaml

from cm_diffusers.objectives import OBJECTIVES


ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs/numbers.md", ROOT / "docs/papers.md")
PUBLISHED = yaml.safe_load((ROOT / "hub_cards/results.yaml").read_text(encoding="utf-8"))
RESULTS = {result["id"]: result for result in PUBLISHED["results"] if "id" in result}
LEVELS = ("sigmas 80", "sigmas 80 1.536", "sigmas 80 20 5 1.5 0.5")  # of 1, 2 and 5 calls
TEACHERS = {"cd": "diffusion", "ecd": "diffusion", "scd": "trigflow", "ctm": "diffusion"}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def shown(value: float | None) -> str:
    """Three digits, or nothing."""
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def mnist(method: str) -> list[float | None]:
    """The Fréchet distances of a method at 1, 2 and 5 calls."""
    if method in RESULTS["family"]["values"]:
        return RESULTS["family"]["values"][method]
    if method == "ctm":
        return [*RESULTS["ctm"]["values"]["from the teacher of 13.941"][:2], None]
    values = RESULTS[method]["values"]
    if method in ("scd", "sct"):
        return [values["sigmas 80"], values["sigmas 80 0.8"], None]
    return [values[levels] for levels in LEVELS]


def minutes(method: str) -> str:
    """The measured minutes of training, and those of the teacher."""

    def of(name: str) -> str:
        home = RESULTS["family"] if name in RESULTS["family"]["values"] else RESULTS[name]
        seconds = home["training_seconds"]
        if isinstance(seconds, dict):
            seconds = seconds.get("from the teacher" if name == "ctm" else name)
        return f"{seconds / 60:.0f}" if seconds else ""

    return " + ".join(of(name) for name in (method, TEACHERS.get(method)) if name)


def methods(names: tuple[str, ...], calls: int) -> str:
    """Methods on MNIST in 1, 2 (and 5) calls."""
    head = ["method", "minutes (+ teacher's)", *(f"{n} call{'s' * (n > 1)}" for n in (1, 2, 5)[:calls])]
    return table(head, [[f"`{name}`", minutes(name), *map(shown, mnist(name)[:calls])] for name in names])


def diffusion() -> str:
    """The teachers on MNIST."""
    rows = [("`diffusion`", "diffusion"), ("`diffusion --interpolant trigflow`", "trigflow")]
    return table(
        ["teacher", "minutes", "35 calls"],
        [[name, minutes(key), shown(*RESULTS[key]["values"].values())] for name, key in rows],
    )


def trajectories() -> str:
    """CTM by calls and gamma."""
    names = ("from a teacher", "from scratch")
    head = ["`ctm`", "minutes", "1 call", *(f"{n} calls, gamma {g}" for n in (2, 4) for g in ("0", "0.5", "1"))]
    result = RESULTS["ctm"]
    rows = zip(names, result["training_seconds"].values(), result["values"].values())
    return table(head, [[name, f"{seconds / 60:.0f}", *map(shown, values)] for name, seconds, values in rows])


def students() -> str:
    """Students of models that diffusers alone trained."""
    result = RESULTS["stock_teachers"]
    rows = [
        ("EDM's F, 720 steps", "`ect`", "edm_ect"),
        ("v on a cosine VP schedule, 1,450 steps", "`ect`", "v_ect"),
        ("", "`cd`", "v_cd"),
        ("flow matching, 1,450 steps", "`ect`", "flow_ect"),
        ("", "`cd`", "flow_cd"),
        ("", "`scd`", "flow_scd"),
        ("noise on a cosine VP schedule, 720 steps", "`ect`", "eps_ect3"),
        ("v in latents of an AutoencoderKL, 1,450 steps", "`ect`", "latent_ect"),
        ("v by a DiT in such latents, 1,450 steps", "`ect`", "dit_ect"),
    ]
    seconds, distances = result["training_seconds"], result["values, at 1 and 2 calls"]
    better = {"eps_ect3": f" ({shown(result['other levels']['eps_ect3, sigmas 30 3'])} at sigmas 30, 3)"}
    return table(
        ["the teacher predicts", "student", "minutes", "1 call", "2 calls"],
        [
            [what, student, f"{seconds[key] / 60:.0f}", shown(one), shown(two) + better.get(key, "")]
            for what, student, key in rows
            for one, two in [distances[key]]
        ],
    )


def quickstart() -> str:
    """The digits of the quickstart."""
    result = RESULTS["quickstart"]
    head = [*(name.replace("step", "call") for name in result["values"]), *result["reference"]]
    return table(head, [[f"{value:.2f}" for value in [*result["values"].values(), *result["reference"].values()]]])


def guidance() -> str:
    """Guided digits."""
    values = RESULTS["guidance"]["values"]
    return table(
        ["guidance scale", *map(str, values)],
        [
            ["samples of the requested class", *(f"{100 * share:.1f} %" for share, _ in values.values())],
            ["standard deviation within a class", *(f"{spread:.3f}" for _, spread in values.values())],
        ],
    )


def shapes() -> str:
    """Text-to-image students of the world of shapes, beside their teacher."""
    values = RESULTS["shapes"]["values"]
    names = {"teacher_own": "the teacher's own sampler, guided (two calls in a step)"}
    head = ["", *(f"{n} step{'s' * (n > 1)}" for n in (1, 2, 4, 8)), "25 steps"]
    rows = [
        [names.get(name, f"`{name}`, a LoRA"), *(f"{100 * share:.1f} %" for share in found.values()), ""]
        for name, found in values.items()
        if isinstance(found, dict)
    ]
    rows.insert(0, ["the teacher, guided", "", "", "", "", f"{100 * values['teacher']:.1f} %"])
    return table(head, rows)


def lora_order() -> str:
    """Orders of a task LoRA and of distillation: mean and standard deviation over seeds."""
    values = RESULTS["lora_order"]["values"]
    head = ["", *(f"{n} step{'s' * (n > 1)}" for n in (1, 2, 4))]
    rows = []
    for order, found in values.items():
        if isinstance(found, dict):
            shares = (100 * np.array(found[n]) for n in (1, 2, 4))
            rows.append([order, *(f"{share.mean():.1f} +- {share.std(ddof=1):.1f} %" for share in shares)])
    return table(head, rows)


def budget(paper: dict) -> str:
    """Steps, images and GPUs of the recipe for CIFAR-10."""
    if not paper["recipe"]:
        return "not given"
    recipe = yaml.safe_load((ROOT / f"training/configs/{paper['recipe']}.yaml").read_text(encoding="utf-8"))
    gpus, steps = paper["gpus"], recipe["max_train_steps"]
    start = recipe.get("pretrained_teacher_model") or recipe.get("pretrained_model_name_or_path")
    after = f", after `{Path(start).parent.name}`" if start else ""
    return f"{steps:,} steps of {recipe['train_batch_size'] * gpus:,} images, {gpus} GPU{'s' * (gpus > 1)}{after}"


def ours(method: str) -> str:
    """The distances of a method on MNIST, and its minutes."""
    if method == "cdm":
        return "[against EDM](numbers.md#cdm-against-edm)"
    if method == "diffusion":
        return f"{shown(*RESULTS[method]['values'].values())} (35 calls); {minutes(method)} min"
    if method not in RESULTS["family"]["values"] and method not in RESULTS:
        return "not measured"
    one, two, *_ = map(shown, mnist(method))
    return f"{one}, {two}" + (f"; {minutes(method)} min" if minutes(method) else "")


def papers() -> str:
    """Paper, code, recipe, budget, the paper's numbers and ours."""
    rows = []
    for method, paper in PUBLISHED["papers"].items():
        file = OBJECTIVES[method].__module__.rpartition(".")[2] + ".py"
        rows.append(
            [
                f"`{method}`: {OBJECTIVES[method].summary.paper}",
                f"[{file}](../cm_diffusers/objectives/{file})",
                f"`{paper['recipe']}`" if paper["recipe"] else "none",
                budget(paper),
                paper["fid"] or "not given",
                f"`{paper['ours']}`" if paper["ours"] else "none",
                ours(method),
            ]
        )
    return table(
        ["method", "file", "recipe for CIFAR-10", "budget", "the paper's FID", "recipe for MNIST", "our distance"],
        rows,
    )


TABLES = {
    "best": lambda: methods(("ect", "ict", "ecd", "scd", "ctm"), calls=2),
    "methods": lambda: methods(("ect", "ict", "ct", "ecd", "cd", "scd", "sct"), calls=3),
    "teachers": diffusion,
    "trajectories": trajectories,
    "students": students,
    "quickstart": quickstart,
    "guidance": guidance,
    "papers": papers,
    "shapes": shapes,
    "lora_order": lora_order,
}
PLACE = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The text of a page with its tables as results.yaml has them.

    Raises:
        KeyError: a table is unknown.
    """
    return PLACE.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(with_tables(text), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {len(PLACE.findall(text))} tables")

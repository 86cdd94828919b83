"""Rules for settings that have no effect in some training runs, and for settings that flags replace."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm_diffusers.objectives.options import steps_of


Values = Mapping[str, Any]  # settings of a run by their flag names, without the options of other methods

SOURCES = ("dataset_name", "train_data_dir")
OF_A_SOURCE = ("dataset_config_name", "dataset_revision", "split", "image_column", "label_column", "channels")
NEW_NETWORK = ("model_preset", "model_config_name_or_path")
START = ("pretrained_model_name_or_path", "revision", "variant")
TEACHER = (
    "pretrained_teacher_model", "teacher_revision", "teacher_variant", "from_scratch", "teacher_guidance_scale"
)  # fmt: skip
LENGTHS = ("max_train_steps", "num_train_epochs", "minutes")

# for each flag, the settings of a config file that it replaces: those that answer the same question, and their details
REPLACES = {
    **dict.fromkeys(SOURCES, SOURCES + OF_A_SOURCE),
    "pretrained_model_name_or_path": ("revision", "variant", "from_scratch", *NEW_NETWORK, "time_label", "sigma_data"),
    "model_preset": ("model_config_name_or_path", *START),
    "model_config_name_or_path": ("model_preset", *START),
    "from_scratch": START,
    "pretrained_teacher_model": ("teacher_revision", "teacher_variant", "trajectory", "sigma_data"),
    "trajectory": TEACHER,
    "vae_name_or_path": ("sigma_data",),
    **{name: tuple(other for other in LENGTHS if other != name) for name in LENGTHS},
    "use_8bit_adam": ("optimizer",),
    "optimizer": ("use_8bit_adam",),
    "lr_scheduler": ("lr_num_cycles", "lr_power", "lr_step_rules"),
}


def replaced(flags: Values, in_file: Values) -> dict[str, str]:
    """Return the settings of a config file that flags replace, each with the flag that replaces it.

    Args:
        flags: the settings given as flags.
        in_file: the settings of the config file.
    """
    found = {}
    for flag, names in REPLACES.items():
        if not flags.get(flag) or flags[flag] == in_file.get(flag) or flags[flag] == "teacher":
            continue  # trajectory "teacher" keeps the teacher
        if flag in SOURCES and flag in in_file:
            found[flag] = flag  # reported, although a flag wins anyway
        found |= {name: flag for name in names if name in in_file and name not in flags}
    return found


@dataclass(frozen=True)
class Rule:
    """A condition under which some settings have no effect.

    Args:
        names: the settings without effect.
        causes: the settings that switch them off; empty if the length of the run does.
        when: the condition, a function of all settings.
        why: the reason and the next step, for the user; `{name}` is replaced by the value of that setting.
    """

    names: tuple[str, ...]
    causes: tuple[str, ...]
    when: Callable[[Values], bool]
    why: str


def _from_start(values: Values) -> bool:
    return values["pretrained_model_name_or_path"] is not None


def _from_teacher(values: Values) -> bool:
    taught = values.get("pretrained_teacher_model") is not None
    return taught and not values["from_scratch"] and not _from_start(values)


def _whole_run(name: str) -> Callable[[Values], bool]:
    return lambda values: steps_of(values.get(name), values["max_train_steps"]) >= values["max_train_steps"]


def _is(name: str, *options: Any) -> Callable[[Values], bool]:
    return lambda values: name in values and values[name] in options


def _local(name: str) -> Callable[[Values], bool]:
    return lambda values: values.get(name) is not None and Path(values[name]).exists()


SHARE = "Give fewer steps, a share of the run such as 0.3, or a larger --max_train_steps"
HUB = ("hub_model_id", "hub_private_repo", "hub_strategy", "hub_timeout")
GAN = tuple(f"discriminator_{name}" for name in ("start_step", "period", "learning_rate", "backbone"))

RULES = (
    Rule(
        ("max_train_steps",),
        ("num_train_epochs",),
        lambda values: values["num_train_epochs"] is not None,
        "--num_train_epochs {num_train_epochs} sets the length of the run. Leave one of them out",
    ),
    Rule(
        ("max_train_steps", "num_train_epochs"),
        ("minutes",),
        lambda values: values["minutes"] is not None,
        "--minutes {minutes} sets the length of the run. Leave one of them out",
    ),
    Rule(
        ("pretrain_steps",),
        (),
        _whole_run("pretrain_steps"),
        "{pretrain_steps} pretraining steps leave no steps for {method} in a run of {max_train_steps}. " + SHARE,
    ),
    Rule(
        ("lr_warmup_steps",),
        ("lr_scheduler",),
        _is("lr_scheduler", "constant", "piecewise_constant"),
        "lr_scheduler {lr_scheduler} has no warm-up. Use --lr_scheduler constant_with_warmup",
    ),
    Rule(
        ("lr_num_cycles",),
        ("lr_scheduler",),
        lambda values: values["lr_num_cycles"] != 1 and values["lr_scheduler"] != "cosine_with_restarts",
        "only --lr_scheduler cosine_with_restarts uses it, and lr_scheduler is {lr_scheduler}",
    ),
    Rule(
        ("lr_power",),
        ("lr_scheduler",),
        lambda values: values["lr_power"] != 1 and values["lr_scheduler"] != "polynomial",
        "only --lr_scheduler polynomial uses it, and lr_scheduler is {lr_scheduler}",
    ),
    Rule(
        ("optimizer",),
        ("use_8bit_adam",),
        _is("use_8bit_adam", True),
        "--use_8bit_adam names another optimizer. Leave one of them out",
    ),
    Rule(
        ("lr_warmup_steps",),
        (),
        _whole_run("lr_warmup_steps"),
        "a warm-up of {lr_warmup_steps} steps does not end in a run of {max_train_steps} steps. " + SHARE,
    ),
    Rule(
        ("tangent_warmup_steps",),
        (),
        _whole_run("tangent_warmup_steps"),
        "a warm-up of {tangent_warmup_steps} steps does not end in a run of {max_train_steps} steps. " + SHARE,
    ),
    Rule(
        ("discriminator_start_step",),
        (),
        _whole_run("discriminator_start_step"),
        "a run of {max_train_steps} steps has no step {discriminator_start_step}. " + SHARE,
    ),
    Rule(
        NEW_NETWORK,
        START,
        _from_start,
        "--pretrained_model_name_or_path {pretrained_model_name_or_path} defines the network. Leave one of them out",
    ),
    Rule(
        (*NEW_NETWORK, "time_label"),
        ("pretrained_teacher_model",),
        _from_teacher,
        "the network is the one of the teacher, {pretrained_teacher_model}. Add --from_scratch for a new network",
    ),
    Rule(
        ("model_preset",),
        ("model_config_name_or_path",),
        lambda values: values["model_config_name_or_path"] is not None,
        "--model_config_name_or_path {model_config_name_or_path} defines the network. Leave one of them out",
    ),
    Rule(
        ("revision",),
        START,
        _local("pretrained_model_name_or_path"),
        "{pretrained_model_name_or_path} is a folder, and only models on the Hub have revisions",
    ),
    Rule(
        ("teacher_revision",),
        TEACHER,
        _local("pretrained_teacher_model"),
        "{pretrained_teacher_model} is a folder, and only models on the Hub have revisions",
    ),
    Rule(
        ("label_column", "label_dropout"),
        ("class_conditional",),
        _is("class_conditional", False),
        "labels are read only with --class_conditional. Add that or leave this out",
    ),
    Rule(
        ("split",),
        SOURCES,
        lambda values: values["dataset_name"] == "digits" and values["split"] != "train",
        "the digits have only one split, train",
    ),
    Rule(
        ("dataset_config_name", "dataset_revision", "image_column", "label_column", "dataloader_num_workers"),
        SOURCES,
        _is("dataset_name", "digits"),
        "the digits come from scikit-learn, without configurations, revisions, columns or files",
    ),
    Rule(
        ("dataset_config_name", "dataset_revision"),
        SOURCES,
        lambda values: values["train_data_dir"] is not None,
        "--train_data_dir is a folder of images, and only datasets on the Hub have configurations and revisions",
    ),
    Rule(
        ("ema_rampup",),
        ("ema_decay",),
        lambda values: bool(values["ema_decay"]) and not values["ema_half_life"],
        "a constant --ema_decay has no ramp-up. Give --ema_half_life instead",
    ),
    Rule(
        HUB,
        ("push_to_hub",),
        _is("push_to_hub", False),
        "only --push_to_hub publishes the model. Add that or leave this out",
    ),
    Rule(
        ("tracker_project_name", "logging_dir"),
        ("report_to",),
        _is("report_to", None, ["none"]),
        "only --report_to starts trackers. Add that or leave this out",
    ),
    Rule(
        ("hub_strategy",),
        (),
        lambda values: (
            values["hub_strategy"] == "every_save" and values["checkpointing_steps"] >= values["max_train_steps"]
        ),
        "a run of {max_train_steps} steps has no checkpoint before its end. Make --checkpointing_steps smaller than"
        " {max_train_steps}",
    ),
    Rule(
        ("huber_c",),
        ("distance",),
        _is("distance", "l2", "lpips"),
        "only --distance pseudo_huber uses it, and distance is {distance}",
    ),
    Rule(("b",), ("k",), _is("k", 0), "b shapes the term k sigmoid(-b t), which is 0 because k is 0"),
    Rule(
        ("tangent_c",),
        ("tangent_norm",),
        _is("tangent_norm", "clip", "none"),
        "tangent_norm {tangent_norm} does not use the constant. Give --tangent_norm norm or rms",
    ),
    Rule(
        ("rollout_steps", "epsilon_min", "epsilon_max"),
        ("martingale_weight",),
        _is("martingale_weight", 0),
        "martingale_weight 0 disables the rollouts",
    ),
    Rule(("weight_c",), ("power",), _is("power", 0), "power 0 gives all samples the same weight"),
    Rule(GAN, ("gan_weight",), _is("gan_weight", 0), "gan_weight 0 disables the discriminator"),
    Rule(
        ("solver",),
        ("trajectory",),
        _is("trajectory", "data"),
        "trajectory data follows the straight line from the data and solves no ODE",
    ),
    Rule(
        ("balance",),
        ("dsm_weight", "gan_weight"),
        lambda values: values.get("dsm_weight") == 0 == values.get("gan_weight"),
        "dsm_weight 0 and gan_weight 0 leave no second loss to balance",
    ),
)


def without_effect(values: Values, given: Mapping[str, bool]) -> tuple[dict[str, str], list[str]]:
    """Find the given settings that have no effect in a run.

    Args:
        values: all settings of the run.
        given: for each setting that the user gave, True if as a flag, False if in the config file.

    Returns:
        The settings of the config file that a flag switches off, each with that flag; and an error message for each
        other setting without effect.
    """
    idle, faults = {}, []
    for rule in RULES:
        for name in rule.names:
            if name not in given or not values[name] or not rule.when(values):
                continue
            causes = [cause for cause in rule.causes if given.get(cause)]
            if causes and not given[name]:
                idle[name] = causes[0]
            else:
                faults.append(f"{name} {_shown(values[name])} has no effect: {rule.why.format_map(values)}.")
    return idle, faults


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def say_replaced(found: Mapping[str, str], in_file: Values, values: Values) -> list[str]:
    """Return a log line for each flag that replaced settings of a config file.

    Args:
        found: each replaced setting with the flag that replaced it, from `replaced` and `without_effect`.
        in_file: the settings of the config file.
        values: the resulting settings of the run.
    """
    lines = []
    for flag in dict.fromkeys(found.values()):
        names = [name for name in found if found[name] == flag]
        parts = ", ".join(f"{name} {_shown(in_file[name])}" for name in names)
        kept = values.get("resolution") if flag in SOURCES and "resolution" in in_file else None
        size = "" if kept is None else f" Its resolution stays: {_shown(kept)}. --resolution sets another."
        lines.append(f"--{flag} {_shown(values[flag])} replaces the config file's {parts}.{size}")
    return lines

"""Settings for short runs of every method from every start."""

from cm_diffusers.objectives import OBJECTIVES


SETTINGS = {
    "ect": {"pretrain_steps": 1, "stage_steps": 1},
    "ct": {"s1": 12},
    "ict": {"s0": 4, "s1": 16},
    "cd": {"num_scales": 12},
    "lcm": {"num_ddim_timesteps": 12},
    "tcd": {"num_ddim_timesteps": 12},
    "ecd": {"stage_steps": 1},
    "sct": {"tangent_warmup_steps": 3},
    "scd": {"tangent_warmup_steps": 3},
    "cdm": {"rollout_steps": 2},
    "ctm": {"solver_steps": 2},
}
TAUGHT = ("cd", "lcm", "tcd", "ecd", "scd")  # these always have a teacher
PROCESSES = {"sct": "trigflow", "scd": "trigflow", "mean_flow": "flow"}  # of models that can start the method
ADVERSARY = {"gan_weight": 0.5, "discriminator_start_step": 1}
STARTS = [
    (method, start)
    for method in OBJECTIVES
    for start in ("scratch", "saved", "teacher")
    if start != "teacher" or method in (*TAUGHT, "ctm")
]


def settings_of(models, method, start, dropout=0.1, accumulation=2, adversary=False):
    """The settings of a run of four steps, each on eight images.

    `start` is "scratch", "saved" or "teacher"; `models(process)` gives the folder of a diffusion model.
    """
    model, settings = models(PROCESSES.get(method, "edm")), {**SETTINGS.get(method, {})}
    if method in TAUGHT or start == "teacher":
        settings["pretrained_teacher_model"] = model
    if start == "scratch":
        settings |= {"from_scratch": True} if method in TAUGHT else {}
        settings["model_preset"] = "jvp_tiny" if method in PROCESSES else "tiny"
    elif start == "saved":
        settings["pretrained_model_name_or_path"] = model
    if adversary:
        settings |= ADVERSARY
    return {
        **settings,
        "dropout": dropout,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": 8 // accumulation,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "max_train_samples": 50,
    }

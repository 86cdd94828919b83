"""Distil a text-to-image model into one that samples in one to eight steps: Stable Diffusion and SDXL.

The teacher is a pipeline of diffusers, for example a fine-tuned model. With --lora_rank the result is a LoRA, which
`load_lora_weights` loads beside the teacher, with its scheduler. Data are images with captions, or prompts alone.

    python training/train_text_to_image.py --pretrained_teacher_model my_model --prompts prompts.txt \\
        --lora_rank 64 --teacher_guidance_scale 7.5 --max_train_steps 2000 --output_dir runs/my_lora
    python training/train_text_to_image.py --method tcd --pretrained_teacher_model my_model \\
        --train_data_dir pictures --caption_column text --lora_rank 64 --w_min 5 --w_max 10

The same command resumes a stopped run.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
from cm_diffusers.engine.training.run import main


METHODS = ["lcm", "tcd", "cd", "ecd", "scd"]

if __name__ == "__main__":
    main(None, METHODS, __doc__)

"""What to write instead of options of other programs: diffusers' training scripts, TRL's, FastGen, SimpleTuner.

A guess by spelling would lead astray: the nearest option to `hub_token` is `hub_timeout`, and the nearest to
`pretrained_vae_model_name_or_path` would start training from an autoencoder.
"""

_RESUME = "the same command resumes the run in --output_dir by itself"
_STEPS = "the length of a run is --max_train_steps"
_TEXT = "models here are conditioned on classes, and not on text"
_PICTURES = "pictures of samples are made every --validation_steps"
_AVERAGES = "averages of the weights are always kept; see --ema_half_life, --ema_decay and --export_weights"
_TOKEN = "the token comes from `hf auth login`, or from HF_TOKEN of the environment"
_CROP = "images are resized and cropped in the middle to --resolution; prepare_data.py does it otherwise, and once"
_VAE = "an autoencoder is named by --vae_name_or_path"
_ATTENTION = "PyTorch's own fast attention is used where there is one"
_LR = "there are --learning_rate, --lr_scheduler and --lr_warmup_steps, and no more"
_NOISE = "the noise levels that are trained are the method's own options, such as --p_mean and --p_std"
_PROCESS = "a model's process and what it predicts are read from the model"
_EVALUATE = "evaluate.py measures a model, or with --watch a run while it trains"
_SAVE = "a run is saved every --checkpointing_steps, and its model at the end"
_LAUNCH = "processes are the launcher's: cm-diffusers train --num_processes N, torchrun or accelerate launch"
_LOSS = "the distance is --distance, with --huber_c, and the weight --weighting, of the methods that have them"

INSTEAD = {
    "resume_from_checkpoint": _RESUME,
    "resume": _RESUME,
    "num_train_epochs": _STEPS,
    "num_epochs": _STEPS,
    "max_steps": _STEPS,
    "max_iter": _STEPS,
    "use_ema": _AVERAGES,
    "ema_inv_gamma": _AVERAGES,
    "ema_power": _AVERAGES,
    "ema_max_decay": _AVERAGES,
    "offload_ema": _AVERAGES,
    "foreach_ema": _AVERAGES,
    "non_ema_revision": "a saved model holds one kind of weights; --revision names the revision to start from",
    "hub_token": _TOKEN,
    "hf_token": _TOKEN,
    "use_auth_token": _TOKEN,
    "pretrained_vae_model_name_or_path": _VAE,
    "vae_encode_batch_size": "images are encoded 64 at a time, once; --cache_latents keeps the latents",
    "pretrained_teacher": "a teacher is --pretrained_teacher_model",
    "teacher_model": "a teacher is --pretrained_teacher_model",
    "variant": "weights are read as the model's folder names them",
    "teacher_variant": "weights are read as the model's folder names them",
    "non_ema": _AVERAGES,
    "batch_size": "images per step and process are --train_batch_size",
    "per_device_train_batch_size": "images per step and process are --train_batch_size",
    "eval_batch_size": _EVALUATE,
    "per_device_eval_batch_size": _EVALUATE,
    "lr": "the learning rate is --learning_rate",
    "scale_lr": _LR,
    "lr_num_cycles": _LR,
    "lr_power": _LR,
    "lr_scheduler_type": "it is --lr_scheduler",
    "warmup_steps": "it is --lr_warmup_steps",
    "warmup_ratio": "it is --lr_warmup_steps, where a number below 1 is a share of the run",
    "weight_decay": "it is --adam_weight_decay",
    "use_8bit_adam": "optimizers are those that --optimizer names",
    "optim": "it is --optimizer",
    "center_crop": _CROP,
    "random_crop": _CROP,
    "image_interpolation_mode": _CROP,
    "interpolation_type": _CROP,
    "use_fix_crop_and_size": _CROP,
    "preserve_input_precision": "pixels are read with the bits that they have",
    "image_dir": "a folder of images is --train_data_dir",
    "instance_data_dir": "a folder of images is --train_data_dir",
    "data_dir": "a folder of images is --train_data_dir",
    "dataset": "a dataset is --dataset_name, a folder of images --train_data_dir",
    "num_workers": "it is --dataloader_num_workers",
    "caption_column": _TEXT,
    "validation_prompt": _TEXT,
    "validation_prompts": _TEXT,
    "proportion_empty_prompts": f"{_TEXT}; classes are left out by --label_dropout",
    "class_dropout_prob": "it is --label_dropout",
    "num_validation_images": _PICTURES,
    "validation_epochs": _PICTURES,
    "save_images_epochs": _PICTURES,
    "save_model_epochs": _SAVE,
    "save_steps": _SAVE,
    "save_total_limit": "it is --checkpoints_total_limit",
    "eval_steps": _EVALUATE,
    "fp16": "it is --mixed_precision fp16",
    "bf16": "it is --mixed_precision bf16",
    "precision": "it is --mixed_precision",
    "tf32": "it is --allow_tf32",
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "enable_npu_flash_attention": _ATTENTION,
    "set_grads_to_none": "gradients are always set to None",
    "logging_dir": "trackers write below --output_dir",
    "logger": "it is --report_to",
    "tracker_run_name": "trackers name runs after --output_dir",
    "wandb_project": "it is --tracker_project_name",
    "run_name": "trackers name runs after --output_dir",
    "local_rank": _LAUNCH,
    "num_processes": _LAUNCH,
    "nproc_per_node": _LAUNCH,
    "deepspeed": "each process holds the whole model; --gradient_checkpointing saves memory",
    "prediction_type": _PROCESS,
    "ddpm_num_steps": _PROCESS,
    "ddpm_beta_schedule": _PROCESS,
    "ddpm_num_inference_steps": _PROCESS,
    "timestep_scaling_factor": _PROCESS,
    "snr_gamma": _LOSS,
    "loss_type": _LOSS,
    "noise_offset": _NOISE,
    "input_perturbation": _NOISE,
    "num_ddim_timesteps": "the solver's grid is --num_scales of cd, and --solver_steps of ctm",
    "w_min": "a teacher is guided by one --teacher_guidance_scale",
    "w_max": "a teacher is guided by one --teacher_guidance_scale",
    "guidance_scale": "a teacher is guided by --teacher_guidance_scale",
    "unet_time_cond_proj_dim": "a teacher is guided by one --teacher_guidance_scale",
    "cast_teacher_unet": "the teacher computes as --mixed_precision says",
    "lora_rank": "all weights are trained",
    "rank": "all weights are trained",
}

"""What to use instead of the options of other programs: diffusers' training scripts, TRL, FastGen and SimpleTuner.

A guess by spelling would mislead users: the nearest option to `hub_token` is `hub_timeout`, and the nearest to
`pretrained_vae_model_name_or_path` would start training from an autoencoder.

Each text completes the message "Unknown option 'name': ...".
"""

_RESUME = "the same command resumes the run in --output_dir by itself"
_STEPS = "set the length of a run with --max_train_steps, --num_train_epochs or --minutes"
_TEXT = "the text encoders stay as they are, and each method has its own loss"
_PICTURES = "grids of samples are drawn every --validation_steps"
_AVERAGES = "averages of the weights are always kept; see --ema_half_life, --ema_decay and --export_weights"
_TOKEN = "log in with `hf auth login`, or set the environment variable HF_TOKEN"
_CROP = "images are resized to cover --resolution and cropped in the centre, or at random places with --random_crop"
_VAE = "use --vae_name_or_path for an autoencoder"
_ATTENTION = "PyTorch's own fast attention is used automatically"
_LR = "give the scaled value as --learning_rate"
_NOISE = "the method's own options set the noise levels of training, for example --p_mean and --p_std"
_PROCESS = "the noise process and the prediction type are read from the model"
_EVALUATE = "evaluate.py measures a model, or with --watch a run during training"
_SAVE = "checkpoints are saved every --checkpointing_steps, and the model at the end"
_LAUNCH = "use a launcher for several processes: cm-diffusers train --num_processes N, torchrun or accelerate launch"
_CLASSES = "classes are read from the dataset; --class_conditional trains on them"
_LOSS = "methods that have a choice set the loss with --distance, --huber_c and --weighting"
_TEACHER = "use --pretrained_teacher_model for a teacher"
_GUIDED = "use the one scale --teacher_guidance_scale for the guidance of a teacher"
_BATCH = "use --train_batch_size, the number of images per process and forward pass"
_GRID = "the solver's grid is --num_scales for cd, and --solver_steps for ctm"
_FOLDER = "use --train_data_dir for a folder of images"
_RUN_NAME = "trackers name runs after --output_dir"
_PRECISION = "the teacher computes in the precision of --mixed_precision"

INSTEAD = {
    "resume": _RESUME,
    "num_epochs": "use --num_train_epochs",
    "max_steps": _STEPS,
    "max_iter": _STEPS,
    "use_ema": _AVERAGES,
    "ema_inv_gamma": _AVERAGES,
    "ema_power": _AVERAGES,
    "ema_max_decay": _AVERAGES,
    "offload_ema": _AVERAGES,
    "foreach_ema": _AVERAGES,
    "non_ema_revision": "a saved model holds one set of weights; --revision chooses the revision to start from",
    "hub_token": _TOKEN,
    "hf_token": _TOKEN,
    "use_auth_token": _TOKEN,
    "pretrained_vae_model_name_or_path": _VAE,
    "pretrained_teacher": _TEACHER,
    "teacher_model": _TEACHER,
    "non_ema": _AVERAGES,
    "batch_size": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "eval_batch_size": _EVALUATE,
    "per_device_eval_batch_size": _EVALUATE,
    "lr": "use --learning_rate",
    "scale_lr": _LR,
    "lr_scheduler_type": "use --lr_scheduler",
    "warmup_steps": "use --lr_warmup_steps",
    "warmup_ratio": "use --lr_warmup_steps with a value below 1, which is a share of the run",
    "weight_decay": "use --adam_weight_decay",
    "optim": "use --optimizer",
    "optimizer_type": "use --optimizer",
    "cache_dir": "set the environment variable HF_HOME to choose the folder of downloads",
    "overwrite_output_dir": "a run never overwrites another one. Give another --output_dir, or delete the folder",
    "train_shards_path_or_url": "use --dataset_name for webdataset shards",
    "encode_batch_size": "use --vae_encode_batch_size",
    "dataset_image_column_name": "use --image_column",
    "dataset_class_label_column_name": "use --label_column",
    "num_classes": _CLASSES,
    "class_embed_type": _CLASSES,
    "sigma_min": _NOISE,
    "sigma_max": _NOISE,
    "rho": _NOISE,
    "noise_precond_type": "use --time_label for the time input of the network",
    "input_precond_type": "the input of a network is scaled as in EDM, by sigma_data",
    "discretization_s_0": "use --s0 and --s1 of ict for the discretization schedule",
    "discretization_s_1": "use --s0 and --s1 of ict for the discretization schedule",
    "constant_discretization_steps": "set --s0 equal to --s1 of ict for a constant discretization",
    "skip_steps": _GRID,
    "cast_teacher": _PRECISION,
    "ema_min_decay": _AVERAGES,
    "use_ema_warmup": "use --ema_rampup for the warm-up of averages",
    "train_text_encoder": _TEXT,
    "dream_training": _TEXT,
    "dream_detail_preservation": _TEXT,
    "debug_loss": "log.jsonl and losses.png in --output_dir hold the loss by noise level",
    "timestep_bias_strategy": _NOISE,
    "timestep_bias_multiplier": _NOISE,
    "timestep_bias_begin": _NOISE,
    "timestep_bias_end": _NOISE,
    "timestep_bias_portion": _NOISE,
    "lora_dropout": "a LoRA is trained without dropout, so that student and teacher agree",
    "center_crop": _CROP,
    "image_interpolation_mode": _CROP,
    "interpolation_type": _CROP,
    "use_fix_crop_and_size": _CROP,
    "preserve_input_precision": "images of more than 8 bits are read at full depth and scaled to 8 bits by range",
    "image_dir": _FOLDER,
    "instance_data_dir": _FOLDER,
    "data_dir": _FOLDER,
    "dataset": "use --dataset_name for a dataset, --train_data_dir for a folder of images",
    "num_workers": "use --dataloader_num_workers",
    "validation_prompt": "use --validation_prompts",
    "class_dropout_prob": "use --label_dropout",
    "num_validation_images": _PICTURES,
    "validation_epochs": _PICTURES,
    "save_images_epochs": _PICTURES,
    "save_model_epochs": _SAVE,
    "save_steps": _SAVE,
    "save_total_limit": "use --checkpoints_total_limit",
    "eval_steps": _EVALUATE,
    "fp16": "use --mixed_precision fp16",
    "bf16": "use --mixed_precision bf16",
    "precision": "use --mixed_precision",
    "tf32": "use --allow_tf32",
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "enable_npu_flash_attention": _ATTENTION,
    "set_grads_to_none": "gradients are always set to None",
    "logger": "use --report_to",
    "tracker_run_name": _RUN_NAME,
    "wandb_project": "use --tracker_project_name",
    "run_name": _RUN_NAME,
    "local_rank": _LAUNCH,
    "num_processes": _LAUNCH,
    "nproc_per_node": _LAUNCH,
    "deepspeed": "each process holds the whole model; use --gradient_checkpointing to save memory",
    "prediction_type": _PROCESS,
    "ddpm_num_steps": _PROCESS,
    "ddpm_beta_schedule": _PROCESS,
    "ddpm_num_inference_steps": _PROCESS,
    "timestep_scaling_factor": _PROCESS,
    "snr_gamma": _LOSS,
    "loss_type": _LOSS,
    "noise_offset": _NOISE,
    "input_perturbation": _NOISE,
    "guidance_scale": _GUIDED,
    "cast_teacher_unet": _PRECISION,
    "rank": "use --lora_rank",
}

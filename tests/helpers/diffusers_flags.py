"""The flags of eleven diffusers training scripts at commit 58eb52c (August 2026), by script name."""

IN_ALL = """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay cache_dir center_crop checkpointing_steps
    checkpoints_total_limit dataloader_num_workers enable_xformers_memory_efficient_attention
    gradient_accumulation_steps hub_model_id hub_token learning_rate local_rank logging_dir lr_scheduler
    lr_warmup_steps mixed_precision output_dir push_to_hub random_flip resolution resume_from_checkpoint
    train_batch_size
""".split()
OTHERS = {
    "train_lcm_distill_lora_sd_wds": """
        pretrained_teacher_model pretrained_vae_model_name_or_path teacher_revision revision seed report_to
        train_shards_path_or_url interpolation_type num_train_epochs max_train_steps max_train_samples scale_lr
        use_8bit_adam max_grad_norm proportion_empty_prompts w_min w_max num_ddim_timesteps loss_type huber_c
        lora_rank lora_alpha lora_dropout lora_target_modules vae_encode_batch_size timestep_scaling_factor
        allow_tf32 cast_teacher_unet gradient_checkpointing validation_steps tracker_project_name
    """,
    "train_lcm_distill_lora_sdxl": """
        pretrained_teacher_model pretrained_vae_model_name_or_path teacher_revision revision seed report_to
        interpolation_type num_train_epochs max_train_steps max_train_samples scale_lr use_8bit_adam max_grad_norm
        w_min w_max num_ddim_timesteps loss_type huber_c lora_rank lora_alpha lora_dropout lora_target_modules
        vae_encode_batch_size timestep_scaling_factor allow_tf32 gradient_checkpointing validation_steps
        tracker_project_name dataset_name dataset_config_name train_data_dir image_column caption_column
        encode_batch_size
    """,
    "train_lcm_distill_lora_sdxl_wds": """
        pretrained_teacher_model pretrained_vae_model_name_or_path teacher_revision revision seed report_to
        train_shards_path_or_url interpolation_type num_train_epochs max_train_steps max_train_samples scale_lr
        use_8bit_adam max_grad_norm proportion_empty_prompts w_min w_max num_ddim_timesteps loss_type huber_c
        lora_rank lora_alpha lora_dropout lora_target_modules vae_encode_batch_size timestep_scaling_factor
        allow_tf32 cast_teacher_unet gradient_checkpointing validation_steps tracker_project_name
        use_fix_crop_and_size
    """,
    "train_lcm_distill_sd_wds": """
        pretrained_teacher_model pretrained_vae_model_name_or_path teacher_revision revision seed report_to
        train_shards_path_or_url interpolation_type num_train_epochs max_train_steps max_train_samples scale_lr
        use_8bit_adam max_grad_norm proportion_empty_prompts w_min w_max num_ddim_timesteps loss_type huber_c
        vae_encode_batch_size timestep_scaling_factor allow_tf32 cast_teacher_unet gradient_checkpointing
        validation_steps tracker_project_name unet_time_cond_proj_dim ema_decay
    """,
    "train_lcm_distill_sdxl_wds": """
        pretrained_teacher_model pretrained_vae_model_name_or_path teacher_revision revision seed report_to
        train_shards_path_or_url interpolation_type num_train_epochs max_train_steps max_train_samples scale_lr
        use_8bit_adam max_grad_norm proportion_empty_prompts w_min w_max num_ddim_timesteps loss_type huber_c
        vae_encode_batch_size timestep_scaling_factor allow_tf32 cast_teacher_unet gradient_checkpointing
        validation_steps tracker_project_name use_fix_crop_and_size unet_time_cond_proj_dim ema_decay
    """,
    "train_cm_ct_unconditional": """
        revision seed report_to interpolation_type num_train_epochs max_train_steps max_train_samples scale_lr
        use_8bit_adam max_grad_norm huber_c allow_tf32 gradient_checkpointing validation_steps tracker_project_name
        dataset_name dataset_config_name train_data_dir model_config_name_or_path pretrained_model_name_or_path
        variant dataset_image_column_name dataset_class_label_column_name class_conditional num_classes
        class_embed_type overwrite_output_dir optimizer_type prediction_type ddpm_num_steps ddpm_num_inference_steps
        ddpm_beta_schedule sigma_min sigma_max rho discretization_s_0 discretization_s_1
        constant_discretization_steps p_mean p_std noise_precond_type input_precond_type skip_steps cast_teacher
        use_ema ema_min_decay ema_max_decay use_ema_warmup ema_inv_gamma ema_power eval_batch_size
        save_images_epochs save_model_epochs hub_private_repo
    """,
    "train_text_to_image": """
        revision seed report_to num_train_epochs max_train_steps max_train_samples scale_lr use_8bit_adam
        max_grad_norm allow_tf32 gradient_checkpointing tracker_project_name dataset_name dataset_config_name
        train_data_dir image_column caption_column pretrained_model_name_or_path variant prediction_type use_ema
        input_perturbation validation_prompts snr_gamma dream_training dream_detail_preservation offload_ema
        foreach_ema non_ema_revision noise_offset validation_epochs image_interpolation_mode
    """,
    "train_text_to_image_lora": """
        revision seed report_to num_train_epochs max_train_steps max_train_samples scale_lr use_8bit_adam
        max_grad_norm allow_tf32 gradient_checkpointing dataset_name dataset_config_name train_data_dir image_column
        caption_column pretrained_model_name_or_path variant prediction_type snr_gamma noise_offset
        validation_epochs image_interpolation_mode validation_prompt num_validation_images rank
    """,
    "train_text_to_image_lora_sdxl": """
        pretrained_vae_model_name_or_path revision seed report_to num_train_epochs max_train_steps max_train_samples
        scale_lr use_8bit_adam max_grad_norm allow_tf32 gradient_checkpointing dataset_name dataset_config_name
        train_data_dir image_column caption_column pretrained_model_name_or_path variant prediction_type snr_gamma
        noise_offset validation_epochs image_interpolation_mode validation_prompt num_validation_images rank
        train_text_encoder enable_npu_flash_attention debug_loss
    """,
    "train_text_to_image_sdxl": """
        pretrained_vae_model_name_or_path revision seed report_to num_train_epochs max_train_steps max_train_samples
        scale_lr use_8bit_adam max_grad_norm proportion_empty_prompts allow_tf32 gradient_checkpointing dataset_name
        dataset_config_name train_data_dir image_column caption_column pretrained_model_name_or_path variant
        prediction_type use_ema snr_gamma noise_offset validation_epochs image_interpolation_mode validation_prompt
        num_validation_images enable_npu_flash_attention timestep_bias_strategy timestep_bias_multiplier
        timestep_bias_begin timestep_bias_end timestep_bias_portion
    """,
    "train_unconditional": """
        dataset_name dataset_config_name train_data_dir model_config_name_or_path overwrite_output_dir
        prediction_type ddpm_num_steps ddpm_num_inference_steps ddpm_beta_schedule use_ema ema_max_decay
        ema_inv_gamma ema_power eval_batch_size save_images_epochs save_model_epochs hub_private_repo num_epochs
        logger preserve_input_precision
    """,
}
FLAGS_OF_DIFFUSERS = {script: [*IN_ALL, *names.split()] for script, names in OTHERS.items()}

"""Every check: what it refuses, warns of or fills, and that it leaves a config without the fault alone."""

from __future__ import annotations

import json
import logging

import pytest

from axolotl.exceptions import AxolotlError
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.validation import (
    CHECKS,
    attention,
    datasets,
    distributed,
    memory,
    model,
    optimizer,
    peft,
    precision,
    rl,
    run_checks,
    training,
)

V100 = {
    "capabilities": {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_70"}
}
H100 = {
    "capabilities": {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_90"}
}
H100X2 = {"capabilities": {**H100["capabilities"], "n_gpu": 2}}
NO_GPU = {
    "capabilities": {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 0, "n_node": 1, "compute_capability": None}
}
OLD_TORCH = {"env_capabilities": {"torch_version": "2.4.0"}}
NEW_TORCH = {"env_capabilities": {"torch_version": "2.11.0+cu130"}}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
FSDP1 = {"fsdp_version": 1, "fsdp_config": {"offload_params": True}}
FSDP2 = {"fsdp_version": 2, "fsdp_config": {"offload_params": True}}
CHAT = {"path": "a.jsonl", "type": "chat_template"}
BITS8, BITS4 = {"load_in_8bit": True}, {"load_in_4bit": True}
LORA, QLORA = {"adapter": "lora"}, {"adapter": "qlora", **BITS4}
STRIDED = {"rl": "ebft", "ebft": {"mode": "strided"}}
SELECTIVE = {"selective_checkpointing": {"save": ["attention"]}, "gradient_checkpointing": True}

# check, config that is refused, words of the message, config that is accepted
REFUSED = [
    (attention.attn_implementation_is_a_canonical_name_or_a_hub_kernel, {"attn_implementation": "flash"}, "flash_attention_2", {"attn_implementation": "flash_attention_2"}),
    (attention.attn_implementation_is_a_canonical_name_or_a_hub_kernel, {"attn_implementation": "flsh"}, "not a known attention", {"attn_implementation": "org/kernel@v1:fn"}),
    (attention.one_switch_chooses_the_attention, {"attn_implementation": "sdpa", "flash_attention": True}, "cannot be combined", {"attn_implementation": "sdpa", "flash_attention": False}),
    (attention.flash_attn_d512_is_now_large_head_attention, {"flash_attn_d512": True, "large_head_attention": "sdpa"}, "Remove `flash_attn_d512`", {}),
    (attention.gemma4_hybrid_attention_builds_on_flash_attention_2, {"gemma4_hybrid_attn_impl": True, "attn_implementation": "sdpa"}, "requires `attn_implementation: flash_attention_2`", {"gemma4_hybrid_attn_impl": True, "attn_implementation": "flash_attention_2"}),
    (attention.scaling_softmax_needs_flex_attention, {"scaling_softmax": True, "attn_implementation": "sdpa"}, "requires flex attention", {"scaling_softmax": True, "attn_implementation": "flex_attention"}),
    (attention.large_head_attention_is_a_known_policy, {"large_head_attention": "triton"}, "must be one of", {"large_head_attention": "AUTO"}),
    (attention.sage_attention_needs_padding_an_adapter_and_a_gpu_it_was_built_for, {"attn_implementation": "sage", **V100}, "sm_70", {"attn_implementation": "sage", **H100}),
    (attention.fp8_attention_needs_a_hopper_gpu_and_torch_2_11, {"attn_implementation": "fp8", **V100}, "sm_90 or higher", {"attn_implementation": "fp8", **H100, **NEW_TORCH}),
    (attention.fp8_attention_needs_a_hopper_gpu_and_torch_2_11, {"attn_implementation": "fp8", **NO_GPU}, "sm_90 or higher", {"attn_implementation": "fp8"}),
    (attention.fp8_attention_needs_a_hopper_gpu_and_torch_2_11, {"attn_implementation": "fp8", **OLD_TORCH}, "2.11", {"attn_implementation": "sdpa", **OLD_TORCH}),
    (attention.flex_attention_needs_torch_2_6, {"attn_implementation": "flex_attention", **OLD_TORCH}, "Flex attention is not supported on torch version < 2.6.0", {"attn_implementation": "flex_attention", **NEW_TORCH}),
    (datasets.a_config_names_its_data, {}, "either datasets or pretraining_dataset is required", {"pretraining_dataset": [{"path": "a"}]}),
    (datasets.sharegpt_is_chat_template_now, {"datasets": [{"path": "a", "type": "sharegpt:load_role"}]}, "Please use `type: chat_template`", {"datasets": [CHAT]}),
    (datasets.older_message_fields_are_property_mappings, {"datasets": [{**CHAT, "message_field_role": "from", "message_property_mappings": {"role": "who"}}]}, "Conflicting message property fields", {"datasets": [{**CHAT, "message_field_role": "from"}]}),
    (datasets.jinja_needs_a_template_text, {"chat_template": "jinja"}, "chat_template_jinja is required when chat_template is set to jinja", {"chat_template": "jinja", "chat_template_jinja": "{{x}}"}),
    (datasets.jinja_needs_a_template_text, {"datasets": [{**CHAT, "chat_template": "jinja"}]}, "of dataset `a.jsonl`", {"datasets": [{**CHAT, "chat_template": "chatml"}]}),
    (datasets.pushing_a_dataset_needs_a_login, {"push_dataset_to_hub": "me/data"}, "Require cfg.hf_use_auth_token to be True for push_dataset_to_hub", {"push_dataset_to_hub": "me/data", "hf_use_auth_token": True}),
    (datasets.one_thing_makes_the_evaluation_set, {"test_datasets": [CHAT], "val_set_size": 0.1}, "non-zero val_set_size should not be used with test_datasets configuration", {"test_datasets": [CHAT], "val_set_size": 0}),
    (datasets.a_packed_run_evaluates_packed, {"sample_packing": True, "eval_table_size": 5}, "eval_table_size and eval_sample_packing are not supported together with sample_packing", {"sample_packing": True, "eval_table_size": 5, "eval_sample_packing": False}),
    (datasets.deduplication_reads_all_rows, {"dataset_exact_deduplication": True, "skip_prepare_dataset": True}, "cannot be combined", {"dataset_exact_deduplication": True}),
    (datasets.deduplication_reads_all_rows, {"dataset_exact_deduplication": True, "streaming": True}, "not implemented for streaming", {"streaming": True}),
    (datasets.a_stream_has_no_known_end, {"streaming": True}, "max_steps must be set when using iterable pretraining_dataset", {"streaming": True, "max_steps": 5}),
    (datasets.a_stream_has_no_known_end, {"pretraining_dataset": [CHAT], "max_steps": 5, "val_set_size": 0.1}, "val_set_size", {"pretraining_dataset": [CHAT], "max_steps": 5}),
    (datasets.a_stream_has_no_known_end, {"streaming": True, "max_steps": 5, "rl": "dpo"}, "Only supervised fine-tuning", {"streaming": True, "max_steps": 5, "sample_packing": True, "datasets": [CHAT, CHAT]}),
    (datasets.a_weight_belongs_to_rows_that_are_trained, {"datasets": [{"path": "d", "type": "alpaca", "weight": 1e9}]}, "no share", {"datasets": [{"path": "d", "type": "alpaca", "weight": 1e9}], "streaming": True, "max_steps": 1}),
    (datasets.a_weight_belongs_to_rows_that_are_trained, {"test_datasets": [{**CHAT, "weight": 2}]}, "evaluated once", {"datasets": [{**CHAT, "weight": 2}]}),
    (datasets.a_weight_belongs_to_rows_that_are_trained, {"datasets": [{**CHAT, "weight": 2}], "skip_prepare_dataset": True}, "rows that are prepared", {"datasets": [{**CHAT, "weight": 2}], "skip_prepare_dataset": True, "streaming": True}),
    (training.two_of_three_batch_sizes_are_known, {"batch_size": 8, "gradient_accumulation_steps": 4}, "please set only one of gradient_accumulation_steps or batch_size", {"gradient_accumulation_steps": 4}),
    (training.two_of_three_batch_sizes_are_known, {"batch_size": 8}, "At least two of", {"batch_size": 8, "micro_batch_size": 2}),
    (training.two_of_three_batch_sizes_are_known, {"batch_size": 8, "micro_batch_size": 3}, "no multiple", {"batch_size": 9, "micro_batch_size": 3}),
    (training.a_run_has_steps, {"num_epochs": 0}, "trains nothing", {"num_epochs": 0, "max_steps": 1}),
    (training.repositories_have_names_that_the_hub_takes, {"hub_model_id": "me/my model"}, "no name of a repository", {"hub_model_id": "me/my-model_1.5"}),
    (training.repositories_have_names_that_the_hub_takes, {"push_dataset_to_hub": "me/a/b"}, "no name of a repository", {"push_dataset_to_hub": "rows"}),
    (training.a_classifier_learns_from_rewards, {"type_of_model": "LlamaForSequenceClassification"}, "classifies", {"type_of_model": "LlamaForCausalLM"}),
    (training.warmup_is_given_once, {"warmup_steps": 10, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio are mutually exclusive", {"warmup_steps": 0, "warmup_ratio": 0.1}),
    (training.saves_are_given_once, {"save_steps": 10, "save_strategy": "epoch"}, "save_strategy and save_steps mismatch", {"save_steps": 10, "save_strategy": "steps"}),
    (training.saves_are_given_once, {"save_steps": 10, "saves_per_epoch": 2}, "save_steps and saves_per_epoch are mutually exclusive", {"saves_per_epoch": 2}),
    (training.saves_are_given_once, {"saves_per_epoch": 2, "save_strategy": "no"}, "save_strategy must be empty or set to `steps`", {"saves_per_epoch": 2, "save_strategy": "steps"}),
    (training.the_best_checkpoint_needs_a_metric, {"save_strategy": "best"}, "metric_for_best_model", {"save_strategy": "best", "metric_for_best_model": "eval_loss"}),
    (training.evaluations_are_given_once, {"eval_steps": 10, "eval_strategy": "epoch"}, "eval_strategy and eval_steps mismatch", {"eval_steps": 10}),
    (training.evaluations_are_given_once, {"eval_steps": 10, "evals_per_epoch": 1}, "eval_steps and evals_per_epoch are mutually exclusive", {"evals_per_epoch": 1}),
    (training.evaluations_are_given_once, {"evals_per_epoch": 1, "eval_strategy": "epoch"}, "eval_strategy must be empty or set to `steps` when used with evals_per_epoch", {"evals_per_epoch": 1, "eval_strategy": "steps"}),
    (training.an_evaluation_needs_data, {"val_set_size": 0, "eval_steps": 10}, "eval_steps and eval_strategy are not supported with val_set_size == 0", {"val_set_size": 0.1, "eval_steps": 10}),
    (training.an_evaluation_needs_data, {"val_set_size": 0, "eval_strategy": "epoch"}, "val_set_size == 0", {"val_set_size": 0, "eval_strategy": "no"}),
    (training.a_benchmark_runs_at_evaluations, {"do_bench_eval": True}, "do_bench_eval requires evals_per_epoch or eval_steps to be set", {"do_bench_eval": True, "eval_steps": 5}),
    (training.early_stopping_compares_saved_models, {"early_stopping_patience": 3}, "early_stopping_patience requires save_steps and eval_steps to be set", {"early_stopping_patience": 3, "save_steps": 0.3, "eval_steps": 0.1}),
    (training.early_stopping_compares_saved_models, {"early_stopping_patience": 3, "save_steps": 50, "eval_steps": 20}, "eval_steps should evenly divide save_steps", {"early_stopping_patience": 3, "save_steps": 50, "eval_steps": 25}),
    (training.weights_by_entropy_are_for_the_next_token, {"use_eaft": True, "rl": "dpo"}, "brings its own", {"use_eaft": True}),
    (training.noise_on_embeddings_is_positive, {"neftune_noise_alpha": 0.0}, "neftune_noise_alpha must be > 0.0", {"neftune_noise_alpha": 5}),
    (training.generated_metrics_need_whole_rows, {"do_causal_lm_eval": True, "eval_sample_packing": True}, "eval_sample_packing must be set to False", {"do_causal_lm_eval": True, "eval_sample_packing": False}),
    (training.generated_metrics_need_whole_rows, {"eval_causal_lm_metrics": "chrf"}, "must be a list", {"eval_causal_lm_metrics": ["chrf"]}),
    (training.generated_metrics_need_whole_rows, {"eval_causal_lm_metrics": ["bleu"]}, "eval_causal_lm_metrics must be one of", {"eval_causal_lm_metrics": ["perplexity"]}),
    (training.tokens_per_second_needs_a_known_number_of_tokens, {"pretraining_dataset": [CHAT], "include_tokens_per_second": True}, "not supported for pretraining", {"include_tokens_per_second": True}),
    (training.mistral_tokenizers_bring_their_own_tokens, {"tokenizer_use_mistral_common": True, "tokens": ["<x>"]}, "not supported with mistral-common", {"tokens": ["<x>"]}),
    (model.processor_arguments_leave_trust_and_revision_to_their_keys, {"processor_kwargs": {"revision": "main"}}, "must not contain `revision`", {"processor_kwargs": {"size": 3}}),
    (model.images_are_resized_by_a_known_algorithm, {"image_resize_algorithm": "nearest"}, "bilinear", {"image_resize_algorithm": "Bicubic"}),
    (model.compile_options_are_known_and_used, {"torch_compile": True, "torch_compile_options": {"fast": True}}, "unsupported keys: fast", {"torch_compile": True, "torch_compile_options": {"shape_padding": True}}),
    (model.compile_options_are_known_and_used, {"torch_compile_options": {"shape_padding": True}}, "requires `torch_compile: true`", {}),
    (model.memory_limits_are_given_once, {"max_memory": {0: "1GiB"}, "gpu_memory_limit": 2}, "max_memory and gpu_memory_limit are mutually exclusive", {"gpu_memory_limit": 2}),
    (model.a_model_is_quantized_once, {"model_quantization_config": "Mxfp4Config", **BITS4}, "model_quantization_config cannot be used together", {"model_quantization_config": "Mxfp4Config"}),
    (model.one_fused_loss_replaces_the_loss, {"cut_cross_entropy": True, "chunked_cross_entropy": True}, "Only one of", {"chunked_cross_entropy": True}),
    (model.mpt_has_no_checkpointing, {"base_model": "mosaicml/mpt-7b", "gradient_checkpointing": True}, "gradient_checkpointing is not supported for MPT models", {"base_model": "me/prompt-llama", "gradient_checkpointing": True}),
    (model.falcon_is_not_sharded_by_fsdp_lists, {"base_model": "tiiuae/falcon-7b", "fsdp": ["auto_wrap"]}, "FSDP is not supported for falcon models", {"base_model": "tiiuae/falcon-7b"}),
    (model.better_transformer_runs_in_plain_half_precision, {"flash_optimum": True, "bf16": True}, "AMP is not supported with BetterTransformer", {"flash_optimum": True, "bfloat16": True}),
    (model.gptq_models_have_no_revision, {"gptq": True, "revision_of_model": "main"}, "revision_of_model is not supported for GPTQ models", {"gptq": True}),
    (precision.fp8_needs_a_gpu_that_has_it, {"fp8": True, **V100}, "fp8 is not supported on this GPU", {"fp8": False, **V100}),
    (precision.fp8_needs_a_gpu_that_has_it, {"fp8": True, **QLORA}, "with `load_in_4bit: true`", {"fp8": True, **LORA}),
    (precision.fp8_needs_a_gpu_that_has_it, {"fp8": True, "adapter": "ia3"}, "with `adapter: ia3`", {"fp8": True, **H100}),
    (precision.fp8_needs_a_gpu_that_has_it, {"fp8": True, **LORA, "fp16": True}, "into bf16", {"fp8": True, **LORA, "bf16": True}),
    (precision.fp8_options_need_fp8, {"fp8_config": {"recipe": "rowwise"}}, "requires `fp8: true`", {"fp8": True, "fp8_config": {"recipe": "rowwise"}}),
    (precision.fp8_below_an_adapter_has_one_recipe, {"fp8": True, **LORA, "fp8_config": {"recipe": "tensorwise"}}, "they are frozen", {"fp8": True, **LORA, "fp8_config": {"recipe": "rowwise"}}),
    (precision.fp8_below_an_adapter_has_one_recipe, {"fp8": True, **LORA, "fp8_config": {"recipe": "rowwise", "filter_fqns": ["q_proj"]}}, "they are frozen", {"fp8": True, "fp8_config": {"filter_fqns": ["q_proj"]}}),
    (precision.fp8_options_need_fp8, {"fp8": True, "fp8_enable_fsdp_float8_all_gather": True, "fp8_config": {"recipe": "rowwise"}, **FSDP2}, "recipe: tensorwise", {"fp8": True, "fp8_enable_fsdp_float8_all_gather": True, **FSDP2}),
    (precision.fp8_options_need_fp8, {"fp8": True, "fp8_enable_fsdp_float8_all_gather": True, **FSDP1}, "requires FSDP2", {"fp8": True}),
    (memory.frozen_embeddings_break_reentrant_checkpointing, {"unfrozen_parameters": ["lm_head"], **REENTRANT}, "unfrozen_parameters", {"unfrozen_parameters": ["lm_head"], "gradient_checkpointing": True}),
    (memory.only_checkpoints_are_offloaded, {"activation_offloading": True}, "activation_offloading requires gradient_checkpointing", {"activation_offloading": True, "gradient_checkpointing": True}),
    (memory.offloaded_hidden_states_use_plain_checkpointing, {"activation_offloading": "hidden_states", "unfrozen_parameters": ["x"], **REENTRANT}, "not supported with `unfrozen_parameters`", {"activation_offloading": "hidden_states", **REENTRANT}),
    (memory.selective_checkpointing_refines_checkpointing, {"selective_checkpointing": True}, "requires gradient_checkpointing", {"selective_checkpointing": True, "gradient_checkpointing": True}),
    (memory.selective_checkpointing_refines_checkpointing, {**SELECTIVE, **REENTRANT}, "use_reentrant: false", SELECTIVE),
    (memory.selective_checkpointing_refines_checkpointing, {**SELECTIVE, "activation_offloading": "legacy"}, "cannot be combined", {**SELECTIVE, "activation_offloading": "hidden_states"}),
    (memory.selective_checkpointing_refines_checkpointing, {"selective_checkpointing": {"save": ["mm"]}, "gradient_checkpointing": True, **LORA}, "cannot save matmul", {**SELECTIVE, **LORA}),
    (memory.selective_checkpointing_refines_checkpointing, {"selective_checkpointing": {"save": ["atention"]}, "gradient_checkpointing": True}, "names no operation", {"selective_checkpointing": {"save": ["attention", "mm", "aten::gelu"]}, "gradient_checkpointing": True}),
    (memory.checkpointing_takes_known_arguments, {"gradient_checkpointing_kwargs": {"use_reentrant": "no"}}, "true or false", {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    (memory.checkpointing_takes_known_arguments, {"gradient_checkpointing_kwargs": {"reentrant": False}}, "has no argument `reentrant`", {"gradient_checkpointing_kwargs": {"use_reentrant": False, "determinism_check": "none"}}),
    (memory.checkpointing_takes_known_arguments, {"gradient_checkpointing_kwargs": {"use_reentrant": True, "early_stop": True}}, "does not take `early_stop`", REENTRANT),
    (memory.layer_offloading_moves_frozen_weights, {"layer_offloading": True}, "without `adapter` all weights train", {"layer_offloading": True, **LORA}),
    (memory.layer_offloading_moves_frozen_weights, {"layer_offloading": True, **LORA, **FSDP2}, "which move weights themselves", {"layer_offloading": True, "unfrozen_parameters": ["lm_head"]}),
    (memory.layer_offloading_moves_frozen_weights, {"layer_offloading": True, **LORA, "torch_compile": True}, "compiled code expects weights", {**LORA, "torch_compile": True}),
    (memory.tiles_are_of_the_models_own_mlp, {"tiled_mlp": True, "torch_compile": True}, "one graph again", {"tiled_mlp": True}),
    (precision.weights_have_one_format, {"bfloat16": True, "float32": True}, "each says in which format", {"float32": True}),
    (precision.weights_have_one_format, {"bfloat16": True, "fp16": True}, "Write `bf16: true` alone", {"bfloat16": True, "bf16": True}),
    (precision.weights_have_one_format, {"float16": True, "bf16": "full"}, "Write `fp16: true` alone", {"float16": True, "bf16": "auto"}),
    (precision.fp16_scales_float32_weights, {"fp16": True, **LORA, "peft_autocast_adapter_dtype": False}, "cannot be unscaled", {"fp16": True, **LORA}),
    (memory.rounding_is_simulated_on_full_weights, {"qat": {"weight_dtype": "int8"}, **LORA}, "QAT and PEFT cannot be used together", {"qat": {"weight_dtype": "int8"}}),
    (memory.rounding_is_simulated_on_full_weights, {"qat": {"weight_dtype": "int8"}, **BITS8}, "QAT and load_in_8bit cannot be used together", {}),
    (memory.rounding_is_simulated_on_full_weights, {"qat": {"weight_dtype": "ternary", "activation_dtype": "float8_e4m3fn"}}, "requires `activation_dtype: int8`", {"qat": {"weight_dtype": "ternary", "activation_dtype": "int8"}}),
    (memory.rounding_is_simulated_on_full_weights, {"qat": {"weight_dtype": "int8"}, **OLD_TORCH}, "QAT is not supported on torch version < 2.6.0", {"qat": {"weight_dtype": "int8"}, **NEW_TORCH}),
    (optimizer.muon_and_flash_optimizers_need_whole_matrices, {"optimizer": "muon", "deepspeed": "zero3.json"}, "Muon optimizer is currently incompatible with DeepSpeed", {"optimizer": "muon"}),
    (optimizer.muon_and_flash_optimizers_need_whole_matrices, {"optimizer": "flash_adamw", **FSDP1}, "only compatible with FSDP2", {"optimizer": "flash_adamw", **FSDP2}),
    (optimizer.polora_trains_plain_lora, {"optimizer": "polora"}, "requires `adapter: lora`", {"optimizer": "polora", **LORA}),
    (optimizer.polora_trains_plain_lora, {"optimizer": "polora", **LORA, "tensor_parallel_size": 2}, "tensor parallelism", {"optimizer": "polora", **LORA, "tensor_parallel_size": 1}),
    (optimizer.polora_trains_plain_lora, {"optimizer": "polora", **LORA, **FSDP1}, "only compatible with FSDP2", {"optimizer": "polora", **LORA, **FSDP2}),
    (optimizer.polora_trains_plain_lora, {"optimizer": "polora", **LORA, "peft_use_dora": True}, "Remove `peft_use_dora`", {**LORA, "peft_use_dora": True}),
    (optimizer.q_galore_projects_full_weights, {"optimizer": "q_galore_adamw8bit", **LORA}, "cannot be combined with `adapter: lora`", {"optimizer": "q_galore_adamw8bit"}),
    (optimizer.q_galore_projects_full_weights, {"optimizer": "q_galore_adamw8bit", "deepspeed": "z.json"}, "DeepSpeed", {"deepspeed": "z.json"}),
    (optimizer.q_galore_projects_full_weights, {"optimizer": "q_galore_adamw8bit", **FSDP2}, "use_orig_params: true", {"optimizer": "q_galore_adamw8bit", "fsdp_version": 2, "fsdp_config": {"use_orig_params": True}}),
    (optimizer.adopt_needs_torch_2_5_1, {"optimizer": "adopt_adamw", **OLD_TORCH}, "ADOPT optimizer is incompatible with torch version", {"optimizer": "adopt_adamw", **NEW_TORCH}),
    (optimizer.updates_in_backward_need_whole_batches, {"optimizer": "lomo", "gradient_accumulation_steps": 2}, "cannot accumulate gradients", {"optimizer": "lomo", "gradient_accumulation_steps": 1}),
    (optimizer.updates_in_backward_need_whole_batches, {"optimizer": "galore_adamw_layerwise", "fp16": True}, "Write `bf16: true`", {"optimizer": "galore_adamw", "fp16": True, "gradient_accumulation_steps": 2}),
    (optimizer.updates_in_backward_need_whole_batches, {"optimizer": "apollo_adamw_layerwise", **FSDP2}, "whole weights on one GPU", {"optimizer": "apollo_adamw", **FSDP2}),
    (optimizer.updates_in_backward_need_whole_batches, {"optimizer": "adalomo", "embedding_lr": 1e-5}, "has one learning rate", {"optimizer": "adalomo"}),
    (optimizer.updates_in_backward_need_whole_batches, {"optimizer": "lomo", "non_finite_policy": "skip"}, "Write `non_finite_policy: raise`", {"optimizer": "lomo", "non_finite_policy": "raise"}),
    (optimizer.projections_need_to_know_their_modules, {"optimizer": "galore_adamw"}, "needs `optim_target_modules`", {"optimizer": "galore_adamw", "optim_target_modules": "all_linear"}),
    (optimizer.schedule_keys_have_a_schedule, {"lr_scheduler": "greedy", "jagged_restart_steps": 5}, "follows the evaluations", {"lr_scheduler": "linear", "jagged_restart_steps": 5}),
    (optimizer.learning_rates_are_grouped_once, {"lr_groups": [{"name": "a", "modules": ["x"], "lr": 1}], "loraplus_lr_ratio": 2}, "lr_groups and loraplus_lr_ratio cannot be used together", {"loraplus_lr_ratio": 2}),
    (optimizer.batch_flattening_needs_an_attention_that_knows_borders, {"batch_flattening": True, "micro_batch_size": 2}, "batch_flattening requires flash attention", {"batch_flattening": True, "micro_batch_size": 2, "attn_implementation": "flash_attention_2"}),
    (optimizer.batch_flattening_needs_an_attention_that_knows_borders, {"batch_flattening": True, "sample_packing": True, "attn_implementation": "flash_attention_2"}, "batch_flattening not compatible with sample_packing", {"sample_packing": True}),
    (rl.the_fused_dpo_loss_is_one_loss, {"rl": "ipo", "dpo_use_liger_kernel": True}, "does not support the loss ipo", {"rl": "dpo", "dpo_use_liger_kernel": True}),
    (rl.preference_rows_are_not_packed, {"rl": "dpo", "sample_packing": True}, "does not work with RLHF training", {"rl": "dpo"}),
    (rl.preference_rows_are_not_packed, {"rl": "kto", "sample_packing": True, "remove_unused_columns": False}, "sample_packing is not supported with kto", {"rl": "kto", "remove_unused_columns": False}),
    (rl.preference_rows_are_not_packed, {"rl": "kto"}, "Set `remove_unused_columns: False` when using kto", {"rl": "orpo"}),
    (rl.beta_is_given_once, {"rl_beta": 0.1, "trl": {"beta": 0.2}}, "beta and trl.beta must match or one must be removed", {"rl_beta": 0.1, "trl": {"beta": 0.1}}),
    (rl.fused_grpo_loss_needs_whole_sequences, {"rl": "grpo", "trl": {"use_liger_loss": True}, "context_parallel_size": 2}, "GRPO + SP + Liger not currently supported", {"rl": "grpo", "trl": {"use_liger_loss": True}, "context_parallel_size": 1}),
    (rl.preference_qlora_on_several_gpus_needs_plain_checkpointing, {"rl": "dpo", **QLORA, **REENTRANT, **H100X2}, "not supported for distributed RL training with QLoRA", {"rl": "dpo", **QLORA, **REENTRANT, **H100}),
    (rl.gdpo_normalizes_each_reward, {"rl": "gdpo", "trl": {"multi_objective_aggregation": "sum_then_normalize"}}, "sum_then_normalize", {"rl": "gdpo", "trl": {"multi_objective_aggregation": "normalize_then_sum"}}),
    (rl.dpo_losses_belong_to_dpo, {"rl": "dpo", "dpo_loss_weights": [1.0]}, "`dpo_loss_weights` requires `dpo_loss_type` to be set", {"rl": "dpo", "dpo_loss_type": ["ipo"], "dpo_loss_weights": [1.0]}),
    (rl.dpo_losses_belong_to_dpo, {"rl": "kto", "dpo_loss_type": ["ipo"]}, "requires `rl: dpo`", {"rl": "dpo", "dpo_loss_type": ["ipo"]}),
    (rl.dpo_losses_belong_to_dpo, {"rl": "dpo", "dpo_loss_type": ["ipo"], "dpo_loss_weights": [1.0, 2.0]}, "same length", {}),
    (rl.generations_of_a_prompt_fill_a_batch, {"rl": "grpo", "trl": {"num_generations": 1}}, "at least 2", {"rl": "grpo"}),
    (rl.generations_of_a_prompt_fill_a_batch, {"rl": "grpo", "trl": {"num_generations": 6}, "micro_batch_size": 4}, "`gradient_accumulation_steps` that fits is 3", {"rl": "grpo", "trl": {"num_generations": 6}, "micro_batch_size": 4, "gradient_accumulation_steps": 3}),
    (rl.simpo_warms_up_in_steps, {"rl": "simpo", "warmup_ratio": 0.1}, "warmup_ratio is not supported with the simpo trainer", {"rl": "simpo", "warmup_steps": 10}),
    (rl.ebft_has_a_section, {"rl": "ebft"}, "requires an `ebft` section", {"rl": "ebft", "ebft": {}}),
    (rl.ebft_has_a_section, {**STRIDED, "torch_compile": True, "gradient_checkpointing": True}, "is not supported", {**STRIDED, "gradient_checkpointing": True}),
    (rl.ebft_has_a_section, {**STRIDED, "attn_implementation": "flex_attention", "activation_offloading": True}, "not compatible", {**STRIDED, "attn_implementation": "flex_attention"}),
    (distributed.fsdp_version_is_known, {"fsdp_version": 1, "fsdp_config": {"fsdp_version": 2}}, "differ", {"fsdp_version": 2, "fsdp_config": {"fsdp_version": 2}}),
    (distributed.one_framework_shards_the_model, {"deepspeed": "z.json", **FSDP2}, "deepspeed and fsdp cannot be used together", {"deepspeed": "z.json"}),
    (distributed.pinned_offload_is_an_option_of_fsdp2, {"fsdp_version": 1, "fsdp_config": {"cpu_offload_pin_memory": False}}, "FSDP1 does not support disabling cpu_offload_pin_memory", {"fsdp_version": 2, "fsdp_config": {"cpu_offload_pin_memory": False, "offload_params": True}}),
    (distributed.pinned_offload_is_an_option_of_fsdp2, {"fsdp_version": 2, "fsdp_config": {"cpu_offload_pin_memory": False}}, "disabling cpu_offload_pin_memory requires enabling offload_params", {}),
    (distributed.fsdp2_preferences_train_unquantized_models, {"rl": "dpo", **QLORA, **FSDP2}, "FSDP2 does not support load_in_8bit or load_in_4bit with", {"rl": "dpo", **FSDP2}),
    (distributed.fsdp_shards_only_optimizers_that_can_be_cut, {"optimizer": "adamw_8bit", **FSDP1}, "FSDP Offload not compatible with adamw_8bit", {"optimizer": "adamw_torch", **FSDP1}),
    (distributed.fsdp_shards_only_optimizers_that_can_be_cut, {"optimizer": "adamw_bnb_8bit", **FSDP2}, "FSDP2 not compatible with adamw_bnb_8bit", {"optimizer": "adamw_torch_8bit", **FSDP2}),
    (distributed.quantized_weights_are_loaded_by_every_rank, {"fsdp_version": 2, "fsdp_config": {"cpu_ram_efficient_loading": True}, **QLORA}, "cpu_ram_efficient_loading", {"fsdp_version": 2, "fsdp_config": {"cpu_ram_efficient_loading": True}}),
    (distributed.quantized_weights_are_loaded_by_every_rank, {"fsdp_config": {"cpu_ram_efficient_loading": True}, "model_quantization_config": "Mxfp4Config"}, "Mxfp4Config", {"model_quantization_config": "Mxfp4Config"}),
    (distributed.fsdp2_needs_torch_2_7, {**FSDP2, **OLD_TORCH}, "FSDP2 is not supported on torch version < 2.7.0", {**FSDP2, **NEW_TORCH}),
    (distributed.wrapping_by_size_needs_a_size, {"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}}, "min_num_params", {"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 5}}),
    (distributed.fp32_norms_are_an_option_of_fsdp2, {"fp32_norms": True, **FSDP1}, "requires FSDP2", {"fp32_norms": True, **FSDP2}),
    (distributed.context_parallel_runs_on_ring_flash_attention, {"context_parallel_size": 2, "attn_implementation": "sdpa"}, "flash_attention: true must be set with context_parallel_size > 1", {"context_parallel_size": 1}),
    (distributed.context_parallel_runs_on_ring_flash_attention, {"context_parallel_size": 2, "sample_packing": True, "micro_batch_size": 2}, "micro_batch_size must be set to 1 when sample_packing is enabled", {}),
    (distributed.split_layers_need_an_optimizer_that_can_be_cut, {"tensor_parallel_size": 2, "optimizer": "adamw_bnb_8bit"}, "not compatible", {"tensor_parallel_size": 1, "optimizer": "adamw_bnb_8bit"}),
    (distributed.deepcompile_is_an_option_of_deepspeed, {"deepcompile": True}, "requires deepspeed", {}),
    (peft.adapter_is_known, {"adapter": "lorra"}, "is not known", {"adapter": "llama-adapter"}),
    (peft.quantized_weights_train_through_an_adapter, BITS8, "load_in_8bit and load_in_4bit are not supported without setting an adapter", {**BITS8, **LORA}),
    (peft.quantized_weights_train_through_an_adapter, BITS4, "turn off `load_in_4bit`", {**BITS4, "inference": True}),
    (peft.a_model_is_loaded_in_8_or_in_4_bits, {**BITS8, **BITS4}, "cannot be used together", BITS8),
    (peft.qlora_trains_on_4_bits, {**QLORA, **BITS8}, "Can't load qlora in 8bit", QLORA),
    (peft.qlora_trains_on_4_bits, {**QLORA, "gptq": True}, "Can't load qlora if gptq", {**LORA, "gptq": True}),
    (peft.qlora_trains_on_4_bits, {"adapter": "qlora"}, "Require cfg.load_in_4bit to be True for qlora", {"adapter": "qlora", "merge_lora": True}),
    (peft.qlora_trains_on_4_bits, {**QLORA, "merge_lora": True}, "Can't merge qlora if loaded in 4bit", {}),
    (peft.lora_has_no_dropout_unless_set, {**LORA, "lora_dropout": 0.1, "lora_target_parameters": ["x"]}, "lora_dropout does not work", {**LORA, "lora_dropout": 0.0, "lora_target_parameters": ["x"]}),
    (peft.lora_patterns_are_regular_expressions, {"lora_rank_pattern": {"(v": 4}}, "`lora_rank_pattern`", {"lora_rank_pattern": {"v.*": 4}}),
    (peft.lora_patterns_are_regular_expressions, {"lora_exclude_modules": "(v"}, "`lora_exclude_modules`", {"lora_exclude_modules": ["(v"]}),
    (peft.lora_patterns_are_regular_expressions, {"lora_target_modules": ["q_proj", "(v"]}, "`(v`", {"lora_target_modules": ["q_proj", "layers.[0-9]+.v_proj"]}),
    (peft.layers_to_transform_are_not_unfrozen_too, {**LORA, "peft_layers_to_transform": [0], "unfrozen_parameters": ["x"]}, "can have unexpected behavior", {**LORA, "peft_layers_to_transform": [0]}),
    (peft.a_layer_pattern_belongs_to_a_choice_of_layers, {**LORA, "peft_layers_pattern": ["layers"]}, "peft_layers_pattern requires peft_layers_to_transform", {**LORA, "peft_layers_pattern": ["layers"], "peft_layers_to_transform": [0]}),
    (peft.adapters_work_on_the_layers_as_they_are, {**LORA, "flash_attn_fuse_mlp": True}, "Fused modules are not supported with LoRA/QLoRA", {"flash_attn_fuse_mlp": True}),
    (peft.adapters_work_on_the_layers_as_they_are, {**LORA, "use_onebitllms": True}, "use_onebitllms", {"use_onebitllms": True}),
    (peft.lora_kernels_run_on_plain_lora, {**LORA, **BITS8, "lora_mlp_kernel": True}, "are not compatible with 8-bit LoRA", {**LORA, "lora_mlp_kernel": True}),
    (peft.lora_kernels_run_on_plain_lora, {**LORA, "trust_remote_code": True, "lora_o_kernel": True}, "not compatible with trust_remote_code", {**LORA, "trust_remote_code": True}),
    (peft.lora_kernels_run_on_plain_lora, {**LORA, "lora_o_kernel": True, **FSDP1, **H100X2}, "not compatible with FSDP1", {**LORA, "lora_o_kernel": True, **FSDP2, **H100X2}),
    (peft.expert_weights_are_quantized_for_adapters, {"quantize_moe_experts": True, **QLORA, "lora_target_linear": True}, "lora_target_linear", {"quantize_moe_experts": True, **QLORA, **H100}),
    (peft.expert_weights_are_quantized_for_adapters, {"quantize_moe_experts": True, **QLORA, **NO_GPU}, "requires CUDA", {}),
    (peft.expert_weights_are_quantized_for_adapters, {"quantize_moe_experts": True, **LORA}, "load_in_4bit", {"quantize_moe_experts": False, **LORA}),
    (peft.offloaded_embeddings_need_a_quantized_model_on_one_gpu, {"ple_cpu_offload": True, **QLORA, **FSDP2}, "not compatible with FSDP", {"ple_cpu_offload": True, **QLORA}),
    (peft.offloaded_embeddings_need_a_quantized_model_on_one_gpu, {"ple_cpu_offload": True, **QLORA, "deepspeed": "z.json"}, "not compatible with DeepSpeed", {"ple_cpu_offload": True, **LORA, **BITS8}),
    (peft.offloaded_embeddings_need_a_quantized_model_on_one_gpu, {"ple_cpu_offload": True, **LORA}, "requires `adapter: qlora`", {}),
    (peft.relora_restarts_an_adapter, {"relora": True, **LORA, "jagged_restart_steps": 5, "reinit_weights": True}, "`reinit_weights: true` starts from weights that no file has", {"relora": True, **LORA, "jagged_restart_steps": 5}),
    (peft.relora_restarts_an_adapter, {"relora": True, **LORA, "jagged_restart_steps": 5, "optimizer": "schedule_free_adamw"}, "averages weights over the whole run", {"relora": True, **LORA, "jagged_restart_steps": 5}),
    (peft.relora_restarts_an_adapter, {"relora": True, **LORA}, "jagged_restart_steps must be set to use ReLoRA", {"relora": True, **LORA, "jagged_restart_steps": 5}),
    (peft.relora_restarts_an_adapter, {"relora": True, "jagged_restart_steps": 5}, "cfg.adapter must be lora or qlora to use ReLoRA", {}),
    (peft.relora_restarts_an_adapter, {"relora": True, **LORA, "jagged_restart_steps": 5, **FSDP2}, "fsdp not supported with ReLoRA", {**LORA, **FSDP2}),
    (peft.relora_restarts_an_adapter, {"relora": True, **LORA, "jagged_restart_steps": 5, "deepspeed": "z"}, "deepspeed not supported with ReLoRA", {}),
    (peft.relora_restarts_an_adapter, {"relora": True, **LORA, "jagged_restart_steps": 5, "lr_scheduler": "one_cycle"}, "ReLoRA is not compatible with the one_cycle scheduler", {}),
    (peft.relora_restarts_an_adapter, {"relora": True, **LORA, "jagged_restart_steps": 5, "load_best_model_at_end": True}, "ReLoRA has changed since", {}),
    (peft.lora_starts_in_a_known_way, {**LORA, "peft_init_lora_weights": "pisa"}, "Did you mean `pissa`", {**LORA, "peft_init_lora_weights": "pissa_niter_4"}),
    (peft.lora_starts_in_a_known_way, {**LORA, "peft_init_lora_weights": "orthogonal", "lora_r": 3}, "even ranks", {**LORA, "peft_init_lora_weights": "orthogonal", "lora_r": 4}),
    (peft.a_start_from_data_finds_rows, {**LORA, "peft_init_lora_weights": "corda", "streaming": True}, "starts from prepared rows", {**LORA, "peft_init_lora_weights": "pissa", "streaming": True}),
    (peft.a_start_from_data_finds_rows, {**LORA, "peft_init_lora_weights": "eva", **FSDP2}, "whole model on each GPU", {**LORA, "peft_init_lora_weights": "eva"}),
    (peft.a_start_from_data_finds_rows, {**LORA, "peft_init_lora_weights": "eva", "relora": True}, "at a restart", {**QLORA, "peft_init_lora_weights": "eva"}),
    (peft.a_start_from_data_finds_rows, {**LORA, "peft_init_lora_weights": "eva", "peft_layer_replication": [[0, 2]]}, "copies layers", {**LORA, "peft_layer_replication": [[0, 2]]}),
    (peft.a_start_that_changes_the_base_finds_whole_weights, {**QLORA, "peft_init_lora_weights": "lora_ga"}, "decomposes the unquantized weights", {**QLORA, "peft_init_lora_weights": "eva"}),
    (peft.a_start_that_changes_the_base_finds_whole_weights, {**QLORA, "peft_init_lora_weights": "pissa"}, "decomposes the unquantized weights", {**LORA, "peft_init_lora_weights": "pissa"}),
    (peft.a_start_that_changes_the_base_finds_whole_weights, {**LORA, "peft_init_lora_weights": "olora", "rl": "dpo"}, "is the reference", {**LORA, "peft_init_lora_weights": "olora", "rl": "orpo"}),
    (peft.a_start_that_changes_the_base_finds_whole_weights, {**LORA, "peft_init_lora_weights": "olora", **FSDP2}, "whole weights", {**LORA, "peft_init_lora_weights": "gaussian", **FSDP2}),
    (peft.a_start_that_changes_the_base_finds_whole_weights, {**LORA, "peft": {"loftq_config": {"loftq_bits": 3}}}, "not 4 or 8", {**LORA, "peft": {"loftq_config": {"loftq_bits": 8}}}),
    (peft.a_start_that_changes_the_base_finds_whole_weights, {**LORA, "peft": {"loftq_config": {"loftq_bits": 4}}, "peft_init_lora_weights": "pissa"}, "two starts", {}),
    (peft.a_llama_adapter_sits_on_whole_weights, {**LORA, "peft_adapter": {"len": 5}}, "the size of `adapter: llama-adapter`", {"adapter": "llama-adapter", "peft_adapter": {"len": 5}}),
    (peft.a_llama_adapter_sits_on_whole_weights, {"adapter": "llama-adapter", **BITS8}, "unquantized model", {"adapter": "llama-adapter"}),
    (peft.lisa_says_how_many_and_how_often, {"lisa_n_layers": 2}, "lisa_step_interval: 20", {"lisa_n_layers": 2, "lisa_step_interval": 5}),
    (peft.lisa_says_how_many_and_how_often, {"lisa_n_layers": 2, "lisa_step_interval": 5, **FSDP2}, "fix at the start", {**FSDP2}),
    (model.memory_is_written_as_a_size, {"gpu_memory_limit": "much"}, "is no size", {"gpu_memory_limit": "20GiB"}),
    (model.memory_is_written_as_a_size, {"max_memory": {"cpu": "lots"}}, "is no size", {"max_memory": {"cpu": 1000, 0: "20 GB"}}),
    (peft.relora_restarts_an_adapter, {"relora": True, **LORA, "jagged_restart_steps": 5, "flash_attn_fuse_mlp": True}, "Fused modules are not supported with ReLoRA", {}),
]  # fmt: skip

# check, config that is warned of, words of the warning, config that is not
WARNED = [
    (optimizer.lora_plus_is_for_lora, {"loraplus_lr_ratio": 16}, "`loraplus_lr_ratio: 16` has no effect without", {**LORA, "loraplus_lr_ratio": 16}),
    (peft.an_adapter_needs_its_base_later, {**LORA, "reinit_weights": True}, "the random base model is not saved", {"reinit_weights": True}),
    (peft.an_adapter_leaves_the_base_frozen, {**LORA, "unfrozen_parameters": ["lm_head"]}, "`unfrozen_parameters` has no effect with `adapter: lora`", {"unfrozen_parameters": ["lm_head"]}),
    (training.a_run_has_steps, {"max_steps": 0}, "sets no limit", {"max_steps": -1}),
    (training.a_learning_rate_of_zero_learns_nothing, {"learning_rate": 0}, "trains nothing", {"learning_rate": 0, "embedding_lr": 0.1}),
    (attention.packing_needs_an_attention_that_keeps_documents_apart, {"sample_packing": True, "attn_implementation": "org/kernel"}, "cross sample decontamination", {"sample_packing": True, "attn_implementation": "sdpa"}),
    (attention.one_switch_chooses_the_attention, {"flash_attention": True, "sdp_attention": True}, "`flash_attention` wins", {"flash_attention": True}),
    (attention.sdpa_varlen_is_for_packing, {"sdpa_varlen": True}, "no effect without", {"sdpa_varlen": True, "sample_packing": True}),
    (attention.sdpa_varlen_is_for_packing, {"sdpa_varlen": True, "sample_packing": True, **OLD_TORCH}, "torch >= 2.10", {"sdpa_varlen": True, "sample_packing": True, **NEW_TORCH}),
    (attention.sage_attention_needs_padding_an_adapter_and_a_gpu_it_was_built_for, {"attn_implementation": "sage", "sample_packing": True}, "drop the loss to 0", {"attn_implementation": "sage", "sample_packing": True, **LORA}),
    (attention.packing_on_sdpa_in_bf16_is_risky_before_hopper, {"sample_packing": True, "attn_implementation": "sdpa", "bf16": True, **V100}, "0.0 loss", {"sample_packing": True, "attn_implementation": "sdpa", "bf16": True, **H100}),
    (datasets.a_key_of_a_dataset_is_for_its_type, {"datasets": [{"path": "x", "type": "completion", "field_messages": "body"}]}, "does not read `field_messages`. Write `field`", {"datasets": [{"path": "x", "type": "completion", "field": "body"}]}),
    (datasets.a_key_of_a_dataset_is_for_its_type, {"datasets": [{**CHAT, "type": {"format": "{instruction}"}, "roles_to_train": [], "field": "x"}]}, "`type: user_defined` of dataset `a.jsonl` does not read `roles_to_train`, `field`", {"datasets": [{**CHAT, "roles_to_train": ["user"]}]}),
    (datasets.split_chooses_the_part_of_a_dataset, {"datasets": [{**CHAT, "train_on_split": "x"}]}, "Write `split: x`", {"datasets": [{**CHAT, "split": "x"}]}),
    (datasets.a_benchmark_alone_evaluates_on_an_empty_set, {"do_bench_eval": True}, "evaluation dataset", {"do_bench_eval": True, "val_set_size": 0.1}),
    (datasets.pretraining_data_should_say_that_it_streams, {"pretraining_dataset": [CHAT]}, "streaming: true", {"pretraining_dataset": [CHAT], "streaming": True}),
    (datasets.a_stream_has_no_known_end, {"streaming": True, "max_steps": 5, "group_by_length": True}, "group_by_length", {"streaming": True, "max_steps": 5}),
    (training.two_of_three_batch_sizes_are_known, {"batch_size": 8, "micro_batch_size": 2}, "batch_size is not recommended", {"micro_batch_size": 2}),
    (training.evaluation_batches_are_best_like_training_batches, {"eval_batch_size": 2, "micro_batch_size": 1}, "eval_batch_size != micro_batch_size", {"eval_batch_size": 2, "micro_batch_size": 2}),
    (training.packed_batches_are_padded_to_one_length, {"sample_packing": True, "pad_to_sequence_len": False}, "`pad_to_sequence_len: true` is recommended when using sample_packing", {"pad_to_sequence_len": False}),
    (training.reward_models_score_padded_rows, {"reward_model": True}, "pad_to_sequence_len", {"reward_model": True, "pad_to_sequence_len": True}),
    (training.a_push_to_the_hub_needs_saves, {"hub_model_id": "a/b", "save_strategy": "no"}, "without any models being saved", {"hub_model_id": "a/b"}),
    (training.an_evaluation_needs_data, {"eval_steps": 10}, "nothing to evaluate on", {"eval_steps": 10, "test_datasets": [CHAT]}),
    (training.sample_tables_are_generated_samples_now, {"eval_table_size": 5}, "generate_samples: true", {"eval_table_size": 0}),
    (model.remote_code_is_worth_a_look, {"trust_remote_code": True}, "make sure that you reviewed", {"trust_remote_code": False}),
    (model.compile_auto_follows_the_torch_version, {"torch_compile": "auto", "torch_compile_options": {"shape_padding": True}, **OLD_TORCH}, "are dropped", {"torch_compile": "auto", **OLD_TORCH}),
    (model.compile_options_are_known_and_used, {"torch_compile": True, "torch_compile_options": {"triton.cudagraphs": True}, "sample_packing": True}, "recorded anew", {"torch_compile": True, "torch_compile_options": {"triton.cudagraphs": True}}),
    (model.torch_is_recent, OLD_TORCH, "no longer supported", NEW_TORCH),
    (model.better_transformer_runs_in_plain_half_precision, {"flash_optimum": True, "float16": True, **LORA}, "probably doesn't work with PEFT adapters", {"flash_optimum": True, "float16": True}),
    (precision.bf16_needs_a_gpu_that_has_it, {"bf16": True, **V100}, "bf16 requested, but AMP is not supported", {"bf16": True, **H100}),
    (precision.fp8_pays_off_when_compiled, {"fp8": True}, "slower than bf16", {"fp8": True, "torch_compile": True}),
    (precision.fp16_full_training_packs_with_flash_attention, {"fp16": True, "sample_packing": True, "attn_implementation": "sdpa"}, "likely to raise errors", {"fp16": True, "sample_packing": True, "attn_implementation": "flash_attention_2"}),
    (precision.computing_has_one_format, {"bf16": True, "fp16": True}, "bf16 wins", {"bf16": "auto", "fp16": True}),
    (precision.float16_weights_train_without_loss_scaling, {"float16": True}, "without loss scaling", {"float16": True, **LORA}),
    (memory.layer_offloading_moves_frozen_weights, {"layer_offloading": True, **LORA, **BITS8}, "8-bit weights stay", {"layer_offloading": True, **LORA, **BITS4}),
    (memory.tiles_are_of_the_models_own_mlp, {"tiled_mlp_num_shards": 4}, "no effect without `tiled_mlp: true`", {"tiled_mlp": True, "tiled_mlp_num_shards": 4}),
    (memory.losses_are_cut_in_chunks_once, {"chunked_cross_entropy_num_chunks": 4}, "no effect without", {"chunked_cross_entropy": True, "chunked_cross_entropy_num_chunks": 4}),
    (memory.offloading_is_a_key_of_its_own, {"gradient_checkpointing": "offload"}, "deprecated", {"gradient_checkpointing": True}),
    (memory.offloaded_hidden_states_use_plain_checkpointing, {"activation_offloading": "hidden_states", **LORA}, "saves little memory", {"activation_offloading": "hidden_states"}),
    (memory.selective_checkpointing_refines_checkpointing, {**SELECTIVE, "torch_compile": True}, "compiler", SELECTIVE),
    (optimizer.adam_settings_are_for_adam, {"optimizer": "sgd", "adam_beta1": 0.9}, "adamw hyperparameters found, but no adamw optimizer set", {"optimizer": "adamw_torch", "adam_beta1": 0.9}),
    (optimizer.polora_trains_plain_lora, {"optimizer": "polora", **LORA, "weight_decay": 0.1}, "decays A and B apart", {"optimizer": "polora", **LORA}),
    (optimizer.q_galore_projects_full_weights, {"optimizer": "q_galore_adamw8bit", "bf16": False}, "in fp32", {"optimizer": "q_galore_adamw8bit", "bf16": True}),
    (optimizer.updates_in_backward_need_whole_batches, {"optimizer": "lomo", "max_grad_norm": 1.0}, "never has all gradients at once", {"optimizer": "lomo"}),
    (optimizer.projections_need_to_know_their_modules, {"optim_target_modules": "all_linear"}, "has no effect with `optimizer: adamw_torch_fused`", {}),
    (optimizer.schedule_free_optimizers_need_no_schedule, {"optimizer": "schedule_free_adamw"}, "Write `lr_scheduler: constant`", {"optimizer": "schedule_free_adamw", "lr_scheduler": "constant"}),
    (optimizer.schedule_keys_have_a_schedule, {"lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1}, "It is for cosine and rex", {"lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1, "jagged_restart_steps": 5}),
    (optimizer.schedule_keys_have_a_schedule, {"cosine_constant_lr_ratio": 0.8}, "no effect without `cosine_min_lr_ratio`", {"cosine_constant_lr_ratio": 0.8, "cosine_min_lr_ratio": 0.1}),
    (optimizer.schedule_keys_have_a_schedule, {"lr_div_factor": 25}, "It is for one_cycle", {"lr_scheduler": "one_cycle", "lr_div_factor": 25}),
    (optimizer.schedule_keys_have_a_schedule, {"jagged_restart_warmup_steps": 5}, "no effect without `jagged_restart_steps`", {"jagged_restart_warmup_steps": 5, "jagged_restart_steps": 50}),
    (optimizer.batch_flattening_needs_an_attention_that_knows_borders, {"batch_flattening": True, "attn_implementation": "flash_attention_2"}, "no effect with micro_batch_size == 1", {}),
    (rl.ipo_is_a_loss_of_dpo, {"rl": "ipo"}, "deprecated", {"rl": "dpo"}),
    (rl.vllm_runs_as_a_server_unless_said, {"trl": {"use_vllm": True}}, "must be set to either `server` or `colocate`", {"trl": {"use_vllm": True, "vllm_mode": "colocate"}}),
    (rl.the_fused_dpo_loss_is_one_loss, {"rl": "dpo", "dpo_use_liger_kernel": True, "dpo_loss_type": ["sigmoid", "sft"]}, "only the first", {"rl": "dpo", "dpo_use_liger_kernel": True, "dpo_loss_type": ["sigmoid"]}),
    (rl.ebft_has_a_section, {**STRIDED, "sequence_len": 8192}, "fit in memory", {**STRIDED, "sequence_len": 512}),
    (distributed.fsdp_lists_are_fsdp_config_now, {"fsdp": ["full_shard"]}, "deprecated", FSDP2),
    (distributed.fsdp_version_is_known, FSDP1, "FSDP1 will be deprecated", FSDP2),
    (distributed.fp32_norms_are_an_option_of_fsdp2, {"fp32_norm_classes": ["RMSNorm"]}, "no effect", {"fp32_norms": True, "fp32_norm_classes": ["RMSNorm"], **FSDP2}),
    (peft.zero3_recomputes_qlora_in_the_reentrant_way, {**QLORA, "deepspeed": "deepspeed_configs/zero3.json", "gradient_checkpointing_kwargs": {"use_reentrant": False}}, "zero3", {**QLORA, "deepspeed": "zero2.json", "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    (peft.offloaded_embeddings_need_a_quantized_model_on_one_gpu, {"ple_cpu_offload": True, **QLORA, **H100X2}, "per process", {"ple_cpu_offload": True, **QLORA, **H100}),
    (peft.fixed_tokens_train, {"fix_untrained_tokens": [5, 6], "peft_trainable_token_indices": {"embed_tokens": [5]}}, "[6]", {"fix_untrained_tokens": 5, "peft_trainable_token_indices": [5]}),
]  # fmt: skip

# check, config, key, value filled in (or None: the key is left open)
FILLED = [
    (attention.one_switch_chooses_the_attention, {"flash_attention": True}, "attn_implementation", "flash_attention_2"),
    (attention.one_switch_chooses_the_attention, {"sdp_attention": True, "xformers_attention": True}, "attn_implementation", "xformers"),
    (attention.one_switch_chooses_the_attention, {"flash_attention": False}, "attn_implementation", None),
    (attention.one_switch_chooses_the_attention, {"flash_attention": True}, "flash_attention", None),
    (attention.flash_attn_d512_is_now_large_head_attention, {"flash_attn_d512": True}, "large_head_attention", "triton_flash"),
    (attention.gemma4_hybrid_attention_builds_on_flash_attention_2, {"gemma4_hybrid_attn_impl": True}, "attn_implementation", "flash_attention_2"),
    (attention.packing_chooses_an_attention_that_knows_borders, {"sample_packing": True}, "attn_implementation", "flash_attention_2"),
    (attention.packing_chooses_an_attention_that_knows_borders, {}, "attn_implementation", None),
    (attention.large_head_attention_is_a_known_policy, {"large_head_attention": "SDPA"}, "large_head_attention", "sdpa"),
    (datasets.a_seed_is_always_set, {}, "seed", 42),
    (datasets.a_seed_is_always_set, {"seed": 0}, "seed", 0),
    (datasets.older_message_fields_are_property_mappings, {"datasets": [{"path": "a", "message_field_role": "from"}]}, "datasets", [{"path": "a", "message_property_mappings": {"role": "from"}}]),
    (datasets.jinja_needs_a_template_text, {"chat_template_jinja": "x"}, "chat_template", "jinja"),
    (datasets.jinja_needs_a_template_text, {"datasets": [{"path": "a", "chat_template_jinja": "x"}]}, "datasets", [{"path": "a", "chat_template_jinja": "x", "chat_template": "jinja"}]),
    (datasets.a_chat_dataset_renders_with_the_tokenizers_template, {"datasets": [CHAT]}, "datasets", [{**CHAT, "chat_template": "tokenizer_default"}]),
    (datasets.a_chat_dataset_renders_with_the_tokenizers_template, {"datasets": [CHAT], "chat_template": "chatml"}, "datasets", [CHAT]),
    (datasets.a_benchmark_alone_evaluates_on_an_empty_set, {"do_bench_eval": True, "val_set_size": 0.1}, "test_datasets", None),
    (datasets.a_packed_run_evaluates_packed, {"sample_packing": True}, "eval_sample_packing", True),
    (datasets.a_packed_run_evaluates_packed, {"sample_packing": True, "eval_sample_packing": False}, "remove_unused_columns", False),
    (datasets.rows_that_are_not_prepared_keep_their_columns, {"skip_prepare_dataset": True}, "remove_unused_columns", False),
    (datasets.a_stream_has_no_known_end, {"streaming": True, "max_steps": 5}, "accelerator_config", {"split_batches": False, "dispatch_batches": False}),
    (datasets.preparation_uses_the_cpus_there_are, {"dataset_num_proc": 3}, "dataset_num_proc", 3),
    (datasets.batches_are_loaded_by_as_many_processes_as_pay_off, H100X2, "dataloader_num_workers", 2),
    (datasets.batches_are_loaded_by_as_many_processes_as_pay_off, NO_GPU, "dataloader_num_workers", 0),
    (datasets.batches_are_loaded_by_as_many_processes_as_pay_off, {**H100, "dataloader_pin_memory": False}, "dataloader_num_workers", None),
    (training.two_of_three_batch_sizes_are_known, {"batch_size": 8, "micro_batch_size": 2}, "gradient_accumulation_steps", 4),
    (training.packed_batches_are_padded_to_one_length, {"sample_packing": True}, "pad_to_sequence_len", True),
    (training.reward_models_score_padded_rows, {"reward_model": True}, "num_labels", 1),
    (training.reward_models_score_padded_rows, {"reward_model": True}, "type_of_model", "AutoModelForSequenceClassification"),
    (training.process_reward_models_judge_tokens, {"process_reward_model": True}, "num_labels", 2),
    (training.process_reward_models_judge_tokens, {"process_reward_model": True, "type_of_model": "X"}, "type_of_model", "X"),
    (model.compile_auto_follows_the_torch_version, {"torch_compile": "auto", **NEW_TORCH}, "torch_compile", True),
    (model.compile_auto_follows_the_torch_version, {"torch_compile": "auto", **OLD_TORCH}, "torch_compile", False),
    (model.compile_auto_follows_the_torch_version, {"torch_compile": "auto", **NEW_TORCH, **NO_GPU}, "torch_compile", False),
    (precision.tf32_auto_follows_the_gpu, {"tf32": "auto", **H100}, "tf32", True),
    (precision.tf32_auto_follows_the_gpu, V100, "tf32", False),
    (precision.tf32_auto_follows_the_gpu, {"tf32": False, **H100}, "tf32", False),
    (memory.selective_checkpointing_refines_checkpointing, SELECTIVE, "torch_compile", False),
    (attention.shifted_attention_is_not_compiled, {"s2_attention": True}, "torch_compile", False),
    (precision.float32_computes_in_float32, {"float32": True}, "bf16", False),
    (precision.float32_computes_in_float32, {"float32": True, "bf16": True}, "bf16", True),
    (precision.computing_has_one_format, {"bf16": True, "fp16": True}, "fp16", False),
    (memory.checkpointing_takes_known_arguments, {"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "gradient_checkpointing_kwargs", {"every_n_layers": 2, "use_reentrant": False}),
    (memory.tiles_are_of_the_models_own_mlp, {"tiled_mlp": True, "tiled_mlp_use_original_mlp": False}, "tiled_mlp_use_original_mlp", True),
    (memory.offloading_is_a_key_of_its_own, {"gradient_checkpointing": "offload_disk"}, "activation_offloading", "disk"),
    (memory.offloading_is_a_key_of_its_own, {"gradient_checkpointing": "offload"}, "gradient_checkpointing", True),
    (memory.offloaded_hidden_states_use_plain_checkpointing, {"activation_offloading": "hidden_states"}, "gradient_checkpointing_kwargs", {"use_reentrant": False}),
    (optimizer.q_galore_projects_full_weights, {"optimizer": "q_galore_adamw8bit"}, "optim_target_modules", ["attn", "mlp"]),
    (optimizer.updates_in_backward_need_whole_batches, {"optimizer": "lomo"}, "non_finite_policy", "raise"),
    (optimizer.batch_flattening_needs_an_attention_that_knows_borders, {"batch_flattening": "auto", "micro_batch_size": 2, "attn_implementation": "flash_attention_2"}, "batch_flattening", True),
    (optimizer.batch_flattening_needs_an_attention_that_knows_borders, {"batch_flattening": "auto", "micro_batch_size": 2}, "batch_flattening", False),
    (rl.ipo_is_a_loss_of_dpo, {"rl": "ipo"}, "dpo_loss_type", ["ipo"]),
    (rl.ipo_is_a_loss_of_dpo, {"rl": "ipo"}, "rl", "dpo"),
    (rl.vllm_runs_as_a_server_unless_said, {"trl": {"use_vllm": True}}, "trl", {"use_vllm": True, "vllm_mode": "server"}),
    (rl.ebft_has_a_section, {**STRIDED, "attn_implementation": "flex_attention", "gradient_checkpointing": True}, "gradient_checkpointing_kwargs", {"use_reentrant": True}),
    (distributed.fsdp_version_is_known, {"fsdp_config": {"offload_params": True}}, "fsdp_version", 1),
    (distributed.fsdp_version_is_known, {"fsdp_config": {"fsdp_version": 2}}, "fsdp_version", 2),
    (distributed.parallel_sizes_are_one_unless_set, {}, "context_parallel_size", 1),
    (distributed.parallel_sizes_are_one_unless_set, {"tensor_parallel_size": 4}, "tensor_parallel_size", 4),
    (distributed.deepcompile_is_an_option_of_deepspeed, {"deepcompile": True, "deepspeed": {"a": 1}}, "deepspeed", {"a": 1, "compile": {"deepcompile": True}}),
    (peft.lora_has_no_dropout_unless_set, LORA, "lora_dropout", 0.0),
    (peft.lora_has_no_dropout_unless_set, {}, "lora_dropout", None),
]  # fmt: skip

# Tested by a function of their own below.
BY_THEMSELVES = {distributed.npus_lack_some_kernels, peft.lora_kernels_are_on_where_they_work}


def names(row) -> str:
    return row.__name__ if callable(row) else ""


@pytest.fixture
def heard():
    """Messages that are logged, whoever configured logging."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, listener = logging.getLogger("axolotl"), Listener()
    logger.addHandler(listener)
    yield messages
    logger.removeHandler(listener)


@pytest.mark.parametrize(("check", "refused", "words", "accepted"), REFUSED, ids=names)
def test_refuses(check, refused, words, accepted):
    with pytest.raises(AxolotlError) as error:
        check(DictDefault(refused))
    assert words in str(error.value)
    check(DictDefault(accepted))


@pytest.mark.parametrize(("check", "warned", "words", "quiet"), WARNED, ids=names)
def test_warns(check, warned, words, quiet, heard):
    check(DictDefault(warned))
    assert any(words in message for message in heard), heard
    heard.clear()
    check(DictDefault(quiet))
    assert not any(words in message for message in heard), heard


@pytest.mark.parametrize(("check", "config", "key", "value"), FILLED, ids=names)
def test_fills(check, config, key, value):
    cfg = DictDefault(config)
    check(cfg)
    assert cfg[key] == value


@pytest.mark.parametrize("check", CHECKS, ids=names)
def test_every_check_has_a_row_and_states_its_rule(check):
    assert check in {row[0] for table in (REFUSED, WARNED, FILLED) for row in table} | BY_THEMSELVES
    assert check.__doc__ and check.__doc__.strip().split("\n")[0].endswith((".", "`", ";"))


@pytest.mark.parametrize("check", CHECKS, ids=names)
def test_an_empty_config_breaks_no_check_but_the_one_that_wants_data(check):
    if check is not datasets.a_config_names_its_data:
        check(DictDefault())


def test_problems_are_collected_and_refused_keys_are_not_judged():
    cfg = DictDefault({"datasets": [CHAT], "batch_size": 8, "warmup_steps": 5, "warmup_ratio": 0.1, **BITS8})
    assert len(run_checks(cfg)) == 3
    cfg = DictDefault({"datasets": [CHAT], "batch_size": 8, "warmup_steps": 5, "warmup_ratio": 0.1, **BITS8})
    problems = run_checks(cfg, {"micro_batch_size", "warmup_ratio"})
    assert len(problems) == 1 and "load_in_8bit" in problems[0]


def test_what_is_filled_is_noted():
    cfg = DictDefault({"datasets": [CHAT], "sample_packing": True})
    assert run_checks(cfg) == []
    noted = {entry["key"]: entry for entry in cfg.resolution}
    assert noted["attn_implementation"]["value"] == "flash_attention_2" and noted["attn_implementation"]["reason"]
    assert noted["seed"]["value"] == 42


@pytest.mark.parametrize("variable", ["AXOLOTL_DATASET_NUM_PROC", "RUNPOD_CPU_COUNT"])
def test_the_environment_says_how_many_processes_prepare_data(variable, monkeypatch):
    monkeypatch.setenv(variable, "7")
    cfg = DictDefault()
    datasets.preparation_uses_the_cpus_there_are(cfg)
    assert cfg.dataset_num_proc == 7
    monkeypatch.setenv(variable, "many")
    with pytest.raises(AxolotlError, match=variable):
        datasets.preparation_uses_the_cpus_there_are(DictDefault())


def test_magistral_is_tokenized_with_mistral_common(monkeypatch):
    cfg = DictDefault(base_model="mistralai/Magistral-Small-2509")
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: object())
    training.mistral_tokenizers_bring_their_own_tokens(cfg)
    assert cfg.tokenizer_use_mistral_common is True
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"axolotl\[mistral\]"):
        training.mistral_tokenizers_bring_their_own_tokens(cfg)


def test_tensor_parallel_is_written_into_the_deepspeed_file(tmp_path):
    path = tmp_path / "zero1.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    cfg = DictDefault(deepspeed=str(path), tensor_parallel_size=2)
    distributed.deepcompile_is_an_option_of_deepspeed(cfg)
    assert cfg.deepspeed.tensor_parallel.autotp_size == 2
    assert cfg.deepspeed.zero_optimization == {"stage": 1, "gather_16bit_weights_on_model_save": True}
    assert json.loads(path.read_text()) == {"zero_optimization": {"stage": 1}}


def test_an_npu_has_no_cuda_kernels(monkeypatch):
    cfg = DictDefault(attn_implementation="flash_attention_2", load_in_4bit=True, tf32=True, optimizer="adamw_8bit")
    distributed.npus_lack_some_kernels(cfg)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(AxolotlError) as error:
        distributed.npus_lack_some_kernels(cfg)
    assert len(error.value.problems) == 4


def test_lora_kernels_are_on_for_plain_lora_only():
    def kernels(**config) -> bool | None:
        cfg = DictDefault(config)
        peft.lora_kernels_are_on_where_they_work(cfg)
        return cfg.lora_mlp_kernel

    assert kernels(**LORA, **H100) is True
    assert kernels(**LORA, **H100X2, **FSDP2) is True
    assert kernels(**LORA, **H100X2, **FSDP1) is None
    assert kernels(**LORA, **H100, rl="dpo") is None
    assert kernels(**LORA, **H100, lora_o_kernel=False) is None
    assert kernels(**LORA, **BITS8, **H100) is None
    assert kernels(**LORA, **H100, torch_compile=True) is True
    assert kernels(**LORA, **NO_GPU) is None
    assert kernels(**LORA) is None


def test_a_plugin_may_bring_an_adapter(monkeypatch):
    cfg = DictDefault(adapter="mora", plugins=["x.MoraPlugin"])
    monkeypatch.setattr(PluginManager, "get_adapter_capabilities", lambda self: {"mora": object()})
    peft.adapter_is_known(cfg)
    with pytest.raises(AxolotlError, match="not known"):
        peft.adapter_is_known(DictDefault(adapter="mora"))

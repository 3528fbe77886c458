"""Every field of config.json, and what becomes of it: honoured, fixed, read apart or harmless. What is in no table is refused."""

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "dense_layers": "first_k_dense_replace",
    "heads": "num_attention_heads",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope_head_dim": "qk_nope_head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "dense_width": "intermediate_size",
    "expert_width": "moe_intermediate_size",
    "experts": "n_routed_experts",
    "shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "groups": "n_group",
    "top_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "norm_eps": "rms_norm_eps",
}
"""Fields of conf.schema.Model and theirs, where the values are the same."""
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
"""What every DeepSeek-V3 has, and this program knows no other way of. A file may leave it out."""
FIXED_ELSEWHERE = {"partial_rotary_factor": 1.0, "is_causal": True, "is_encoder_decoder": False}
"""Fields of other models with one allowed value, which transformers obeys in this one too. Files of DeepSeek-V3 have
none of them."""
READ_APART = (
    "architectures",
    "model_type",
    "quantization_config",
    "max_position_embeddings",
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "num_key_value_heads",
    "head_dim",
    "qk_head_dim",
    "num_local_experts",
    "mlp_layer_types",
)
"""Fields with a rule of their own, here or in `read_model`."""
GENERATION = """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
OTHER_MODELS = """
    add_cross_attention cross_attention_hidden_size decoder_start_token_id finetuning_task is_decoder prefix pruned_heads
    sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder torchscript use_bfloat16
"""
HARMLESS = {
    "auto_map": "names Python files of the folder, of which none is ever run",
    "_name_or_path": "where the folder came from",
    "name_or_path": "where the folder came from",
    "_commit_hash": "where the folder came from",
    "transformers_version": "what wrote the folder",
    "dtype": "every tensor says its own type",
    "torch_dtype": "every tensor says its own type",
    "initializer_range": "of weights before the training",
    "attention_dropout": "acts in training alone, and ours has none",
    "aux_loss_alpha": "a loss of the training; optim.balance_loss is ours",
    "seq_aux": "a loss of the training; optim.balance_loss is ours",
    "output_router_logits": "asks for results beside the logits",
    "output_hidden_states": "asks for results beside the logits",
    "output_attentions": "asks for results beside the logits",
    "return_dict": "the form of results in Python",
    "ep_size": "how one program spreads experts over devices",
    "pretraining_tp": "cuts products into parts that add up to the same",
    "chunk_size_feed_forward": "cuts products into parts, in other models",
    "use_cache": "whether generation keeps a cache",
    "attn_implementation": "which kernel computes the same attention",
    "_attn_implementation": "which kernel computes the same attention",
    "_attn_implementation_autoset": "which kernel computes the same attention",
    "experts_implementation": "which kernel computes the same experts",
    "bos_token_id": "the tokenizer's files say it",
    "eos_token_id": "the tokenizer's files say it",
    "pad_token_id": "its row of the embedding is a weight like any other",
    "tokenizer_class": "tokenizer.json is read instead",
    "id2label": "of classifiers, which this architecture is not",
    "label2id": "of classifiers, which this architecture is not",
    "num_labels": "of classifiers, which this architecture is not",
    "problem_type": "of classifiers, which this architecture is not",
    **dict.fromkeys(GENERATION.split(), "how text is drawn; the section generate is ours"),
    **dict.fromkeys(OTHER_MODELS.split(), "older transformers wrote it into every file, and other models read it"),
}
"""Fields that change nothing in what the model computes here, and why. All others are refused unless they are null."""
QUANTISED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": "blocks of 128 x 128",
    "activation_scheme": "dynamic: activations are rounded by their own values, if at all",
    "scale_fmt": "of the scales of activations; those of weights are tensors",
    "modules_to_not_convert": "every tensor says its own type",
    "modules_to_convert": "every tensor says its own type",
    "expert_dtype": "every tensor says its own type",
    "dequantize": "weights are always dequantised here",
}
"""Fields of quantization_config, and the value that they must have or why they change nothing. All others are refused unless they are null."""
ROPE_NUMBERS = {
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
}
ROPE_FIELDS = {"rope_type", "type", "rope_theta", "truncate", "partial_rotary_factor"} | ROPE_NUMBERS
"""Parameters of the positions that have a meaning in every family. All others are refused unless they are null."""

"""What cptool knows of the fields in the JSON files of a Hugging Face directory."""

from cptool.checkpoint.known_fields import OFF, ONE, FieldList

# What transformers writes into a configuration of any model, and tools for training add.
_RUN_TIME = frozenset(
    """
    _name_or_path name_or_path _commit_hash transformers_version torch_dtype dtype use_cache
    initializer_range initializer_factor attention_dropout hidden_dropout hidden_dropout_prob
    attention_probs_dropout_prob attn_pdrop resid_pdrop embd_pdrop dropout classifier_dropout
    attn_dropout residual_dropout embedding_dropout dropout_rate pretraining_tp auto_map
    unsloth_version unsloth_fixed _flash_attn_2_enabled _attn_implementation attn_implementation
    _attn_implementation_internal _attn_implementation_autoset attention_implementation
    use_flash_attn use_flash_attention use_flash_attention_2 flash_attention flash_attn
    use_sdpa use_xformers use_memory_efficient_attention
    gradient_checkpointing use_reentrant output_attentions output_hidden_states return_dict
    torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward finetuning_task id2label
    label2id num_labels problem_type task_specific_params tokenizer_class prefix is_decoder
    max_window_layers experts_implementation _experts_implementation
    use_fused_rms_norm fused_rms_norm use_fused_rope use_fused_rotary_kernel
    use_fused_cross_entropy use_rms_norm_kernel sequence_parallel tensor_parallel
    pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    max_sequence_length max_seq_length max_seq_len seq_length seq_len model_max_length n_ctx
    n_positions max_length max_new_tokens license language tags model_name base_model
    base_model_name_or_path created_by description author version trl_version peft_version
    is_llama_config transformers.js_config
    """.split()
)

# Fields of a generation that bear on other ways to generate than cptool's, or on what is returned.
_GENERATION = frozenset(
    """
    do_sample temperature top_p top_k min_p repetition_penalty use_cache max_length
    max_new_tokens max_time max_cache_len
    transformers_version _from_model_config pad_token_id decoder_start_token_id
    output_attentions output_hidden_states output_logits output_scores return_dict_in_generate
    cache_config cache_implementation compile_config disable_compile continuous_batching_config
    prefill_chunk_size low_memory num_return_sequences early_stopping length_penalty
    diversity_penalty num_beam_groups remove_invalid_values renormalize_logits
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind is_assistant num_assistant_tokens num_assistant_tokens_schedule
    max_matching_ngram_size prompt_lookup_num_tokens target_lookbehind token_healing
    speculation_type use_mtp encoder_repetition_penalty encoder_no_repeat_ngram_size
    trust_remote_code attn_implementation _attn_implementation torch_dtype dtype
    """.split()
)

HUGGING_FACE = FieldList(
    used=frozenset(
        """
        architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers
        num_attention_heads num_key_value_heads head_dim rms_norm_eps max_position_embeddings
        original_max_position_embeddings tie_word_embeddings rope_theta rope_scaling
        rope_parameters bos_token_id eos_token_id quantization_config compression_config
        layer_types attention_multiplier query_pre_attn_scalar sliding_window
        """.split()
    ),
    harmless=_RUN_TIME | _GENERATION,
    neutral={
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "qkv_bias": (None, False),
        "bias": (None, False),
        "use_bias": (None, False),
        "add_bias_linear": (None, False),
        "add_qkv_bias": (None, False),
        "attention_out_bias": (None, False),
        "attention_in_bias": (None, False),
        "lm_head_bias": (None, False),
        "hidden_act": (None, "swish", "silu"),
        "use_sliding_window": (None, False),
        "use_mrope": (None, False),
        "attention_window_size": OFF,
        "attention_chunk_size": OFF,
        "use_qk_norm": (None, False),
        "qk_norm": (None, False),
        "qk_layernorm": (None, False),
        "use_qk_layernorm": (None, False),
        "is_causal": (None, True),
        "use_bidirectional_attention": (None, False),
        "causal": (None, True),
        "use_causal_mask": (None, True),
        "is_encoder_decoder": (None, False),
        "add_cross_attention": (None, False),
        "cross_attention_hidden_size": (None, 0),
        "tie_encoder_decoder": (None, False),
        "pruned_heads": (None, {}),
        "partial_rotary_factor": ONE,
        "rotary_pct": ONE,
        "rotary_percent": ONE,
        "rope_ratio": ONE,
        "rope_scaling_factor": ONE,
        "rope_interleaved": (None, False),
        "rope_interleave": (None, False),
        "use_rope": (None, True),
        "use_rotary": (None, True),
        "use_rotary_embedding": (None, True),
        "position_embedding_type": (None, "absolute", "rope"),
        "use_logn_attn": (None, False),
        "use_dynamic_ntk": (None, False),
        "alibi": (None, False),
        "use_alibi": (None, False),
        "no_rope_layers": (None, []),
        "no_rope_layer_interval": (None, 0),
        "norm_type": (None, "rmsnorm", "rms_norm"),
        "normalization": (None, "rmsnorm", "RMSNorm"),
        "norm_after": (None, False),
        "post_norm": (None, False),
        "use_post_norm": (None, False),
        "parallel_residual": (None, False),
        "use_parallel_residual": (None, False),
        "parallel_attn": (None, False),
        "scale_embeddings": (None, False),
        "scale_embedding": (None, False),
        "scale_attn_weights": (None, True),
        "scale_attention_softmax_in_fp32": (None, True, False),
        "attention_softmax_in_fp32": (None, True, False),
        "scale_attn_by_inverse_layer_idx": (None, False),
        "reorder_and_upcast_attn": (None, False, True),
        "embedding_multiplier": ONE,
        "residual_multiplier": ONE,
        "logits_scaling": ONE,
        "logit_scale": ONE,
        "logits_scale": ONE,
        "scale_emb": ONE,
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
        "num_experts": OFF,
        "num_local_experts": OFF,
        "num_experts_per_tok": OFF,
        "n_routed_experts": OFF,
        "n_shared_experts": OFF,
        "swiglu_limit": (None, 0),
        "adapters": (None, {}),
        "text_config": (None, {}),
        "vision_config": (None, {}),
        "audio_config": (None, {}),
    },
)

# Inside `rope_scaling` and `rope_parameters`, for the types that cptool computes.
ROPE = FieldList(
    used=frozenset(
        """
        rope_type type factor rope_theta low_freq_factor high_freq_factor
        original_max_position_embeddings
        """.split()
    ),
    harmless=frozenset(["finetuned", "beta_fast", "beta_slow", "truncate"]),
    neutral={
        "partial_rotary_factor": ONE,
        "attention_factor": ONE,
        "mscale": ONE,
        "mscale_all_dim": (None, 0, 1),
        "mrope_section": (None,),
        "short_factor": (None,),
        "long_factor": (None,),
        "rope_ratio": ONE,
    },
)

GENERATION = FieldList(
    used=frozenset(["bos_token_id", "eos_token_id"]),
    harmless=_GENERATION,
    neutral={"guidance_scale": ONE, "sequence_bias": (None,)},
    unapplied=frozenset(
        """
        typical_p top_h epsilon_cutoff eta_cutoff
        no_repeat_ngram_size bad_words_ids force_words_ids suppress_tokens begin_suppress_tokens
        forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty min_length
        min_new_tokens num_beams penalty_alpha dola_layers constraints stop_strings
        watermarking_config xtc_threshold xtc_probability frequency_penalty presence_penalty
        """.split()
    ),
)

# The tokenizer's reader looks up what it needs; these are the fields that are known beside them.
TOKENIZER = FieldList(
    used=frozenset(
        """
        add_bos_token add_eos_token add_prefix_space add_dummy_prefix_space added_tokens_decoder
        additional_special_tokens extra_special_tokens bos_token eos_token pad_token unk_token
        cls_token sep_token mask_token prefix_token middle_token suffix_token eot_token fill_token
        chat_template legacy tokenizer_class
        clean_up_tokenization_spaces model_max_length
        """.split()
    ),
    harmless=frozenset(
        """
        padding_side truncation_side model_input_names name_or_path _name_or_path auto_map backend
        is_local local_files_only processor_class sp_model_kwargs special_tokens_map_file
        tokenizer_file use_default_system_prompt spaces_between_special_tokens split_special_tokens
        errors added_tokens_decoder padding max_length stride truncation truncation_strategy
        pad_to_multiple_of pad_token_type_id use_fast trust_remote_code device_map language
        do_lower_case transformers_version model_specific_special_tokens return_tensors
        bos_token_id eos_token_id pad_token_id unk_token_id vocab_file merges_file response_schema
        init_inputs added_tokens fix_mistral_regex is_original_format
        """.split()
    ),
)

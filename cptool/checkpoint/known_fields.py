"""The fields of model files that cptool knows, and what becomes of those that it does not.

A field is used, or known to change nothing, or known to change nothing under some values. A field
on no list is refused if its name speaks of what a Llama computes, for ignoring it could change
every token. Any other one is named once if it is set, for it may matter to the user.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cptool.checkpoint.fields import readable, shown
from cptool.errors import UserError

# Parts of names that speak of what a Llama computes. The first group counts anywhere in a word, the
# second at its beginning or its end: "property" and "capability" speak of nothing.
_SUBJECTS = re.compile(
    r"rotary|attention|attn|norm|scal(?:e|ing)|multiplier|bias|softcap|causal|expert|window"
    r"|quantiz|lora"
    r"|(?:^|[^a-z])(?:n?rope|n?caps?|nope|moe|alibi|yarn|ntk|mup|qk)(?=[^a-z]|$)"
    r"|(?:^|[^a-z])rope|(?<!euro)rope(?=[^a-z]|$)|cap(?:ping|ped)?(?=[^a-z]|$)"
)


@dataclass(frozen=True)
class FieldList:
    """The known fields of one kind of file.

    `used` are read by code of their own, `harmless` change nothing whatever they say, `neutral`
    names the values under which a field changes nothing. `harmless_prefixes` are whole families.
    """

    used: frozenset[str]
    harmless: frozenset[str]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless_prefixes: tuple[str, ...] = ()


def check_fields(source: Path, fields: Mapping[str, Any], known: FieldList) -> list[str]:
    """The names of unknown fields that are set, to be named once.

    Raises UserError for a field that changes what the model computes in a way that cptool does not,
    or may do so.
    """
    unknown = []
    for name, value in fields.items():
        if name in known.neutral:
            if not any(_same(value, allowed) for allowed in known.neutral[name]):
                raise UserError(
                    f"{source}: {readable(name)} is {shown(value)}, which is not supported: cptool "
                    f"computes a Llama where it is absent or {known.neutral[name][-1]!r}; use a "
                    f"checkpoint without it"
                )
        elif name in known.used or name in known.harmless:
            continue
        elif name.startswith(known.harmless_prefixes) or _is_unset(value):
            continue
        elif speaks_of_the_model(name):
            raise UserError(
                f"{source}: {readable(name)} is {shown(value)}; cptool does not know this field, "
                f"and ignoring it could change the answer; remove it if it changes nothing, or use "
                f"another checkpoint"
            )
        elif not _is_plain(value):
            unknown.append(readable(name))
    return unknown


def note_of_unknown(unknown: Iterable[str]) -> tuple[str, ...]:
    """At most one line that names all fields that were ignored."""
    names = list(dict.fromkeys(unknown))
    if not names:
        return ()
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (f"fields that cptool does not know were ignored: {', '.join(names[:8])}{more}",)


def speaks_of_the_model(name: str) -> bool:
    """Whether the name of a field is about what a Llama computes."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return _SUBJECTS.search(words) is not None


def _same(value: Any, allowed: Any) -> bool:
    """Equal, and not a boolean where a number is meant or the other way round."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _is_unset(value: Any) -> bool:
    """Nothing is asked for. False and 0 are not among these: `is_causal` is a field."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _is_plain(value: Any) -> bool:
    return _is_unset(value) or (
        isinstance(value, bool | int | float) and value in (0, 1) and (value is not True)
    )


_OFF = (None, 0, False)
_ONE = (None, 1)

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

# Of a generation: what bears on other ways to generate than cptool's, or on what is returned.
_GENERATION = frozenset(
    """
    do_sample temperature top_p use_cache max_length max_new_tokens max_time max_cache_len
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
    harmless=_RUN_TIME | _GENERATION | {"top_k"},
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
        "attention_window_size": _OFF,
        "attention_chunk_size": _OFF,
        "use_qk_norm": (None, False),
        "qk_norm": (None, False),
        "qk_layernorm": (None, False),
        "use_qk_layernorm": (None, False),
        "is_causal": (None, True),
        "causal": (None, True),
        "use_causal_mask": (None, True),
        "is_encoder_decoder": (None, False),
        "add_cross_attention": (None, False),
        "cross_attention_hidden_size": (None, 0),
        "tie_encoder_decoder": (None, False),
        "pruned_heads": (None, {}),
        "partial_rotary_factor": _ONE,
        "rotary_pct": _ONE,
        "rotary_percent": _ONE,
        "rope_ratio": _ONE,
        "rope_scaling_factor": _ONE,
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
        "embedding_multiplier": _ONE,
        "residual_multiplier": _ONE,
        "logits_scaling": _ONE,
        "logit_scale": _ONE,
        "logits_scale": _ONE,
        "scale_emb": _ONE,
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
        "num_experts": _OFF,
        "num_local_experts": _OFF,
        "num_experts_per_tok": _OFF,
        "n_routed_experts": _OFF,
        "n_shared_experts": _OFF,
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
        "partial_rotary_factor": _ONE,
        "attention_factor": _ONE,
        "mscale": _ONE,
        "mscale_all_dim": (None, 0, 1),
        "mrope_section": (None,),
        "short_factor": (None,),
        "long_factor": (None,),
        "rope_ratio": _ONE,
    },
)

GENERATION = FieldList(
    used=frozenset(["bos_token_id", "eos_token_id"]),
    harmless=_GENERATION,
    neutral={"guidance_scale": _ONE, "sequence_bias": (None,)},
)

# The tokenizer's reader looks up what it needs; here only what it never asks for counts.
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

PARAMS = FieldList(
    used=frozenset(
        """
        dim n_layers n_heads n_kv_heads head_dim norm_eps vocab_size rope_theta use_scaled_rope
        rope_scaling_factor rope_high_freq_factor max_seq_len
        """.split()
    ),
    harmless=frozenset(
        """
        multiple_of ffn_dim_multiplier max_batch_size model_parallel_size ffn_exp ffn_hidden_dim
        dtype architectures model_type max_position_embeddings
        """.split()
    ),
    neutral={
        "sliding_window": _OFF,
        "swin_norm": (None, False),
        "qk_norm": (None, False),
        "use_qk_norm": (None, False),
        "quantization_args": (None,),
        "lora_args": (None,),
        "moe": (None,),
        "moe_args": (None,),
        "vision_chunk_size": (None, 0, -1),
        "vision_max_num_chunks": (None, 0, 4),
        "vision_num_cross_attention_layers": (None, 0, -1),
        "rope_low_freq_factor": _ONE,
        "rope_original_context_length": (None, 8192),
        "tie_word_embeddings": (None, False, True),
    },
)

GGUF = FieldList(
    used=frozenset(
        """
        general.architecture general.type general.alignment general.sampling.temp
        general.sampling.top_p
        llama.context_length llama.embedding_length llama.block_count llama.feed_forward_length
        llama.attention.head_count llama.attention.head_count_kv llama.attention.key_length
        llama.attention.value_length llama.attention.layer_norm_rms_epsilon llama.vocab_size
        llama.rope.dimension_count llama.rope.freq_base llama.rope.scaling.type
        llama.rope.scaling.factor llama.rope.scale_linear
        llama.rope.scaling.original_context_length
        split.no split.count split.tensors.count
        """.split()
    ),
    harmless=frozenset(
        """
        general.quantization_version general.file_type general.name general.author general.version
        general.organization general.finetune general.basename general.description
        general.quantized_by general.size_label general.license general.url general.doi
        general.uuid general.repo_url general.tags general.languages general.datasets
        general.license.name general.license.link general.source
        llama.tensor_data_layout llama.leading_dense_block_count llama.rope.scaling.finetuned
        llama.rope.scaling.yarn_beta_fast llama.rope.scaling.yarn_beta_slow
        llama.rope.scaling.yarn_log_multiplier
        tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens tokenizer.ggml.token_type
        tokenizer.ggml.token_type_count tokenizer.ggml.scores tokenizer.ggml.merges
        tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token tokenizer.ggml.add_sep_token
        tokenizer.ggml.add_space_prefix tokenizer.ggml.remove_extra_whitespaces
        tokenizer.ggml.precompiled_charsmap tokenizer.ggml.added_tokens
        tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id tokenizer.ggml.eot_token_id
        tokenizer.ggml.bos_token_ids tokenizer.ggml.eos_token_ids general.parameter_count
        tokenizer.ggml.eom_token_id tokenizer.ggml.unknown_token_id
        tokenizer.ggml.seperator_token_id tokenizer.ggml.separator_token_id
        tokenizer.ggml.padding_token_id tokenizer.ggml.cls_token_id tokenizer.ggml.mask_token_id
        tokenizer.ggml.fim_pre_token_id tokenizer.ggml.fim_suf_token_id
        tokenizer.ggml.fim_mid_token_id tokenizer.ggml.fim_pad_token_id
        tokenizer.ggml.fim_rep_token_id tokenizer.ggml.fim_sep_token_id
        tokenizer.ggml.prefix_token_id tokenizer.ggml.suffix_token_id
        tokenizer.ggml.middle_token_id tokenizer.huggingface.json tokenizer.rwkv.world
        tokenizer.chat_template tokenizer.chat_templates
        """.split()
    ),
    neutral={
        "llama.expert_count": _OFF,
        "llama.expert_used_count": _OFF,
        "llama.use_parallel_residual": (None, False),
        "llama.attention.causal": (None, True),
        "llama.attention.sliding_window": _OFF,
        "llama.attention.scale": _OFF,
        "llama.attention.output_scale": _OFF,
        "llama.attention.clamp_kqv": _OFF,
        "llama.attention.max_alibi_bias": _OFF,
        "llama.attn_logit_softcapping": _OFF,
        "llama.final_logit_softcapping": _OFF,
        "llama.logit_scale": (None, 0, 1.0),
        "llama.residual_scale": (None, 0, 1.0),
        "llama.embedding_scale": (None, 0, 1.0),
        "llama.pooling_type": _OFF,
        "llama.swin_norm": (None, False),
        "llama.rope.scaling.attn_factor": (None, 1.0),
        "llama.rope.scaling.yarn_attn_factor": (None, 1.0),
        "llama.rope.scaling.yarn_ext_factor": (None, -1.0, 0.0),
        "llama.rope.scaling.alpha": (None, 0.0),
        "llama.nextn_predict_layers": _OFF,
    },
    harmless_prefixes=(
        "general.base_model.",
        "general.dataset.",
        "general.source.",
        "general.base_models.",
        "tokenizer.chat_template.",
        "quantize.",
        "imatrix.",
        "training.",
        "mradermacher.",
    ),
)

"""What cptool knows of the metadata of a GGUF file."""

from cptool.checkpoint.known_fields import OFF, FieldList
from cptool.model.architectures.family import Family

# Fields of any file.
_USED = frozenset(
    """
    general.architecture general.type general.alignment general.sampling.temp general.sampling.top_p
    general.sampling.top_k general.sampling.min_p split.no split.count split.tensors.count
    """.split()
)
_HARMLESS = frozenset(
    """
    general.quantization_version general.file_type general.name general.author general.version
    general.organization general.finetune general.basename general.description general.quantized_by
    general.size_label general.license general.url general.doi general.uuid general.repo_url
    general.tags general.languages general.datasets general.license.name general.license.link
    general.source tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens
    tokenizer.ggml.token_type tokenizer.ggml.token_type_count tokenizer.ggml.scores
    tokenizer.ggml.merges tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token
    tokenizer.ggml.add_sep_token tokenizer.ggml.add_space_prefix
    tokenizer.ggml.remove_extra_whitespaces tokenizer.ggml.precompiled_charsmap
    tokenizer.ggml.added_tokens tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id
    tokenizer.ggml.eot_token_id tokenizer.ggml.bos_token_ids tokenizer.ggml.eos_token_ids
    general.parameter_count tokenizer.ggml.eom_token_id tokenizer.ggml.unknown_token_id
    tokenizer.ggml.seperator_token_id tokenizer.ggml.separator_token_id
    tokenizer.ggml.padding_token_id tokenizer.ggml.cls_token_id tokenizer.ggml.mask_token_id
    tokenizer.ggml.fim_pre_token_id tokenizer.ggml.fim_suf_token_id tokenizer.ggml.fim_mid_token_id
    tokenizer.ggml.fim_pad_token_id tokenizer.ggml.fim_rep_token_id tokenizer.ggml.fim_sep_token_id
    tokenizer.ggml.prefix_token_id tokenizer.ggml.suffix_token_id tokenizer.ggml.middle_token_id
    tokenizer.huggingface.json tokenizer.rwkv.world tokenizer.chat_template tokenizer.chat_templates
    """.split()
)
_UNAPPLIED = frozenset(
    f"general.sampling.{name}"
    for name in """
    sequence xtc_probability xtc_threshold penalty_last_n penalty_repeat mirostat
    mirostat_tau mirostat_eta
    """.split()
)

# Fields of the model, whose keys begin with its architecture.
_MODEL_USED = """
    context_length embedding_length block_count feed_forward_length attention.head_count
    attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon vocab_size rope.dimension_count rope.freq_base
    rope.scaling.type rope.scaling.factor rope.scale_linear rope.scaling.original_context_length
    rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.scaling.attn_factor
    rope.scaling.yarn_attn_factor rope.scaling.yarn_log_multiplier
    """.split()
_MODEL_HARMLESS = """
    tensor_data_layout leading_dense_block_count rope.scaling.finetuned
    """.split()
_MODEL_NEUTRAL = {
    "expert_count": OFF,
    "expert_used_count": OFF,
    "use_parallel_residual": (None, False),
    "attention.causal": (None, True),
    "attention.sliding_window": OFF,
    "attention.scale": OFF,
    "attention.output_scale": OFF,
    "attention.clamp_kqv": OFF,
    "attention.max_alibi_bias": OFF,
    "attn_logit_softcapping": OFF,
    "final_logit_softcapping": OFF,
    "logit_scale": (None, 0, 1.0),
    "residual_scale": (None, 0, 1.0),
    "embedding_scale": (None, 0, 1.0),
    "pooling_type": OFF,
    "swin_norm": (None, False),
    "rope.scaling.yarn_ext_factor": (None, -1.0, 0.0),
    "rope.scaling.alpha": (None, 0.0),
    "nextn_predict_layers": OFF,
}


def known_metadata(family: Family) -> FieldList:
    """Return the fields of files of a family, with whose name the keys of its models begin."""
    architecture = family.gguf
    used = {entry.gguf for entry in family.numbers if entry.gguf is not None}
    if family.is_windowed is not None:
        used |= {"attention.sliding_window", "attention.sliding_window_pattern"}
    if family.grows_queries:
        used.add("attention.temperature_scale")
    used.update(name for name in family.flags if name in _MODEL_NEUTRAL)
    if family.window_theta is not None:
        used.add("rope.freq_base_swa")
    return FieldList(
        used=_USED | {f"{architecture}.{name}" for name in used.union(_MODEL_USED)},
        harmless=_HARMLESS | {f"{architecture}.{name}" for name in _MODEL_HARMLESS},
        neutral={
            f"{architecture}.{name}": values
            for name, values in _MODEL_NEUTRAL.items()
            if name not in used
        },
        unapplied=_UNAPPLIED,
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

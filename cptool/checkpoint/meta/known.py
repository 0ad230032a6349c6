"""What cptool knows of the fields of a `params.json`."""

from cptool.checkpoint.known_fields import OFF, ONE, FieldList

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
        "sliding_window": OFF,
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
        "rope_low_freq_factor": ONE,
        "rope_original_context_length": (None, 8192),
        "tie_word_embeddings": (None, False, True),
    },
)

"""Small GGUF files, written by the gguf package."""

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

HIDDEN, FFN, VOCAB, HEADS, KV_HEADS = 256, 512, 32, 8, 2
HEAD_DIM = HIDDEN // HEADS
SHAPES = {
    "token_embd": (VOCAB, HIDDEN),
    "output_norm": (HIDDEN,),
    "output": (VOCAB, HIDDEN),
    "blk.0.attn_norm": (HIDDEN,),
    "blk.0.attn_q": (HIDDEN, HIDDEN),
    "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HIDDEN),
    "blk.0.ffn_norm": (HIDDEN,),
    "blk.0.ffn_gate": (FFN, HIDDEN),
    "blk.0.ffn_up": (FFN, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, FFN),
}


def write(path, tensors=None, types=None, architecture="llama", without=(), every=0, **metadata):
    """A one-layer Llama; `types` names how a tensor is encoded, `metadata` adds or replaces keys.
    With `every`, it is written to several files of so many tensors.

    Given arrays of uint8 are written as they are.
    """
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture, split_max_tensors=every)
    fields = {
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        **metadata,
    }
    for key, value in fields.items():
        if value is not None:
            kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kind[bool] = writer.add_bool
            kind.get(type(value), writer.add_array)(key, value)
    given = {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    for name, value in {**given, **(tensors or {})}.items():
        if name in without:
            continue
        kind = GGMLQuantizationType[(types or {}).get(name, "F32")]
        raw = value if value.dtype == np.uint8 else quantize(value, kind)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(rows, heads):
    """Half-split rotary rows to interleaved ones, as converters to GGUF do."""
    return np.ascontiguousarray(
        rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
    )

"""What the names of tensors reveal about a model that is not a plain one."""

import re
from collections.abc import Iterable
from pathlib import Path

from cptool.checkpoint.fields import shown
from cptool.errors import UserError
from cptool.model.architectures.family import Family

CONVERT = "convert the checkpoint to safetensors with transformers' save_pretrained"
MERGE = "merge it into its base model first, with peft's merge_and_unload, and give the result"
UNQUANTISED = "use its unquantised checkpoint, or a GGUF of it"

# What the name of a tensor reveals, in the order in which it is searched for.
_TENSORS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), what, remedy)
    for pattern, what, remedy in (
        (
            r"\.lora_[AB]\b|\.lora_[ab]\b|\.lora_(?:embedding|magnitude)|\bada_|\.ia3_l\b|\.hada_w",
            "weights of an adapter",
            MERGE,
        ),
        (r"^base_model\.model\.", "weights of an adapter", MERGE),
        (r"\.(?:qweight|qzeros|g_idx)$", "quantised weights (GPTQ or AWQ)", UNQUANTISED),
        (
            r"\.(?:absmax|quant_map|quant_state\.[\w.]+|SCB|weight_format|nested_absmax)$",
            "quantised weights (bitsandbytes)",
            UNQUANTISED,
        ),
        (
            r"\.weight_(?:packed|shape|zero_point|global_scale)$",
            "quantised weights (compressed-tensors)",
            UNQUANTISED,
        ),
        (
            r"\.(?:weight_scale|weight_scale_inv|input_scale|output_scale|k_scale|v_scale"
            r"|activation_scale|scale_inv|act_scale)$",
            "quantised weights (FP8 or INT8 with scales)",
            UNQUANTISED,
        ),
        (r"\.(?:W_q|W_nbits|meta\.scale|meta\.zero)$", "quantised weights (HQQ)", UNQUANTISED),
        (r"\.(?:codes|codebooks|Qidxs|trellis|SV|SU)$", "quantised weights", UNQUANTISED),
        (r"\.(?:scales|biases|zeros|qscales)$", "quantised weights", UNQUANTISED),
        (
            r"(?:^|\.)(?:score|classifier|cls|v_head\.\w+|value_head|reward_head|regression_head)\.",
            "a head that scores or classifies, as reward models have",
            "use a checkpoint that generates text",
        ),
        (
            r"\.(?:experts|block_sparse_moe|shared_expert)\.|_exps\.",
            "a mixture of experts",
            "use a checkpoint of a dense Llama",
        ),
        (
            r"(?:^|\.)(?:vision_tower|vision_model|multi_modal_projector|mm_projector|image_newline"
            r"|audio_tower|cross_attn)",
            "a model of images or sound with a Llama inside",
            "use a checkpoint of only the Llama",
        ),
        (
            r"\.(?:qkv_proj|gate_up_proj|W_pack|query_key_value|wqkv|Wqkv|c_attn)\.",
            "projections joined into one matrix, as other architectures have",
            "use a checkpoint of the Llama architecture",
        ),
        (
            r"^(?:module|_orig_mod|_fsdp_wrapped_module|transformer|gpt_neox|decoder)\.",
            "names of another library or of a training run",
            CONVERT,
        ),
    )
)

_QUANTISERS = ("quantize_config.json", "quant_config.json", "hqq_config.json", "qmodel.pt")


def check_names(path: Path, found: Iterable[str], family: Family) -> None:
    """Refuse tensors whose Hugging Face names belong to a known kind that is no plain model."""
    names = [name for name in found if not family.knows(name)]
    for pattern, what, remedy in _TENSORS:
        if name := next((name for name in names if pattern.search(name)), None):
            beside = next((file for file in _QUANTISERS if (path / file).is_file()), None)
            said = f", as {beside} says" if beside and "quantised" in what else ""
            raise UserError(
                f"{path}: {what} ({shown(name)}{said}), which cptool does not read; {remedy}"
            )

"""Kinds of models that cptool does not compute, by the names that files give them."""

import re

_MIXTURE = "a mixture of experts, of which cptool computes none"
_RECURRENT = "a model with recurrent layers, of which cptool computes none"
_MEDIA = "a model of images or sound, of which cptool computes none"

# Names of transformers and of llama.cpp, which differ in their punctuation alone but for a few.
_NAMES = {
    _MIXTURE: """
        mixtral qwen2_moe qwen3_moe qwen3_5_moe phimoe olmoe flex_olmo granitemoe granitemoeshared
        granitemoehybrid granitemoe_swa deepseek deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
        deepseek2 deepseek32 gpt_oss llama4 llama4_text dbrx jetmoe arctic grok ernie4_5_moe
        glm4_moe glm4_moe_lite minimax minimax_m2 hunyuan_v1_moe hunyuan_moe bailingmoe bailingmoe2
        dots1 lfm2_moe lfm2moe afmoe exaone_moe smallthinker llada_moe solar_open kimi_linear
        """,
    _RECURRENT: """
        mamba mamba2 falcon_mamba jamba zamba zamba2 bamba qwen3_next qwen3_5 qwen35 qwen35moe
        falcon_h1 lfm2 nemotron_h recurrent_gemma rwkv rwkv6 rwkv7 xlstm granitehybrid olmo_hybrid
        """,
    _MEDIA: """
        llava llava_next mllama qwen2_vl qwen2_5_vl qwen3_vl qwen2vl qwen3vl qwen2_audio idefics3
        smolvlm phi4_multimodal paligemma internvl pixtral voxtral gemma3n
        """,
}
_KINDS = {
    re.sub(r"[_-]", "", name): kind for kind, names in _NAMES.items() for name in names.split()
}


def kind_of(model_type: object) -> str:
    """Return what a `model_type`, or an architecture in GGUF, is a name of, "" if it is unknown."""
    if not isinstance(model_type, str):
        return ""
    return _KINDS.get(re.sub(r"[_-]", "", model_type.lower()), "")

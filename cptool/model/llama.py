"""The forward of a Llama-like model over the tokens of one rank.

The model sees a flat list of tokens with their absolute positions. It mixes tokens only through
the `attend` callable that it is given, so batches, caches and other ranks are up to the caller.
Which parameters it has is read from the table of its family (`cptool.model.architectures`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from cptool.model.architectures.registry import find_family
from cptool.model.attention import Attend, Attention
from cptool.model.config import LlamaConfig
from cptool.model.layer import Passed, decoder_layer
from cptool.model.linear import Embedding, Linear
from cptool.model.norms import Float32RMSNorm, norm_of
from cptool.model.rope import inverse_frequencies, rotary_tables, window_frequencies
from cptool.ops.fp8 import Fp8Weight
from cptool.ops.linear import linear
from cptool.ops.rows import independent_rows
from cptool.ops.stored import StoredWeight

_NOTHING = nullcontext()


class Llama(nn.Module):
    """A decoder, or the share of one that a rank of a tensor-parallel group holds.

    With `tp` > 1 the attention heads and the feed-forward width are divided by it, and the results
    of the row-parallel `o_proj` and `down_proj` are partial sums, which
    `cptool.parallel.tensor_parallel` adds up. Parameters are uninitialised: `cptool.engine.weights`
    puts a checkpoint's tensors in their place. The caller runs the model under
    `torch.inference_mode()`.

    span: opens a context around the layer of a number, such as a span of a trace.
    """

    span: Callable[[int], AbstractContextManager[None]] | None = None

    def __init__(
        self, config: LlamaConfig, device: torch.device | str = "meta", tp: int = 1
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, device)
        self.layers = nn.ModuleList(
            decoder_layer(config, layer, tp, device) for layer in range(config.num_hidden_layers)
        )
        family = find_family(config.family)
        self.norm = norm_of(family)(config.hidden_size, config.rms_norm_eps, device)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, device)
        )
        self.inverse_frequencies: torch.Tensor
        self.register_buffer("inverse_frequencies", inverse_frequencies(config), persistent=False)
        self.window_frequencies: torch.Tensor | None
        self.register_buffer("window_frequencies", window_frequencies(config), persistent=False)
        self._embeds_by_root = family.embeds_by_root
        self._rotary_factor = 1.0
        if config.rope_scaling is not None:
            self._rotary_factor = config.rope_scaling.attention_factor
        self.requires_grad_(False)

    def float32_parameters(self) -> list[str]:
        """Return the names of the parameters that are float32 in a model of any type."""
        return [
            f"{name}.weight"
            for name, module in self.named_modules()
            if isinstance(module, Float32RMSNorm)
        ]

    def place_frequencies(self, device: torch.device | str) -> None:
        """Move the frequencies of the rotary embedding, which are computed on the CPU."""
        self.inverse_frequencies = self.inverse_frequencies.to(device)
        if self.window_frequencies is not None:
            self.window_frequencies = self.window_frequencies.to(device)

    def keep_stored(self, name: str, weight: StoredWeight) -> None:
        """Have the matrix `name` of this model be `weight`, in place of a parameter."""
        module = self.get_submodule(name.rpartition(".")[0])
        del module.weight
        vars(module)["weight"] = weight  # a plain attribute: it is no tensor

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one decode step reads: all matrices, of the embedding as the output
        matrix alone.
        """
        return sum(weight.nbytes for weight in self._step_matrices())

    @property
    def weight_size(self) -> float | None:
        """Bytes per element of these matrices; None unless some stay as a file stores them."""
        matrices = self._step_matrices()
        if not any(isinstance(weight, StoredWeight) for weight in matrices):
            return None
        return self.step_bytes / sum(weight.shape.numel() for weight in matrices)

    @property
    def feed_forward(self) -> str | None:
        """Type of the products of feed-forward layers where it is not that of the others."""
        modules = self.layers[0].modules()
        fp8 = any(isinstance(m, Linear) and isinstance(m.weight, Fp8Weight) for m in modules)
        return "float8" if fp8 else None

    @property
    def independent_rows(self) -> int:
        """Up to how many rows of a forward none changes the bits of another, attention aside."""
        return independent_rows(self.norm.weight.dtype, self._step_matrices())

    def _step_matrices(self) -> list[torch.Tensor | StoredWeight]:
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        matrices = [m.weight for m in self.layers.modules() if isinstance(m, Linear)]
        return [*matrices, head.weight]

    @property
    def num_heads(self) -> int:
        """Query heads that this model projects to."""
        attention = self.layers[0].self_attn
        assert isinstance(attention, Attention)
        return attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads that this model projects to, and that its caches hold."""
        attention = self.layers[0].self_attn
        assert isinstance(attention, Attention)
        return attention.num_kv_heads

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        *,
        passed: Passed | None = None,
    ) -> torch.Tensor:
        """Return the residual stream after the last layer, before the norm that `logits` applies.

        `tokens` int64 [T] and their absolute `positions` int32 [T]; T may be 0, and `attend` is
        called once for every layer all the same. Returns [T, hidden] in the type of the weights.
        `passed` is for prompts, whose layers take long.
        """
        return self.through(self.embedded(tokens), positions, attend, passed=passed)

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the residual stream before the first layer, [T, hidden], of `tokens` int64 [T]."""
        hidden = self.embed_tokens(tokens)
        if self._embeds_by_root:
            hidden *= torch.tensor(self.config.hidden_size**0.5, dtype=hidden.dtype).item()
        if (multiplier := self.config.embedding_multiplier) != 1:
            hidden *= multiplier
        return hidden

    def through(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        *,
        layers: range | None = None,
        passed: Passed | None = None,
    ) -> torch.Tensor:
        """Take the residual stream `hidden` [T, hidden] through some layers, by default all of
        them, in place, and return it. The other parameters are those of `forward`.
        """
        tables = local = rotary_tables(positions, self.inverse_frequencies, self._rotary_factor)
        if self.window_frequencies is not None:
            local = rotary_tables(positions, self.window_frequencies)
        attend = self._growing(attend, positions, hidden.dtype)
        for number in range(len(self.layers)) if layers is None else layers:
            cos, sin = tables if self.config.window(number) is None else local
            with _NOTHING if self.span is None else self.span(number):
                self.layers[number](hidden, cos, sin, attend, passed=passed)
        return hidden

    def _growing(self, attend: Attend, positions: torch.Tensor, dtype: torch.dtype) -> Attend:
        """Return `attend` with queries multiplied as `RopeScaling.query_beta` has it."""
        scaling = self.config.rope_scaling
        if scaling is None or scaling.query_beta is None:
            return attend
        turns = (positions.to(torch.float32) / scaling.original_context).floor()
        factors = (1 + scaling.query_beta * torch.log(1 + turns)).to(dtype)[:, None, None]

        def grown(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(layer, q.mul_(factors), k, v)

        return grown

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next token after each row [R, hidden] of a forward's result.

        They are float32 [R, vocabulary].
        """
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        scores = linear(self.norm(hidden), head.weight)
        if (divisor := self.config.logits_divisor) != 1:
            scores /= divisor
        if (cap := self.config.logits_cap) is not None:
            scores = scores.div_(cap).tanh_().mul_(cap)
        scores = scores.to(torch.float32)
        for first, stop in self.config.image_ids:
            scores[:, first:stop] = torch.finfo(torch.float32).min
        return scores

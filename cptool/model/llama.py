"""The forward of a Llama-like model over the tokens of one rank.

The model sees a flat list of tokens with their absolute positions. It mixes tokens only through
the `attend` callable that it is given, so batches, caches and other ranks are up to the caller.
Which parameters it has is read from the table of its family (`cptool.model.architectures`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn import functional

from cptool.model.config import LlamaConfig
from cptool.model.product import Product
from cptool.model.rope import inverse_frequencies, rotary_tables
from cptool.model.row_limits import ROWS_AT_ONCE, ROWS_AT_ONCE_CPU
from cptool.model.shares import layer_shapes
from cptool.ops import fused_layer
from cptool.ops.elementwise import add_rms_norm_, rms_norm, rotate_, swiglu_
from cptool.ops.linear import linear
from cptool.ops.stored import StoredWeight

Shapes = dict[str, tuple[int, ...]]
"""Shape of every parameter of a layer, by its name within the layer."""

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""attend(layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, Hq, D] in the type of q.

q and k are rotated already. All three are strided views of one projection, and stay valid only
until the call returns. Scores are scaled by `config.scale`.
"""

Passed = Callable[[int, int], bool]
"""passed(done, rows) is called as the feed-forward of a layer has passed `done` of its `rows`; it
returns whether to go on. If not, the result is undefined."""


_NOTHING = nullcontext()


def _row_slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    rows = tensors[0].shape[0]
    at_once = ROWS_AT_ONCE_CPU if tensors[0].is_cpu else ROWS_AT_ONCE
    if rows <= at_once:
        return zip(*((tensor,) for tensor in tensors), strict=True)
    return zip(*(tensor.tensor_split(-(-rows // at_once)) for tensor in tensors), strict=True)


class Linear(Product, nn.Linear):
    """A product with a weight matrix, without bias."""

    def __init__(self, width: int, out: int, device: torch.device | str) -> None:
        super().__init__(width, out, bias=False, device=device)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight)


class BiasedLinear(Linear):
    """A product with a weight matrix, plus a bias."""

    def __init__(self, width: int, out: int, device: torch.device | str) -> None:
        super().__init__(width, out, device)
        self.bias = nn.Parameter(torch.empty(out, device=device))

    def product(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight).add_(self.bias)


def _projection(shapes: Shapes, name: str, device: torch.device | str) -> Linear:
    """Return the linear layer `name` of a decoder layer, with a bias if the family has one."""
    out, width = shapes[f"{name}.weight"]
    kind = BiasedLinear if f"{name}.bias" in shapes else Linear
    return kind(width, out, device)


class Embedding(nn.Module):
    """A row of the weights for each token."""

    def __init__(self, tokens: int, width: int, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width, device=device))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor | StoredWeight = self.weight
        if isinstance(weight, StoredWeight):
            return weight.gather(tokens)
        return functional.embedding(tokens, weight)


class RMSNorm(nn.Module):
    """`cptool.ops.elementwise.rms_norm`, the order of operations of `transformers`."""

    def __init__(self, size: int, eps: float, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def after_adding(self, hidden: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """Return the norm of hidden + added; the sum replaces `hidden`."""
        return add_rms_norm_(hidden, added, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention: query head i reads key-value head i // (Hq / Hkv)."""

    def __init__(
        self, head_dim: int, layer: int, shapes: Shapes, device: torch.device | str
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim
        self.qkv_proj = _projection(shapes, "self_attn.qkv_proj", device)
        self.o_proj = _projection(shapes, "self_attn.o_proj", device)
        self.num_heads = self.o_proj.in_features // head_dim
        self.num_kv_heads = (self.qkv_proj.out_features // head_dim - self.num_heads) // 2

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        qkv = self.qkv_proj(x).view(x.shape[0], sum(sizes), self.head_dim)
        q, k, v = qkv.split(sizes, dim=1)
        for rows in _row_slices(qkv[:, : self.num_heads + self.num_kv_heads], cos, sin):
            rotate_(*rows)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))

    def without_tokens(self, x: torch.Tensor, attend: Attend) -> None:
        """Take part in the attention of other ranks although `x` [0, hidden] has no row."""
        q, k, v = (
            x.new_empty(0, heads, self.head_dim)
            for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        )
        attend(self.layer, q, k, v)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shapes: Shapes, device: torch.device | str) -> None:
        super().__init__()
        self.gate_up_proj = _projection(shapes, "mlp.gate_up_proj", device)
        self.down_proj = _projection(shapes, "mlp.down_proj", device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(swiglu_(gate, up))


class DecoderLayer(nn.Module):
    """One pre-norm block; updates the residual stream in place."""

    def __init__(
        self, config: LlamaConfig, layer: int, tp: int, device: torch.device | str
    ) -> None:
        super().__init__()
        shapes = layer_shapes(config, tp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device)
        self.self_attn = Attention(config.head_dim, layer, shapes, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device)
        self.mlp = MLP(shapes, device)

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend,
        *,
        passed: Passed | None = None,
    ) -> None:
        if not hidden.shape[0]:
            self.self_attn.without_tokens(hidden, attend)
            return
        if self._fuses() and fused_layer.takes(hidden, *self._weights()):
            self._in_two_calls(hidden, cos, sin, attend)
            return
        attended = self.self_attn(self.input_layernorm(hidden), cos, sin, attend)
        done = 0
        for rows, added in _row_slices(hidden, attended):
            rows += self.mlp(self.post_attention_layernorm.after_adding(rows, added))
            done += rows.shape[0]
            if passed is not None and not passed(done, hidden.shape[0]):
                return

    def _in_two_calls(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> None:
        attention, mlp = self.self_attn, self.mlp
        before, after = self.input_layernorm, self.post_attention_layernorm
        q, kv = attention.num_heads, attention.num_kv_heads
        qkv = fused_layer.before_attention(
            hidden,
            norm=before.weight,
            eps=before.eps,
            qkv=attention.qkv_proj.weight,
            cos=cos,
            sin=sin,
            rotated=q + kv,
        )
        attended = attend(attention.layer, *qkv.split((q, kv, kv), dim=1))
        fused_layer.after_attention_(
            hidden,
            attended,
            o=attention.o_proj.weight,
            norm=after.weight,
            eps=after.eps,
            gate_up=mlp.gate_up_proj.weight,
            down=mlp.down_proj.weight,
        )

    def _fuses(self) -> bool:
        """Return whether all products are plain, and none is timed or completed by a caller."""
        return all(type(module) is Linear and not module.observed for module in self._products())

    def _products(self) -> tuple[Linear, ...]:
        attention, mlp = self.self_attn, self.mlp
        return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj

    def _weights(self) -> tuple[fused_layer.Weight, ...]:
        return tuple(module.weight for module in self._products())


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
            DecoderLayer(config, layer, tp, device) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, device)
        )
        self.inverse_frequencies: torch.Tensor
        self.register_buffer("inverse_frequencies", inverse_frequencies(config), persistent=False)
        self.requires_grad_(False)

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
        hidden = self.embed_tokens(tokens)
        cos, sin = rotary_tables(positions, self.inverse_frequencies)
        for number, layer in enumerate(self.layers):
            with _NOTHING if self.span is None else self.span(number):
                layer(hidden, cos, sin, attend, passed=passed)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next token after each row [R, hidden] of a forward's result.

        They are float32 [R, vocabulary].
        """
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return linear(self.norm(hidden), head.weight).to(torch.float32)

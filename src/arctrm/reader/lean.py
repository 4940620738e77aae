"""The tiny reader's layers for inference alone: weights cast and joined once, no module in between.

Decoding one token is so little work that what surrounds the products costs more than they do. The
arithmetic is that of transformers' LLaMA layers in the reader's `dtype`; where keys and values are
kept, and which of them a token sees, is the caller's business. Nothing here is compiled, so layers
that are compiled for training stay as they are.

Legend: T tokens, D width, A heads, K head width, 12 grid tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.reader.grammar import choice_ids
from arctrm.reader.looping import Injection
from arctrm.reader.tiny import TinyReader

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries, keys, values), each [T, A, K] -> [T, A, K]."""


class _Layer(NamedTuple):
    before_attention: Tensor
    query_key_value: Tensor
    output: Tensor
    before_mlp: Tensor
    gate_up: Tensor
    down: Tensor


class Lean:
    """A copy of a tiny reader's weights as they are now; later changes do not reach it."""

    @torch.no_grad()
    def __init__(self, reader: TinyReader):
        self.reader, self.dtype = reader, reader.dtype
        llama, config = reader.llama.model, reader.config
        self.num_heads, self.head_width = config.num_heads, config.hidden_size // config.num_heads
        self.eps = float(reader.llama.config.rms_norm_eps)
        own = reader.layers.trained
        self.activation: Callable[[Tensor], Tensor] = own[0].mlp.act_fn
        self.layers = [self._layer(layer) for layer in own] * config.loops
        matrices = () if reader.injection is None else reader.injection.parameters()
        self.injected = [self._cast(matrix) for matrix in matrices]
        self.last_norm = self._cast(llama.norm.weight)
        self.grid_ids = torch.tensor(choice_ids(reader.grid_tokens), device=reader.device)
        head = reader.llama.lm_head
        self.head = self._cast(head.weight[self.grid_ids])
        self.bias = None if head.bias is None else self._cast(head.bias[self.grid_ids])

    @property
    def num_layers(self) -> int:
        """Layers that a token goes through, each with keys and values of its own."""
        return len(self.layers)

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        products = (attention.q_proj, attention.k_proj, attention.v_proj)
        return _Layer(
            self._cast(layer.input_layernorm.weight),
            self._cast(*(product.weight for product in products)),
            self._cast(attention.o_proj.weight),
            self._cast(layer.post_attention_layernorm.weight),
            self._cast(mlp.gate_proj.weight, mlp.up_proj.weight),
            self._cast(mlp.down_proj.weight),
        )

    def _cast(self, *weights: Tensor) -> Tensor:
        return torch.cat([weight.detach().to(self.dtype) for weight in weights])

    def condition(self, condition_R3: Tensor) -> Tensor:
        """The vectors [R, D] that are added to every token of each row."""
        return self.reader.condition(*condition_R3.unbind(1))

    def hidden(
        self, tokens_T: Tensor, positions_T: Tensor, condition_TD: Tensor, attend: Attend
    ) -> Tensor:
        """Hidden states [T, D] after the final norm."""
        llama = self.reader.llama.model
        x = (F.embedding(tokens_T, llama.embed_tokens.weight) + condition_TD).to(self.dtype)
        cos, sin = llama.rotary_emb(x, position_ids=positions_T[None])
        turn = cos[0, :, None], sin[0, :, None]
        source = Injection.source(x) if self.injected else x
        for number, layer in enumerate(self.layers):
            if self.injected:
                x = x + F.linear(source, self.injected[number])
            x = x + self._attention(number, layer, x, turn, attend)
            gate, up = F.linear(self._norm(x, layer.before_mlp), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(self.activation(gate) * up, layer.down)
        return self._norm(x, self.last_norm)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits float32 [T, 12] of the grid tokens."""
        return F.linear(hidden_TD, self.head, self.bias).float()

    def _attention(
        self, number: int, layer: _Layer, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        joined = F.linear(self._norm(x, layer.before_attention), layer.query_key_value)
        joined = joined.view(-1, 3 * self.num_heads, self.head_width)
        turned, value = joined.split((2 * self.num_heads, self.num_heads), dim=1)
        cos, sin = turn
        turned = turned * cos + _half_turn(turned) * sin
        query, key = turned.chunk(2, dim=1)
        return F.linear(attend(number, query, key, value).flatten(1), layer.output)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)

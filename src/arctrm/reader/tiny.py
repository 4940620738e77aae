"""The tiny reader: a `LlamaForCausalLM` from scratch, with 3-D rotary positions and conditioning.

The model is transformers' own; two things are put around it: its rotary module is swapped for one
that turns with column, row and part, and the vectors of task, dihedral and colour flag are added to
every token's embedding (mdlARC's economy: one vector per task instead of its demonstrations).

Legend: T tokens of a packed batch, B prompts, S tokens fed now, R rows (pairs), D width.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import StaticLayer

from arctrm.config.reader import ReaderConfig
from arctrm.data.views import NUM_DIHEDRALS
from arctrm.reader.attention import PACKED, Packing
from arctrm.reader.interface import CACHE, GridTokens
from arctrm.reader.looping import Injection, LoopedLayers
from arctrm.reader.tokens import GRID_TOKENS, INVERSE, PAD, SIDE, VOCABULARY, prompt_of
from arctrm.trm.model import Table

INIT_STD = 0.02
NUM_MOSAICS = 2
"""Ways of showing two pairs as one: one below the other, or beside it."""


class GridRotary(nn.Module):
    """Cosines and sines of packed positions: 3/8 of the angles turn with the column, 3/8 with the
    row, 2/8 with the part; takes the place of LLaMA's rotary module.
    """

    def __init__(self, head_width: int, base: float):
        super().__init__()
        part = head_width // 8
        self.widths = (head_width // 2 - part) // 2, head_width // 2 - part, part
        self.head_width, self.base = head_width, base

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tables [B, S, K] in the dtype of `x` for `position_ids` int64 [B, S]."""
        num_x, both, num_part = self.widths
        axes = (position_ids % SIDE, position_ids // SIDE % SIDE, position_ids // SIDE**2)
        angles = [
            axis[..., None].float() * self._frequencies(count, x.device)
            for axis, count in zip(axes, (num_x, both - num_x, num_part), strict=True)
        ]
        table = torch.cat(angles, dim=-1).repeat(1, 1, 2)  # LLaMA rotates the two halves of a head
        return table.cos().to(x.dtype), table.sin().to(x.dtype)

    def _frequencies(self, count: int, device: torch.device) -> Tensor:
        return self.base ** -(torch.arange(count, device=device, dtype=torch.float32) / count)


class TinyReader(nn.Module):
    """A reader of grids; `num_rows` task embeddings. Follows `reader.interface.GridReader`.

    `dtype` is the arithmetic of the layers; parameters are float32 in training. Where it is
    `checkpointed`, training keeps the input of each layer only.
    """

    def __init__(self, config: ReaderConfig, num_rows: int):
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.compiled = self.checkpointed = False
        width = config.hidden_size
        self.llama = LlamaForCausalLM(llama_config(config))
        self.injection = Injection(width, config.depth) if config.injection else None
        self.llama.model.layers = LoopedLayers(
            list(self.llama.model.layers), config.loops, self.injection
        )
        self.llama.config.num_hidden_layers = config.depth  # a cache has a place for every pass
        self.llama.model.rotary_emb = GridRotary(width // config.num_heads, config.rope_base)
        self.puzzle_emb = Table(torch.randn(num_rows, width) * INIT_STD)
        self.dihedral_emb = Table(torch.randn(NUM_DIHEDRALS, width) * INIT_STD)
        self.colour_flag_emb = Table(torch.randn(2, width) * INIT_STD)
        if config.inverse_share:
            self.inverse_emb = Table(torch.randn(num_rows, width) * INIT_STD)
        if config.scaling.share:
            self.scale_emb = Table(torch.randn(config.scaling.num_ways, width) * INIT_STD)
        if config.mosaic_share:
            self.mosaic_emb = Table(torch.randn(NUM_MOSAICS, width) * INIT_STD)

    @property
    def grid_tokens(self) -> GridTokens:
        """The ids that spell a grid."""
        return GRID_TOKENS

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return self.config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.dihedral_emb.weights.device

    @property
    def layers(self) -> LoopedLayers:
        """The decoder layers, run `loops` times."""
        layers = self.llama.model.layers
        assert isinstance(layers, LoopedLayers)
        return layers

    def compile_layers(self) -> None:
        """torch.compile of every layer, in place (the names of the weights stay)."""
        self.compiled = True
        for layer in self.layers.trained:
            layer.compile(dynamic=False)

    def condition(
        self,
        embedding_row: Tensor,
        dihedral: Tensor,
        colour_flag: Tensor,
        scale: Tensor | None = None,
        mosaic: Tensor | None = None,
    ) -> Tensor:
        """The vectors [R, D] that are added to every token of each row.

        `scale` numbers the ways in which grids are shown larger, `mosaic` those in which two pairs
        are shown as one, from 1; 0: as they are. A `colour_flag` of `INVERSE` or more takes the
        vector of the inverse task.
        """
        turn = self.dihedral_emb.weights.index_select(0, dihedral)
        both = turn + self.colour_flag_emb.weights.index_select(0, colour_flag % INVERSE)
        if scale is not None:
            both = both + self.scale_emb.or_zero(scale)
        if mosaic is not None:
            both = both + self.mosaic_emb.or_zero(mosaic)
        if not self.config.task_embedding:
            return both
        vectors: Tensor = self.puzzle_emb.weights
        if self.config.inverse_share:  # those of the inverse tasks stand behind
            embedding_row = embedding_row + (colour_flag >= INVERSE) * len(vectors)
            vectors = torch.cat((vectors, self.inverse_emb.weights))
        return both + vectors.index_select(0, embedding_row)

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        condition_TD: Tensor,
        packing: Packing,
        dropout: float = 0.0,
    ) -> Tensor:
        """Hidden states [T, D] after the final norm, of a packed batch.

        With `dropout`, such a share of what each layer adds is left out at random.
        """
        llama = self.llama.model
        with self._arithmetic():
            # A product with one-hot rows: its gradient is a product too, not a contended scatter.
            one_hot = F.one_hot(tokens_T, VOCABULARY).to(self.dtype)
            cells = one_hot @ llama.embed_tokens.weight.to(self.dtype)
            x = (cells + condition_TD.to(self.dtype))[None]
            turned = llama.rotary_emb(x, position_ids=positions_T[None])
            told = {**self._told(x), "position_embeddings": turned, "packing": packing}
            for layer in self.layers.passes:
                y = self._run(layer, x, **told)
                x = x + F.dropout(y - x, dropout) if dropout else y
            return llama.norm(x)[0]

    def _told(self, embedded: Tensor) -> dict[str, Tensor]:
        """What the layers are told of the embedded tokens [..., D] beside their vectors."""
        return {} if self.injection is None else {"source": self.injection.source(embedded)}

    def _run(self, layer: nn.Module, x: Tensor, **given: Any) -> Tensor:
        """A layer, whose activations are computed anew for its gradient where `checkpointed`."""
        if not (self.checkpointed and torch.is_grad_enabled()):
            return layer(x, **given)
        # Nothing in a layer is random, and a CUDA graph could not hold the state of a generator.
        return checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False, **given)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, float32 [..., VOCABULARY], of hidden states."""
        with self._arithmetic():
            return self.llama.lm_head(hidden.to(self.llama.lm_head.weight.dtype)).float()

    def new_cache(self, length: int) -> StaticCache:
        """An empty cache for `length` tokens, padding included."""
        return StaticCache(config=self.llama.config, max_cache_len=length)

    def output_positions(self, start_B: Tensor, count: int, y_B: Tensor, x_B: Tensor) -> Tensor:
        """Packed positions of output tokens; `count` does not matter, row and column do."""
        return start_B + y_B * SIDE + x_B

    def logits(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        condition_B3: Tensor,
        attention_mask: Tensor,
        cache: StaticCache,
        keep: int = 0,
    ) -> Tensor:
        """Next-token logits, float32 [B, S or `keep`, 16]; the tokens are appended to the cache."""
        condition = self.condition(*condition_B3.unbind(1))[:, None]
        embedded = self.llama.model.embed_tokens(tokens_BS) + condition
        with self._uncompiled():
            hidden = self.read(embedded, positions_BS, attention_mask, cache)
        return self.head(hidden[:, -keep:])

    def read(
        self,
        embedded: Tensor,
        positions_BS: Tensor,
        attention_mask: Tensor,
        cache: StaticCache | None = None,
    ) -> Tensor:
        """Hidden states [B, S, D] after the final norm, of embeddings [B, S, D] with the condition
        in them; where there is a cache, the tokens are appended to it.
        """
        embedded = embedded.to(self.dtype)
        with self._arithmetic():
            out = self.llama.model(
                inputs_embeds=embedded,
                attention_mask=self.seen(positions_BS, attention_mask, cache),
                position_ids=positions_BS,
                use_cache=cache is not None,
                **{CACHE: cache},
                **self._told(embedded),
            )
        return out.last_hidden_state

    def seen(
        self, positions_BS: Tensor, attention_mask: Tensor, cache: StaticCache | None
    ) -> Tensor:
        """The attention mask that transformers is to use for new tokens at `positions_BS`.

        A causal one follows from `attention_mask` [B, tokens so far]. Where inputs are seen whole,
        the first tokens of a cache (None: all there are) get one of their own, bool [B, 1, S, K].
        """
        if not self.config.sees_inputs_whole or (cache is not None and cache.get_seq_length()):
            return attention_mask
        length = positions_BS.shape[1]
        room = length
        if cache is not None:
            layer = cache.layers[0]
            assert isinstance(layer, StaticLayer)
            room = layer.max_cache_len
        prompt = prompt_of(positions_BS)
        together = (prompt[:, :, None] == prompt[:, None]) & (prompt >= 0)[:, None]
        causal = torch.ones(length, length, dtype=torch.bool, device=prompt.device).tril()
        seen = (together | causal) & attention_mask.bool()[:, None]
        return F.pad(seen, (0, room - length))[:, None]

    def _stream_dtype(self) -> torch.dtype:
        """Of the residual stream: that of the weights."""
        return self.llama.lm_head.weight.dtype

    def _uncompiled(self) -> AbstractContextManager:
        """Layers compiled for packed training are not compiled again for every cache."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def _arithmetic(self) -> AbstractContextManager:
        """Autocast while the weights are wider than `dtype` (its cache would outlive a capture)."""
        if self._stream_dtype() == self.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)


def llama_config(config: ReaderConfig) -> LlamaConfig:
    """The LLaMA that a tiny reader is built on, with the layers of one time."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=config.hidden_size,
        intermediate_size=config.inner_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.longest_sequence,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=INIT_STD,
        attn_implementation=PACKED,  # type: ignore[call-arg]
    )

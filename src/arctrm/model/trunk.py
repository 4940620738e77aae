"""The trunk: one LLaMA, gone through several times, that reads (writes grids) and refines (TRM).

Its blocks are LLaMA's: RMS norm, rotary attention, SwiGLU, no bias. Three things are its own. The
blocks are looped (a universal transformer, arXiv 1807.03819). The vector that a token came with is
added again before every pass, by a matrix of that pass (input injection, arXiv 1909.01377; TRM does
so in every cycle). Rotary positions turn with column, row and part of the pair. A vector for the
task, one for the view and one for the scale are added to every token (mdlARC's economy: one vector
a task instead of its demonstrations).

One forward serves training, decoding and refining; what a token sees is a parameter. The reader
voice is `head`; the TRM voice is `own_head`, `halt_head`, `feedback`, `voice_emb`, `own_task_emb`
(added to the reader's vectors of the tasks), and, with `own_layers`, blocks that stand in its
passes for the last ones of the reader.

Legend: T tokens, R rows (sequences), D width, A heads, K head width, I inner width, V vocabulary.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arctrm.config import TrunkConfig
from arctrm.data.task import NUM_COLOURS
from arctrm.data.views import NUM_DIHEDRALS
from arctrm.model.attention import Seen, Spans, attend
from arctrm.model.layout import (
    CHOICES,
    DIHEDRAL,
    INVERSE,
    KEEPS_COLOURS,
    SCALE,
    SIDE,
    TASK,
    VOCABULARY,
)

INIT_STD = 0.02
EPS = 1e-6
HALT_BIAS = -5.0  # first halting logit, as in TRM: no row is done before the head has learned
END_OF_CHOICES = len(CHOICES) - 1  # all choices but the last are the first tokens
TASK_TABLES = ("task_emb", "inverse_emb", "own_task_emb")  # one row a task
# Of no use to the reader:
TRM_PARTS = ("own", "own_head", "own_task_emb", "halt_head", "feedback", "voice_emb")

Turn = tuple[Tensor, Tensor]  # cosines and sines, [T, 1, K] each, of the rotary positions


class Block(nn.Module):
    """A LLaMA decoder layer; q, k, v and gate, up are one matrix each."""

    def __init__(self, width: int, inner: int, num_heads: int):
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.input_norm = nn.Parameter(torch.ones(width))
        self.qkv_proj = _matrix(3 * width, width)
        self.o_proj = _matrix(width, width)
        self.post_norm = nn.Parameter(torch.ones(width))
        self.gate_up_proj = _matrix(2 * inner, width)
        self.down_proj = _matrix(width, inner)

    def forward(self, x: Tensor, turn: Turn, seen: Seen, layer: int = 0) -> Tensor:
        """[T, D] -> [T, D] in the dtype of `x`; `layer` counts passes, for a store."""
        joined = linear(_norm(x, self.input_norm), self.qkv_proj)
        joined = joined.view(-1, 3 * self.num_heads, self.head_width)
        cos, sin = turn
        if isinstance(seen, Spans) and seen.tiles is not None:
            from arctrm.model.kernels import tiled_attention  # there is no Triton without a GPU

            attended = tiled_attention(joined, cos, sin, *seen.tiles)[0]
        else:
            turned, value = joined.split((2 * self.num_heads, self.num_heads), dim=1)
            first, second = turned.chunk(2, dim=-1)
            quarter = torch.cat((-second, first), dim=-1)
            query, key = (turned * cos + quarter * sin).chunk(2, dim=1)
            attended = attend(seen, layer, query, key, value)
        x = x + linear(attended.flatten(1), self.o_proj)
        gate, up = linear(_norm(x, self.post_norm), self.gate_up_proj).chunk(2, dim=-1)
        return x + linear(F.silu(gate) * up, self.down_proj)


class Trunk(nn.Module):
    """All that is learned of the tiny reader and TRM; `num_tasks` task embeddings.

    `dtype` is the arithmetic of the blocks; parameters are float32 in training. `passes_z`: whether
    a supervision step takes back the states of the last, or the answer alone.
    """

    def __init__(
        self, config: TrunkConfig, num_tasks: int, num_scales: int = 0, *, passes_z: bool = True
    ):
        super().__init__()
        self.config, self.num_tasks, self.num_scales = config, num_tasks, num_scales
        self.passes_z = passes_z
        self.dtype = torch.float32
        width = config.hidden_size
        self.embed_tokens = _table(VOCABULARY, width)
        sizes = width, config.inner_size, config.num_heads
        self.layers = nn.ModuleList(Block(*sizes) for _ in range(config.num_layers))
        self.injections = _squares(config.depth if config.injection else 0, width)
        self.norm = nn.Parameter(torch.ones(width))
        self.head = _matrix(VOCABULARY, width)
        self.task_emb = _table(num_tasks, width)
        self.inverse_emb = _table(num_tasks, width)
        self.dihedral_emb = _table(NUM_DIHEDRALS, width)
        self.colours_emb = _table(2, width)
        self.scale_emb = _table(num_scales, width)
        self.own = _Named(Block(*sizes) for _ in range(config.own_layers))
        self.own_head = _matrix(NUM_COLOURS, width)
        self.own_task_emb = nn.Parameter(torch.zeros(num_tasks, width))
        self.halt_head = nn.Linear(width, 1)
        nn.init.zeros_(self.halt_head.weight)
        nn.init.constant_(self.halt_head.bias, HALT_BIAS)
        self.feedback = _squares(1, width)
        self.voice_emb = nn.Parameter(torch.zeros(width))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.device

    @property
    def width(self) -> int:
        """Width D of the hidden states."""
        return self.config.hidden_size

    def blocks(self, own: bool = False) -> list[nn.Module]:
        """The blocks of one loop: the reader's, or (`own`) TRM's."""
        shared = len(self.layers) - self.config.own_layers
        return [*self.layers[:shared], *self.own.layers] if own else [*self.layers]

    def trm_parameters(self) -> dict[str, nn.Parameter]:
        """Name to parameter, of those that the reader does not use."""
        return {n: p for n, p in self.named_parameters() if n.partition(".")[0] in TRM_PARTS}

    @torch.no_grad()
    def begin_trm(self) -> None:
        """Start TRM from the reader: its blocks, and its head, which tells colours apart; moving
        averages too.
        """
        given = [(self.own_head.weight, self.head.weight[:NUM_COLOURS])]
        for new, block in zip(self.own.layers[::-1], self.layers[::-1], strict=False):
            given += zip(new.parameters(), block.parameters(), strict=True)
        for parameter, value in given:
            for tensor in (parameter, getattr(parameter, "average", parameter)):
                tensor.copy_(value)

    def condition(self, rows: Tensor) -> Tensor:
        """Vectors [R, D] added to every token of each row; `rows` int64 [R, 5], see `Condition`."""
        tasks = torch.cat((self.task_emb, self.inverse_emb))
        vectors = tasks.index_select(0, rows[:, TASK] + rows[:, INVERSE] * self.num_tasks)
        vectors = vectors + self.dihedral_emb.index_select(0, rows[:, DIHEDRAL])
        vectors = vectors + self.colours_emb.index_select(0, rows[:, KEEPS_COLOURS])
        if not self.num_scales:
            return vectors
        none = self.scale_emb.new_zeros(1, self.width)
        return vectors + torch.cat((none, self.scale_emb)).index_select(0, rows[:, SCALE])

    def own_condition(self, rows: Tensor) -> Tensor:
        """The same in TRM's passes, with what says that it is TRM, and TRM's part of the task."""
        own = self.own_task_emb.index_select(0, rows[:, TASK])
        return self.condition(rows) + self.voice_emb + own

    def embed(self, tokens: Tensor, condition_TD: Tensor) -> Tensor:
        """Embedded tokens [T, D] in `dtype`, of ids int64 [T] or distributions over ids [T, V].

        Ids are multiplied as one-hot rows where a gradient is wanted: its gradient is a product
        too, not a contended scatter.
        """
        if tokens.ndim == 1 and not torch.is_grad_enabled():
            cells = F.embedding(tokens, self.embed_tokens).to(self.dtype)
        else:
            shown = F.one_hot(tokens, VOCABULARY) if tokens.ndim == 1 else tokens
            cells = shown.to(self.dtype) @ self.embed_tokens.to(self.dtype)
        return cells + condition_TD.to(self.dtype)

    def hidden(self, x_TD: Tensor, positions_T: Tensor, seen: Seen, *, own: bool = False) -> Tensor:
        """Hidden states [T, D], after the final norm, of embedded tokens at packed positions; by
        TRM's own blocks where it has some (`own`).
        """
        turn = self.rotary(positions_T)
        source = F.rms_norm(x_TD, x_TD.shape[-1:], eps=EPS).to(x_TD.dtype)
        x, blocks = x_TD, self.blocks(own)
        keeps_inputs_only = self.config.gradient_checkpointing and torch.is_grad_enabled()
        for number in range(self.config.depth):
            if self.config.injection:
                x = x + linear(source, self.injections.layers[number])
            block = blocks[number % len(blocks)]
            if keeps_inputs_only:  # nothing in a block is random
                given = (x, turn, seen, number)
                x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            elif isinstance(seen, tuple):  # one graph serves all loops of a compiled block
                x = block(x, turn, seen)
            else:
                x = block(x, turn, seen, number)
        return _norm(x, self.norm)

    @torch.no_grad()
    def rotary(self, positions_T: Tensor) -> Turn:
        """Cosines and sines in `dtype`: 3/8 of the angles turn with the column, 3/8 with the row,
        2/8 with the part.
        """
        half = self.width // self.config.num_heads // 2
        part = half // 4
        column = (half - part) // 2
        counts = column, half - part - column, part
        axes = (positions_T % SIDE, positions_T // SIDE % SIDE, positions_T // SIDE**2)
        angles = []
        for axis, count in zip(axes, counts, strict=True):
            powers = torch.arange(count, device=axis.device, dtype=torch.float32) / count
            angles.append(axis[:, None].float() * self.config.rope_base**-powers)
        table = torch.cat(angles, dim=-1).repeat(1, 2)[:, None]
        return table.cos().to(self.dtype), table.sin().to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of the reader voice, float32 [..., V]."""
        return linear(hidden, self.head).float()

    def grid_logits(self, hidden: Tensor) -> Tensor:
        """The same of the 12 choices that spell a grid, float32 [..., 12]."""
        weight = self.head.weight
        weight = torch.cat((weight[:END_OF_CHOICES], weight[CHOICES[-1] :][:1]))
        return F.linear(hidden, weight.to(hidden.dtype)).float()

    def compile_blocks(self) -> None:
        """torch.compile of every block, in place."""
        for block in (*self.layers, *self.own.layers):
            block.compile(dynamic=False)

    def holding(self, state: Mapping[str, Tensor]) -> "Trunk":
        """A trunk of this kind that holds the tensors of `state`, whatever number of tasks."""
        with torch.device("meta"):
            sizes = self.config, len(state["task_emb"]), self.num_scales
            other = Trunk(*sizes, passes_z=self.passes_z)
        other.load_state_dict(state, assign=True)
        return other

    @torch.no_grad()
    def cast(self, dtype: torch.dtype) -> "Trunk":
        """A frozen, uncompiled copy with the matrices of the blocks in `dtype`, for inference.

        Tables stay in their dtype, as does everything that is in `dtype` already: such tensors
        are shared, and later changes of them reach the copy.
        """
        state = {
            name: tensor.detach() if name.endswith("_emb") else tensor.detach().to(dtype)
            for name, tensor in self.state_dict().items()
        }
        other = self.holding(state)
        other.dtype = dtype
        for module in other.modules():  # a decoded token is so little work that look-ups count
            module.__dict__.update(module._parameters | module._modules)
        return other.requires_grad_(False).eval()


class _Named(nn.Module):
    """Modules whose names say that their matrices are optimised as those of `Trunk.layers`."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


def _squares(count: int, width: int) -> _Named:
    """Square matrices, zero at first."""
    named = _Named(_matrix(width, width) for _ in range(count))
    for weight in named.parameters():
        nn.init.zeros_(weight)
    return named


def llama_state(trunk: Trunk) -> dict[str, Tensor]:
    """Weights of transformers' `LlamaForCausalLM` with loops x num_layers layers: the same function
    without injection and condition, where `seen` is causal and positions turn as LLaMA's do.
    """
    state = {
        "model.embed_tokens.weight": trunk.embed_tokens,
        "model.norm.weight": trunk.norm,
        "lm_head.weight": trunk.head.weight,
    }
    for number in range(trunk.config.depth):
        block = trunk.layers[number % len(trunk.layers)]
        assert isinstance(block, Block)
        q, k, v = block.qkv_proj.weight.chunk(3)
        gate, up = block.gate_up_proj.weight.chunk(2)
        named: Iterable[tuple[str, Tensor]] = (
            ("self_attn.q_proj.weight", q),
            ("self_attn.k_proj.weight", k),
            ("self_attn.v_proj.weight", v),
            ("self_attn.o_proj.weight", block.o_proj.weight),
            ("mlp.gate_proj.weight", gate),
            ("mlp.up_proj.weight", up),
            ("mlp.down_proj.weight", block.down_proj.weight),
            ("input_layernorm.weight", block.input_norm),
            ("post_attention_layernorm.weight", block.post_norm),
        )
        state |= {f"model.layers.{number}.{name}": weight for name, weight in named}
    return {name: weight.detach().clone() for name, weight in state.items()}


def _matrix(num_rows: int, num_columns: int) -> nn.Linear:
    matrix = nn.Linear(num_columns, num_rows, bias=False)
    nn.init.normal_(matrix.weight, std=INIT_STD)
    return matrix


def _table(num_rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(num_rows, width) * INIT_STD)


def linear(x: Tensor, matrix: nn.Module) -> Tensor:
    """The product in the dtype of `x`."""
    assert isinstance(matrix, nn.Linear)
    weight, bias = matrix.weight, matrix.bias
    if weight.dtype == x.dtype:  # also casts that do nothing take time
        return F.linear(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, EPS)

"""TRM, the Tiny Recursive Model (arXiv 2510.04871): one supervision step on a packed batch.

The recursion fits on a page (`TRM.supervision_step`). Parameter names are those of the reference
implementation, so that its checkpoints load by name; the compact layout adds a dihedral code, a
colour flag and learned prefix slots.

Legend: T tokens of a packed batch, R rows (pairs) in it, P prefix slots, D width, V cell codes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arctrm.config.trm import TRMConfig
from arctrm.data.canvas import VOCABULARY
from arctrm.trm.layers import RecursiveLevel, Sequences, run_level, truncated_normal

Q_HEAD_BIAS = -5.0
"""The halting logit starts at a clear "not done" (reference implementation)."""


class Latents(NamedTuple):
    """The recurrent state of TRM."""

    z_H: Tensor
    """Answer latent [T, D]."""
    z_L: Tensor
    """Reasoning latent [T, D]."""


class Prediction(NamedTuple):
    """What a supervision step says."""

    logits: Tensor
    """float32 [T, V]; prefix tokens included (they carry no meaning)."""
    q_halt: Tensor
    """float32 [R]: logit that the decoded grid is right."""


TASK_TABLES = ("puzzle_emb.weights", "inverse_emb.weights")
"""Names that task embeddings have in every model: of the tasks, and of the inverse tasks."""


class Table(nn.Module):
    """A learned table of vectors; `weights` as the reference calls its task embeddings."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.weights = nn.Parameter(values)

    def or_zero(self, number: Tensor) -> Tensor:
        """The vectors [n, D] of numbers from 1 on; 0 has none, and adds nothing."""
        return F.pad(self.weights, (0, 0, 1, 0)).index_select(0, number)


class CellEmbedding(nn.Module):
    """The vectors of the cell codes, named as in the reference."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.embedding_weight = nn.Parameter(
            truncated_normal(VOCABULARY, hidden_size, std=hidden_size**-0.5)
        )


class TRM(nn.Module):
    """Recursive network, embeddings and heads; `num_rows` task embeddings.

    `level` is the function that runs one pass (`run_level`, or its compiled form); `dtype` is the
    arithmetic of the blocks. Parameters are always float32.
    """

    H_init: Tensor
    L_init: Tensor

    def __init__(self, config: TRMConfig, num_rows: int):
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.level: Callable[..., Tensor] = run_level
        width = config.hidden_size
        self.embed_tokens = CellEmbedding(width)
        self.puzzle_emb = Table(_initial_embeddings(config, num_rows))
        if config.layout == "compact":
            self.dihedral_emb = Table(truncated_normal(8, width, std=width**-0.5))
            self.colour_flag_emb = Table(truncated_normal(2, width, std=width**-0.5))
            self.slots = Table(
                truncated_normal(config.num_prefix_slots - 3, width, std=width**-0.5)
            )
        if config.scaling.share:
            num_ways = config.scaling.num_ways
            self.scale_emb = Table(truncated_normal(num_ways, width, std=width**-0.5))
        self.L_level = RecursiveLevel(config.num_layers, width, config.inner_size)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.q_head = nn.Linear(width, 2)
        with torch.no_grad():
            self.lm_head.weight.copy_(truncated_normal(VOCABULARY, width, std=width**-0.5))
            self.q_head.weight.zero_()
            self.q_head.bias.fill_(Q_HEAD_BIAS)
        self.register_buffer("H_init", truncated_normal(width, std=1.0))
        self.register_buffer("L_init", truncated_normal(width, std=1.0))

    def initial_latents(self, num_tokens: int) -> Latents:
        """Fresh latents [T, D] in the compute dtype."""
        shape = (num_tokens, self.config.hidden_size)
        return Latents(
            self.H_init.to(self.dtype).expand(shape), self.L_init.to(self.dtype).expand(shape)
        )

    def prefix(
        self,
        embedding_row: Tensor,
        dihedral: Tensor,
        colour_flag: Tensor,
        blank: bool = False,
        context: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Prefix slots [R, P, D] and the vector [R, D] that conditions every cell.

        `scale` [R] numbers the factors by which grids are shown larger, from 1; 0: as they are. Its
        vector is added to the dihedral code.

        `context` [R, C, D] is what a reader says of the task, in the units of the other slots;
        its slots are zero without it.

        Slot 0 is the task embedding; in the compact layout slots 1 and 2 hold the dihedral code
        and the flag "colours as in the task", the rest are learned. `blank` is the ablation that
        hides which task it is.
        """
        task = self.puzzle_emb.weights.index_select(0, embedding_row)
        if blank:
            task = torch.zeros_like(task)
        rows, slots = task.shape[0], self.config.num_prefix_slots
        if self.config.layout == "reference":
            padded = F.pad(task[:, None], (0, 0, 0, slots - 1))
            return self._with_context(padded, context), torch.zeros_like(task)
        turn = self.dihedral_emb.weights.index_select(0, dihedral)
        flag = self.colour_flag_emb.weights.index_select(0, colour_flag)
        if scale is not None:
            turn = turn + self.scale_emb.or_zero(scale)
        if self.config.task_embedding == "per_view":
            turn, flag = torch.zeros_like(turn), torch.zeros_like(flag)
        learned = self.slots.weights.expand(rows, -1, -1)
        prefix = torch.cat((torch.stack((task, turn, flag), dim=1), learned), dim=1)
        return self._with_context(prefix, context), (task + turn + flag) * float(
            self.config.condition_cells
        )

    def _with_context(self, slots_RPD: Tensor, context: Tensor | None) -> Tensor:
        if context is None:
            return F.pad(slots_RPD, (0, 0, 0, self.config.num_context_slots))
        return torch.cat((slots_RPD, context.to(slots_RPD.dtype)), dim=1)

    def embed(
        self, codes_T: Tensor, row_T: Tensor, first_token: Tensor, prefix: Tensor, condition: Tensor
    ) -> Tensor:
        """Input embeddings [T, D]: prefix slots, then cells, scaled by sqrt(D).

        `row_T` is the row of each token (tokens of no row point past the end), `first_token` [R]
        the place of each row's slot 0 (T or more: the row is not there).
        """
        num_tokens, num_slots = codes_T.shape[0], self.config.num_slots
        # A product with one-hot rows: its gradient is a product too, not a contended scatter.
        one_hot = F.one_hot(codes_T.long(), VOCABULARY).to(self.dtype)
        cells = one_hot @ self.embed_tokens.embedding_weight.to(self.dtype)
        row = row_T.clamp(max=condition.shape[0] - 1)
        cells = cells + condition.index_select(0, row).to(self.dtype)
        slot = first_token[:, None] + torch.arange(num_slots, device=codes_T.device)
        # One token more takes the slots of rows that are not there.
        place = torch.where(first_token[:, None] < num_tokens, slot, num_tokens).flatten()
        padded = F.pad(cells, (0, 0, 0, 1))
        embedded = padded.index_copy(0, place, prefix.to(self.dtype).flatten(0, 1))[:num_tokens]
        return embedded * self.config.hidden_size**0.5

    def supervision_step(
        self, latents: Latents, x_TD: Tensor, seq: Sequences, first_token: Tensor
    ) -> tuple[Latents, Prediction]:
        """H_cycles x L_cycles passes, all but the last H cycle without gradient (TRM, figure 3).

        `first_token` [R] is each row's slot 0, where the halting logit is read (T or more: the row
        is not there, its logit means nothing). The returned latents are detached.
        """
        weights = self.L_level.cast(self.dtype)
        z_H, z_L = latents

        def cycle(z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
            for _ in range(self.config.L_cycles):
                z_L = self._pass(z_L, z_H + x_TD, weights, seq)
            return self._pass(z_H, z_L, weights, seq), z_L

        with torch.no_grad():
            for _ in range(self.config.H_cycles - 1):
                z_H, z_L = cycle(z_H, z_L)
        z_H, z_L = cycle(z_H, z_L)
        return Latents(z_H.detach(), z_L.detach()), self.read_out(z_H, first_token)

    def read_out(self, z_H: Tensor, first_token: Tensor) -> Prediction:
        """Cell logits of every token and halting logit of every row, in float32."""
        logits = F.linear(z_H, self.lm_head.weight.to(z_H.dtype)).float()
        answer = z_H.index_select(0, first_token.clamp(max=z_H.shape[0] - 1))
        q = F.linear(answer, self.q_head.weight.to(z_H.dtype), self.q_head.bias.to(z_H.dtype))
        return Prediction(logits, q[:, 0].float())

    def _pass(self, z: Tensor, injection: Tensor, weights: list, seq: Sequences) -> Tensor:
        return self.level(z, injection, weights, seq, self.config.num_heads, self.config.qk_norm)


def _initial_embeddings(config: TRMConfig, num_rows: int) -> Tensor:
    """Zero, or one shared random vector for every row (so that each starts at the mean)."""
    width = config.hidden_size
    if config.task_embedding_init == "zero":
        return torch.zeros(num_rows, width)
    return truncated_normal(1, width, std=width**-0.5).repeat(num_rows, 1)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of the trunk and of the task embeddings."""
    total = sum(p.numel() for p in model.parameters())
    embeddings = sum(p.numel() for n, p in model.named_parameters() if n.endswith(TASK_TABLES))
    return {"trunk": total - embeddings, "task_embeddings": embeddings}

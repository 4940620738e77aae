"""The hybrid: a reader and a TRM joined by adapters; what `joint`, `eval` and `solve` share.

Three paths, each behind a configuration field. *Context*: what the reader has read becomes prefix
slots and initial latents of TRM. *Draft*: the reader's hidden state of each cell it wrote goes onto
that cell of TRM, which repairs the draft with attention in both directions. *Back*: TRM's latents
become a soft prefix after the reader's text, for the next attempt.

The carry starts from learned initial latents + what the adapters add, and context and draft are fed
again at every supervision step, so that the reader matters and gets gradient.

Legend: N reader tokens, S of them visible to a row, H width of the reader; T packed TRM tokens,
R rows (pairs), D width of TRM, C context slots.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from arctrm.adapters import (
    DraftAdapter,
    DraftCells,
    LatentToTextAdapter,
    TextToLatentAdapter,
    cell_table,
    place_hidden,
)
from arctrm.config.joint import CouplingConfig
from arctrm.config.reader import ReaderConfig
from arctrm.config.trm import TRMConfig
from arctrm.reader.hub import HubReader
from arctrm.reader.hub_module import HubModule
from arctrm.reader.tiny import INIT_STD, TinyReader
from arctrm.trm.layers import Sequences
from arctrm.trm.model import TRM, Latents, Prediction, Table
from arctrm.trm.packing import TokenMap

READER = "reader"
NO_CELL = -1
"""Kind of a reader token that is no cell of any row."""


def reader_name(number: int) -> str:
    """The readers of an ensemble by their numbers from 0: reader, reader2, reader3, ..."""
    return f"{READER}{number + 1}" if number else READER


class ReaderStates(NamedTuple):
    """What the reader has read, and what each row of TRM may see of it."""

    hidden: Tensor
    """[N, H]: after the final norm."""
    row: Tensor
    """int64 [N]: row whose cell the token is."""
    kind: Tensor
    """int64 [N]: adapters.draft.INPUT, OUTPUT (of a draft, never of an answer) or NO_CELL."""
    y: Tensor
    """int64 [N]: row of the cell in its grid."""
    x: Tensor
    """int64 [N]: column of the cell in its grid."""
    begin: Tensor
    """int64 [R]: first token of the row's sequence."""
    visible: Tensor
    """int64 [R]: tokens from there that the row may see: none of its own answer."""


class Start(NamedTuple):
    """What the adapters give to TRM's rows."""

    context: Tensor | None
    """[R, C, D]: prefix slots."""
    z_H: Tensor
    """[T, D]: added to the initial answer latent."""
    z_L: Tensor
    """[T, D]: added to the initial reasoning latent."""
    injection: Tensor
    """[T, D]: added to the input embedding at every supervision step."""


class Rows(NamedTuple):
    """Packed rows of TRM."""

    embedding: Tensor
    """int64 [R]: task embedding row."""
    dihedral: Tensor
    """int64 [R]"""
    colour_flag: Tensor
    """int64 [R]"""
    codes: Tensor
    """int64 [T]: cell codes of the inputs."""
    tokens: TokenMap
    seq: Sequences


class Hybrid(nn.Module):
    """Reader + adapters + TRM."""

    def __init__(
        self,
        reader: nn.Module,
        hidden_size: int,
        trm: TRM,
        config: CouplingConfig,
        embedding_scale: float = INIT_STD,
        ensemble: Sequence[TinyReader] = (),
    ):
        """`hidden_size` is the reader's width H, `embedding_scale` its embeddings' deviation.

        `ensemble`: more readers, which propose and judge beside the first and know the same tasks;
        nothing joins them to TRM.
        """
        super().__init__()
        self.ensemble = nn.ModuleList(ensemble)
        self.reader, self.trm, self.config = reader, trm, config
        self.hidden_size = hidden_size
        width = trm.config.hidden_size
        self.adapters = nn.ModuleDict()
        if config.context:
            self.adapters["context"] = TextToLatentAdapter(
                hidden_size,
                width,
                num_context_slots=config.num_context_slots,
                num_heads=config.adapter_heads,
            )
        if config.draft:
            self.adapters["draft"] = DraftAdapter(hidden_size, width)
        if config.back:
            self.adapters["back"] = LatentToTextAdapter(
                width,
                hidden_size,
                num_prefix=config.num_back_vectors,
                num_heads=config.adapter_heads,
                output_scale=embedding_scale,
            )

    @property
    def puzzle_emb(self) -> Table:
        """TRM's task embeddings (the reader has its own)."""
        return self.trm.puzzle_emb

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic of TRM's blocks."""
        return self.trm.dtype

    @property
    def closes_the_loop(self) -> bool:
        """Whether TRM's latents reach a next attempt of TRM: back to the reader, and from there."""
        return self.config.back and (self.config.context or self.config.draft)

    @property
    def tiny(self) -> TinyReader | None:
        """The reader, where it is a tiny one."""
        return self.reader if isinstance(self.reader, TinyReader) else None

    @property
    def hub(self) -> HubReader | None:
        """The reader, where it is a hub model."""
        return self.reader.hub if isinstance(self.reader, HubModule) else None

    @property
    def sequences(self) -> ReaderConfig:
        """What sequences the reader is shown."""
        assert isinstance(self.reader, TinyReader | HubModule)
        return self.reader.config

    def start(self, states: ReaderStates | None, tokens: TokenMap, longest: int) -> Start:
        """What the reader's states give to the rows; zeros where there is no reader.

        `longest` bounds the states that a row sees.
        """
        zero = self.trm.H_init.new_zeros(tokens.row.shape[0], self.trm.config.hidden_size)
        z_H, z_L, injection, context = zero, zero, zero, None
        if states is None:
            return Start(None, zero, zero, zero)
        is_cell = tokens.slot >= self.trm.config.num_slots
        with self.arithmetic():
            if "context" in self.adapters:
                adapter = cast(TextToLatentAdapter, self.adapters["context"])
                read = adapter.resample(*visible_states(states, longest))
                context = read.context
                z_H, z_L = adapter.gather(read, tokens.row, tokens.y, tokens.x, is_cell)
                injection = z_H + z_L  # the initial latents alone would get no gradient
            if "draft" in self.adapters:
                cells = self._draft(states, tokens, is_cell)
                z_H, z_L = z_H + cells.z_H, z_L + cells.z_L
                injection = injection + cells.injection
        # TRM scales its embeddings so, and training them makes them larger still (rms 24 in the
        # bundled TRM): unscaled, what the reader says would be drowned.
        return Start(context, z_H, z_L, injection * self.trm.config.hidden_size**0.5)

    def _draft(self, states: ReaderStates, tokens: TokenMap, is_cell: Tensor) -> DraftCells:
        num_rows = states.begin.shape[0]
        table = cell_table(states.row, states.kind, states.y, states.x, num_rows)
        placed = place_hidden(states.hidden, table, tokens.row, tokens.y, tokens.x, is_cell)
        return self.adapters["draft"](*placed)

    def refine(
        self, rows: Rows, start: Start, num_steps: int, blank: bool = False
    ) -> Iterator[tuple[Latents, Prediction]]:
        """As the function `refine`, of this TRM."""
        return refine(self.trm, rows, start, num_steps, blank)

    def soft_prefix(self, latents: Latents, tokens: TokenMap, num_rows: int) -> Tensor:
        """[R, P, H]: what TRM tells the reader for the next attempt, row by row."""
        is_cell = tokens.slot >= self.trm.config.num_slots
        with self.arithmetic():
            adapter = cast(LatentToTextAdapter, self.adapters["back"])
            return adapter.packed(latents.z_H, latents.z_L, tokens.row, num_rows, is_cell)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by part: reader, trm, context, draft, back."""
        modules = {"reader": self.reader, "trm": self.trm, **self.adapters}
        return {
            name: [p for p in module.parameters() if p.requires_grad]
            for name, module in modules.items()
        }

    def arithmetic(self) -> AbstractContextManager:
        """Autocast to TRM's compute dtype where it is narrower than the adapters' weights."""
        if self.trm.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.trm.H_init.device.type, self.trm.dtype, cache_enabled=False)


def refine(
    trm: TRM, rows: Rows, start: Start | None, num_steps: int, blank: bool = False
) -> Iterator[tuple[Latents, Prediction]]:
    """Latents and prediction after each of `num_steps` supervision steps.

    Without a `start` TRM is alone; `blank` is the ablation that hides which task it is.
    """
    x, latents = begin(trm, rows, start, blank)
    for _ in range(num_steps):
        latents, prediction = trm.supervision_step(latents, x, rows.seq, rows.tokens.first)
        yield latents, prediction


def begin(trm: TRM, rows: Rows, start: Start | None, blank: bool = False) -> tuple[Tensor, Latents]:
    """Input embedding [T, D] and latents of rows before their first step; see `refine`."""
    tokens = rows.tokens
    context = None if start is None else start.context
    prefix, condition = trm.prefix(rows.embedding, rows.dihedral, rows.colour_flag, blank, context)
    x = trm.embed(rows.codes, tokens.row, tokens.first, prefix, condition)
    latents = trm.initial_latents(tokens.row.shape[0])
    if start is not None:
        x = x + start.injection.to(x.dtype)
        z_H, z_L = latents.z_H + start.z_H.to(trm.dtype), latents.z_L + start.z_L.to(trm.dtype)
        latents = Latents(z_H, z_L)
    return x, latents


def empty_hybrid(
    reader: ReaderConfig,
    trm: TRMConfig,
    coupling: CouplingConfig,
    num_tasks: int,
    num_readers: int = 1,
) -> Hybrid:
    """An untrained hybrid of tiny readers, the first of them joined, and a TRM, all with
    `num_tasks` task embeddings.
    """
    joined = _joined_trm(trm, coupling, num_tasks)
    first, *others = (TinyReader(reader, num_tasks) for _ in range(num_readers))
    return Hybrid(first, reader.hidden_size, joined, coupling, ensemble=others)


def hub_hybrid(
    hub: HubReader,
    shown: ReaderConfig,
    trm: TRMConfig,
    coupling: CouplingConfig,
    num_tasks: int,
) -> Hybrid:
    """A hub reader, as it was loaded, with untrained adapters and an untrained TRM.

    `shown` says what sequences the reader is shown.
    """
    reader = HubModule(hub, shown)
    joined = _joined_trm(trm, coupling, num_tasks)
    return Hybrid(reader, hub.hidden_size, joined, coupling, reader.embedding_scale())


def _joined_trm(trm: TRMConfig, coupling: CouplingConfig, num_tasks: int) -> TRM:
    slots = coupling.num_context_slots if coupling.context else 0
    return TRM(trm.model_copy(update={"num_context_slots": slots}), num_tasks)


def visible_states(states: ReaderStates, longest: int) -> tuple[Tensor, Tensor]:
    """Hidden states [R, S, H] that each row may see, and the mask [R, S] of what is there."""
    place = torch.arange(longest, device=states.hidden.device)
    mask = place < states.visible[:, None]
    index = torch.where(mask, states.begin[:, None] + place, 0)
    return states.hidden[index], mask

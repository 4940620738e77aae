"""Training steps: each adds the gradient of one packed batch, in one voice of the trunk.

What a step touches has a fixed address and shape, so that a captured CUDA graph can replay it; what
cannot be captured is in `prepare`. `voice_steps` says which steps a run has, and when.

Legend: T tokens, R rows (pairs), D width.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from arctrm.config import JointConfig, PretrainConfig, TRMConfig
from arctrm.data.base_set import BaseSet
from arctrm.model.attention import BLOCK, Kernel
from arctrm.model.trm import supervision_steps
from arctrm.model.trunk import Trunk
from arctrm.reader.tiny import TinyReader
from arctrm.train.drafts import DraftPool
from arctrm.train.losses import HALT_WEIGHT, RowCounts, halting_loss, halting_mean, row_counts
from arctrm.train.refining import answer_cells, questions, start, with_wrong_colours
from arctrm.train.sequences import LENGTH, Batch, Sequences
from arctrm.train.source import PairSource

READER, TRM = VOICES = range(2)
# What `Step.counts` sums up for each voice, in this order: rows, sums over rows, and tokens.
OF_BOTH = ("rows", "cell_loss", "exact", "shape", "cell_accuracy", "attempts", "tokens")
COUNTS = (*OF_BOTH, "halt_loss", "trm_steps", "drafted", "draft_tokens", "written_loss")
OF_ANSWERS = ("loss", "exact_match", "shape_match", "cell_accuracy")  # of the reader, beside TRM's

FEW_ROWS, TOKENS_PER_ROW, TOKENS_PER_ROW_OF_MANY, SPARE = 32, 64, 280, 1.1
"""Room for sequences in a batch: one for 64 tokens up to 32; beyond, one for 280 tokens (attention
launches blocks for every one, used or not); in any case 1.1 times what the batch holds."""
SAMPLED = 4096  # sequences drawn to see how long they are


@dataclass(eq=False)
class Step:
    """Adds the gradient of one batch, of `num_tokens` with room for `num_sequences`."""

    trunk: Trunk
    sequences: Sequences
    num_tokens: int
    num_sequences: int
    _: KW_ONLY
    scale: float = 1.0  # of the gradient
    begin: float = 0.0  # part of the run (0..1) after which the step is made
    end: float = 1.0  # part of the run before which it is made; 1: to the end
    drafts: DraftPool | None = None
    keeper: bool = True  # of the steps that share drafts, the one that refreshes and saves them

    def __post_init__(self) -> None:
        device = self.sequences.device
        self.queue = self.sequences.draw(self.num_sequences)
        self.counts = torch.zeros(len(VOICES), len(COUNTS), device=device, dtype=torch.float64)

    def carry(self) -> dict[str, Tensor]:
        """What a resumed run needs, updated in place."""
        drafts = self.drafts.carry() if self.drafts and self.keeper else {}
        return {"queue": self.queue, "counts": self.counts} | drafts

    def prepare(self) -> None:
        """What comes before every call and cannot be captured: draft now and then."""
        if self.drafts and self.keeper:
            self.drafts.prepare()

    @torch.no_grad()
    def next_batch(self) -> Batch:
        """The next of the waiting sequences."""
        return self.sequences.next_batch(self.queue, self.num_tokens)

    def __call__(self) -> None:
        """Add the gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def count(
        self, voice: int, losses: RowCounts, row_T: Tensor, more: Mapping[str, Tensor] = {}
    ) -> None:
        """Add a batch; `row_T`: row of each token, `more`: other counts of rows."""
        own = {"rows": losses.real, "cell_loss": losses.loss, "attempts": losses.real}
        found = {**losses._asdict(), **own, "tokens": row_T < len(losses.real), **more}
        zero = torch.zeros((), device=self.counts.device)
        sums = [found.get(name, zero).sum().double() for name in COUNTS]
        self.counts[voice].add_(torch.stack(sums))


@dataclass(eq=False)
class ReaderStep(Step):
    """The reader voice: the next token of every output; a share `noise` of cells is wrong."""

    noise: float = field(default=0.0, kw_only=True)

    def __call__(self) -> None:
        """Add the gradient of one packed batch."""
        batch = self.next_batch()
        with torch.no_grad():
            cells = answer_cells(batch)
            tokens = with_wrong_colours(batch.tokens, cells, batch.row, self.noise)
        logits = self.trunk.logits(read(self.trunk, batch._replace(tokens=tokens)))
        losses = row_counts(logits, batch.labels, batch.row, len(batch.rows))
        (losses.mean * self.scale).backward()
        self.count(READER, losses, batch.row)


@dataclass(eq=False)
class TrmStep(Step):
    """The TRM voice: the colour of every answer cell, after each supervision step. Where it begins
    later than the run, it starts from the reader's head and blocks.
    """

    config: TRMConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        self.has_begun = torch.zeros((), dtype=torch.long)

    def carry(self) -> dict[str, Tensor]:
        """What a resumed run needs, updated in place."""
        return super().carry() | {"has_begun": self.has_begun}

    @torch.no_grad()
    def prepare(self) -> None:
        """Give TRM its start, once; draft now and then."""
        if self.begin and not self.has_begun:
            self.trunk.begin_trm()
        self.has_begun.fill_(1)
        super().prepare()

    def __call__(self) -> None:
        """Add the gradient of one packed batch: all supervision steps, each on its own."""
        batch = self.next_batch()
        with torch.no_grad():
            asked = questions(batch, self.sequences, self.config, self.drafts)
            has_states = self.config.aligned and self.drafts is not None
            state = start(self.trunk, asked, aligned=has_states)
        num_steps, num_rows = self.config.supervision_steps, len(batch.rows)
        taken = torch.zeros(num_rows, device=batch.row.device)
        going = torch.ones_like(taken)
        for prediction in supervision_steps(self.trunk, asked.rows, state, num_steps):
            losses = row_counts(prediction.logits, asked.labels, batch.row, num_rows)
            loss = losses.mean + halting_mean(prediction.q_halt, losses)
            (loss * self.scale / num_steps).backward()
            q_halt = prediction.q_halt.detach()
            taken, going = taken + going * losses.real, going * (q_halt <= 0)
        drafted = asked.drafted & losses.real
        length = batch.rows[:, LENGTH] - batch.prompts[:num_rows]
        more = {"trm_steps": taken, "drafted": drafted, "draft_tokens": drafted * length}
        more["halt_loss"] = halting_loss(q_halt, losses)
        self.count(TRM, losses, batch.row, more)


def read(trunk: Trunk, batch: Batch) -> Tensor:
    """The reader's hidden states [T, D] of a packed batch."""
    condition = trunk.condition(batch.condition).index_select(0, batch.own_row)
    return trunk.hidden(trunk.embed(batch.tokens, condition), batch.positions, batch.seen)


def metrics_of(counts: Tensor) -> dict[str, float]:
    """What is logged of `Step.counts`, summed over steps: the seven of the older pipeline first, of
    TRM if there is any; then the reader's come with the prefix `reader_`.
    """
    sums = [dict(zip(COUNTS, row, strict=True)) for row in counts.tolist()]
    trained = [voice for voice in (TRM, READER) if sums[voice]["rows"]] or [TRM]
    means, of_reader = _means(sums[trained[0]]), _means(sums[READER])
    return {
        **means,
        "examples": sum(own["rows"] for own in sums),
        "tokens": sum(own["tokens"] for own in sums),
        **{f"reader_{name}": of_reader[name] for name in OF_ANSWERS if len(trained) > 1},
    }


def _means(sums: dict[str, float]) -> dict[str, float]:
    mean = {name: sums[name] / max(sums["rows"], 1.0) for name in COUNTS}
    return {
        "loss": mean["cell_loss"] + HALT_WEIGHT * mean["halt_loss"],
        "exact_match": mean["exact"],
        "shape_match": mean["shape"],
        "cell_accuracy": mean["cell_accuracy"],
        "avg_attempts": mean["attempts"],
        "avg_trm_steps": mean["trm_steps"],
        "avg_reasoning_length": sums["draft_tokens"] / max(sums["drafted"], 1.0),
        **{name: mean[name] for name in ("cell_loss", "halt_loss")},
        "drafted_share": mean["drafted"],
    }


def voice_steps(
    config: PretrainConfig | JointConfig,
    trunk: Trunk,
    base: BaseSet,
    *,
    compiled: Kernel | None = None,
) -> list[Step]:
    """The steps of a run that trains the trunk in the voices of `config`. With both every optimiser
    step has a batch of each from `trm.begin` on, and before it whole batches of the reader.
    """
    # 1. Where the sequences of each voice come from.
    training, trm, noise = config.training, config.trm, config.reader.output_noise
    source, dtype = PairSource(base, config.data, config.seed, trunk.device), trunk.dtype
    share = config.reader.inverse_share
    reading = Sequences(source, dtype, inverse_share=share, compiled=compiled)
    refined = Sequences(source, dtype, whole=True, compiled=compiled)
    drafts = DraftPool(reading, trm, TinyReader(trunk)) if trm.draft_share else None
    # 2. Which part of the batch each voice has, and when.
    alone = {"reader": [(READER, 1.0, 0.0, 1.0)], "trm": [(TRM, 1.0, 0.0, 1.0)]}
    after, rest = trm.begin, 1 - trm.share
    both = [(READER, 1.0, 0.0, after), (READER, rest, after, 1.0), (TRM, trm.share, after, 1.0)]
    chosen = "trm" if config.llama_frozen else config.voice
    parts = alone.get(chosen, [part for part in both if part[2] < part[3]])
    # 3. A step for each.
    steps: list[Step] = []
    for number in range(training.grad_accum):
        for voice, share, begin, end in parts:
            tokens = max(1, round(training.tokens_per_batch * share / BLOCK)) * BLOCK
            room = room_for(reading if voice == READER else refined, tokens, config.batch_size)
            if voice == READER:
                step: Step = ReaderStep(trunk, reading, tokens, room, noise=noise)
            else:
                step = TrmStep(trunk, refined, tokens, room, trm, drafts=drafts)
            step.scale, step.begin, step.end = share / training.grad_accum, begin, end
            step.keeper = number == 0
            steps.append(step)
    return steps


def room_for(sequences: Sequences, num_tokens: int, bound: int | None = None) -> int:
    """Sequences that a batch of `num_tokens` has room for, `bound` at most; the same every time."""
    mean = float(sampled_lengths(sequences).sum(1).mean())
    few = min(num_tokens // TOKENS_PER_ROW, FEW_ROWS)
    room = max(few, num_tokens // TOKENS_PER_ROW_OF_MANY, round(SPARE * num_tokens / mean), 1)
    return room if bound is None else min(room, bound)


@torch.no_grad()
def sampled_lengths(sequences: Sequences) -> Tensor:
    """float64 [SAMPLED, K]: lengths of drawn sequences, the same every time."""
    with torch.random.fork_rng([sequences.device] if sequences.device.type == "cuda" else []):
        torch.manual_seed(0)
        return sequences.draw(SAMPLED)[..., LENGTH].double()

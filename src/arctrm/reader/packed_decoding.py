"""Decoding by the tiny reader on packed places: on a GPU one captured graph for each output token.

A step chooses a token in every row, by the grammar, and feeds it. All it reads and writes has a
fixed address, so that a graph, captured once for a number of rows, serves every batch of a call.
Rows that have ended go on as rows that cost next to nothing: they write to a place that nobody
reads, and see none. Once half of the rows have ended the others move to the step of a
smaller number; their keys and values stay where they are. On a CPU (tests) the same step runs
uncaptured.

Legend: R rows of a step, B prompts of a batch, T output tokens, D width, 12 choices.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.data.task import Grid
from arctrm.reader import grammar
from arctrm.reader.grammar import END, NUM_CHOICES, UNWRITTEN, GridState
from arctrm.reader.interface import Prompt
from arctrm.reader.lean import Lean
from arctrm.reader.places import Continued, Places, affordable_places, groups, offsets
from arctrm.reader.tiny import TinyReader

CHECK_EVERY = 8
"""Output tokens between two looks at which rows have ended: each look waits for the device."""
FEWEST_ROWS = 64


class PackedDecoder:
    """Decodes batches of prompts; `temperature` is None for greedy decoding.

    `sizes` are the places that each prompt and its output may need; `batches` cuts them so that
    keys and values fit into `max_places` (default: what the device can spare). Rows that have not
    ended at `deadline` (of `time.monotonic`) are given up.
    """

    def __init__(
        self,
        reader: TinyReader,
        sizes: Sequence[int],
        temperature: float | None,
        max_side: int,
        max_places: int | None = None,
        deadline: float = math.inf,
    ):
        self.lean, self.sizes = Lean(reader), sizes
        self.temperature, self.max_side, self.deadline = temperature, max_side, deadline
        most = affordable_places(reader) if max_places is None else max_places
        longest = max(sizes, default=0)
        self.places = Places(self.lean, max(longest, min(sum(sizes), most)))
        self.steps: dict[int, _Step] = {}

    def batches(self, order: Sequence[int], batch_size: int) -> Iterator[list[int]]:
        """The prompts, in this order, at most `batch_size` together and all with a place."""
        sizes = [self.sizes[index] for index in order]
        for part in groups(sizes, max(1, batch_size), self.places.count):
            yield list(order[part])

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Prompt],
        bounds: Sequence[int],
        noise_TB12: Tensor | None,
        drafts: Sequence[Grid | None] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choices int64 [B, T], UNWRITTEN behind the last, and each row's log-probability [B]."""
        rows = self._rows(prompts, bounds)
        num, longest = len(prompts), max(bounds)
        choices_TB = torch.full((longest, num + 1), UNWRITTEN, device=self.places.device)
        log_p_B = torch.zeros(num + 1, dtype=torch.float64, device=self.places.device)
        if noise_TB12 is not None:
            noise_TB12 = F.pad(noise_TB12, (0, 0, 0, 1)).to(self.places.device)
        step = self._step(num)
        step.load(rows, rows.prompt, nobody=num)
        for count in range(longest):
            if noise_TB12 is not None:
                step.noise.copy_(noise_TB12[count].index_select(0, step.rows.prompt))
            step()
            choices_TB[count].index_copy_(0, step.rows.prompt, step.choice)
            if (count + 1) % CHECK_EVERY == 0:
                kept = step.rows.active.nonzero()[:, 0]
                if len(kept) == 0 or time.monotonic() >= self.deadline:
                    break
                if 2 * _num_rows(len(kept)) <= step.num_rows:
                    log_p_B.index_copy_(0, step.rows.prompt, step.rows.log_p)
                    smaller = self._step(len(kept))
                    smaller.load(step.rows, kept, nobody=num)
                    step = smaller
        log_p_B.index_copy_(0, step.rows.prompt, step.rows.log_p)
        return choices_TB[:, :num].T.cpu().numpy(), log_p_B[:num].cpu().numpy()

    def _rows(self, prompts: Sequence[Prompt], bounds: Sequence[int]) -> "_Rows":
        """The rows of a batch, whose prompts have been read."""
        place, num = self.places, len(prompts)
        lengths = np.array([len(prompt.tokens) for prompt in prompts])
        begin = offsets(lengths + np.array(bounds))[:-1]
        logits = place.read(prompts, begin)
        state = grammar.start(num, place.device)
        condition = place.to_device([prompt.condition for prompt in prompts], torch.long)
        return _Rows(
            prompt=torch.arange(num, device=place.device),
            begin=place.to_device(begin, torch.long),
            used=place.to_device(lengths, torch.long),
            left=place.to_device(bounds, torch.long),
            output_start=place.to_device([p.output_start for p in prompts], torch.long),
            condition=self.lean.condition(condition),
            logits=logits,
            active=torch.ones_like(state.finished),
            log_p=torch.zeros(num, dtype=torch.float64, device=place.device),
            y=state.y,
            x=state.x,
            width=state.width,
            finished=state.finished,
        )

    def _step(self, num_rows: int) -> "_Step":
        """The step that has room for so many rows."""
        size = _num_rows(num_rows)
        if size not in self.steps:
            self.steps[size] = _Step(self, size)
        return self.steps[size]


def _num_rows(needed: int) -> int:
    """Rows of the smallest step with room for so many: few different numbers, little left empty."""
    grain = max(FEWEST_ROWS, 2 ** (max(needed, 1) - 1).bit_length() // 8)
    return -(-needed // grain) * grain


@dataclass(frozen=True, eq=False)
class _Rows:
    """What is known of each row."""

    prompt: Tensor
    """int64 [R]: place of its prompt in the batch."""
    begin: Tensor
    """int64 [R]: its first place."""
    used: Tensor
    """int64 [R]: its tokens that have been fed."""
    left: Tensor
    """int64 [R]: output tokens that it may still have."""
    output_start: Tensor
    """int64 [R]: position number of its first output token."""
    condition: Tensor
    """[R, D]."""
    logits: Tensor
    """float32 [R, 12]: of its next token."""
    active: Tensor
    """bool [R]: it has a next token."""
    log_p: Tensor
    """float64 [R]: sum over its output tokens."""
    y: Tensor
    x: Tensor
    width: Tensor
    finished: Tensor


class _Step:
    """One output token of all rows of a step; `rows`, `noise` and `choice` stay where they are."""

    def __init__(self, decoder: PackedDecoder, num_rows: int):
        self.lean, self.places = decoder.lean, decoder.places
        self.temperature, self.max_side = decoder.temperature, decoder.max_side
        self.num_rows, device = num_rows, decoder.places.device
        self.rows = self._no_rows()
        self.noise = torch.zeros(num_rows, NUM_CHOICES, device=device)
        self.choice = torch.full((num_rows,), END, device=device)
        self.graph = self._captured() if device.type == "cuda" else None

    def _no_rows(self) -> _Rows:
        device = self.places.device
        numbers = torch.zeros(8, self.num_rows, dtype=torch.long, device=device).unbind()
        prompt, begin, used, left, output_start, y, x, width = numbers
        vectors = self.lean.reader.dihedral_emb.weights
        active = torch.zeros(self.num_rows, dtype=torch.bool, device=device)
        return _Rows(
            prompt=prompt,
            begin=begin,
            used=used,
            left=left,
            output_start=output_start,
            condition=vectors.new_zeros(self.num_rows, vectors.shape[1]),
            logits=torch.zeros(self.num_rows, NUM_CHOICES, device=device),
            active=active,
            log_p=torch.zeros(self.num_rows, dtype=torch.float64, device=device),
            y=y,
            x=x,
            width=width,
            finished=~active,
        )

    def load(self, source: _Rows, kept: Tensor, nobody: int) -> None:
        """Take over the rows at `kept`; all others belong to `nobody`."""
        num, own = len(kept), self.rows
        for field in fields(_Rows):
            target = getattr(own, field.name)[:num]
            target.copy_(getattr(source, field.name).index_select(0, kept))
        own.active[num:] = False
        own.finished[num:] = True
        own.prompt[num:] = nobody

    def __call__(self) -> None:
        """Choose a token in every row and feed it."""
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The graph of a step. It is warmed up on rows that have ended, which has no effect."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may touch CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run()
        return graph

    def _run(self) -> None:
        rows = self.rows
        state = GridState(rows.y, rows.x, rows.width, rows.finished)
        self._choose(state)
        positions = self.lean.reader.output_positions(rows.output_start, 0, state.y, state.x)
        self._advance(state)
        tokens = self.lean.grid_ids.index_select(0, self.choice)
        hidden = self.lean.hidden(tokens, positions, rows.condition, self._continued())
        rows.logits.copy_(self.lean.logits(hidden))
        rows.used.add_(rows.active)

    def _choose(self, state: GridState) -> None:
        rows, temperature = self.rows, self.temperature
        log_p = grammar.log_probabilities(rows.logits, state, self.max_side)
        scores = log_p if temperature is None else log_p / temperature + self.noise
        self.choice.copy_(torch.where(rows.active, scores.argmax(dim=-1), END))
        own = log_p.gather(1, self.choice[:, None])[:, 0]
        rows.log_p.add_(torch.where(rows.active, own, 0))

    def _advance(self, state: GridState) -> None:
        rows, after = self.rows, grammar.advance(state, self.choice)
        rows.left.sub_(1)
        rows.active.logical_and_(~after.finished & (rows.left > 0))
        for name in ("y", "x", "width", "finished"):
            getattr(rows, name).copy_(getattr(after, name))

    def _continued(self) -> Continued:
        """The chosen tokens behind their rows; those of rows that have ended go nowhere."""
        rows = self.rows
        place = torch.where(rows.active, rows.begin + rows.used, self.places.count)
        filled = torch.where(rows.active, rows.used + 1, 0)
        return Continued(self.places, place, rows.begin, filled)

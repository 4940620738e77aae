"""Scoring by the tiny reader on a CPU: what candidates of a prompt begin with is read once.

The candidates of a test input are mostly near-copies of each other. Sorted by their tokens, each is
read from where it differs from the one before, whose keys and values it overwrites
(`reader.own_rows`). Several prompts go side by side, a candidate of each at a time.

Legend: T tokens fed now, N tokens of a candidate, 12 choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import Grid
from arctrm.reader import grammar
from arctrm.reader.grammar import NUM_CHOICES, GridState
from arctrm.reader.interface import Prompt
from arctrm.reader.own_rows import HeldRow, OwnRows
from arctrm.reader.tiny import TinyReader


@dataclass(eq=False)
class _Path:
    """A candidate, spelled."""

    index: int
    """Where its score belongs."""
    choices: np.ndarray
    """int64 [N]."""
    state: GridState
    """[N]: before each choice."""


@dataclass(eq=False, kw_only=True)
class _Row(HeldRow):
    """A prompt and its candidates."""

    prompt: Prompt
    paths: list[_Path]
    log_p: Tensor
    """float32 [N, 12]: of what could have stood in each place of the candidate read last."""


class SharedScorer:
    """Log-probabilities of candidates; a copy of the reader's weights as they are now."""

    def __init__(self, reader: TinyReader, max_side: int):
        self.own, self.max_side = OwnRows(reader), max_side

    @torch.no_grad()
    def scores(self, pairs: Sequence[tuple[Prompt, Grid]], batch_size: int) -> list[float]:
        """The score of each pair of prompt and candidate; `batch_size` prompts side by side."""
        found = [0.0] * len(pairs)
        rows = self._rows(pairs)
        for begin in range(0, len(rows), batch_size):
            self._score(rows[begin : begin + batch_size], found)
        return found

    def _rows(self, pairs: Sequence[tuple[Prompt, Grid]]) -> list[_Row]:
        """One row for each prompt, its candidates in the order of their tokens."""
        paths: dict[int, list[_Path]] = {}
        prompts = {id(prompt): prompt for prompt, _ in pairs}
        for index, (prompt, grid) in enumerate(pairs):
            paths.setdefault(id(prompt), []).append(_Path(index, *grammar.encode_choices(grid)))
        return [self._row(prompts[key], own) for key, own in paths.items()]

    def _row(self, prompt: Prompt, paths: list[_Path]) -> _Row:
        longest = max(len(path.choices) for path in paths)
        return _Row(
            start=prompt.output_start,
            held=torch.empty(0),
            prompt=prompt,
            paths=sorted(paths, key=lambda path: path.choices.tolist()),
            log_p=torch.zeros(longest, NUM_CHOICES),
        )

    def _score(self, rows: Sequence[_Row], found: list[float]) -> None:
        for row in rows:
            row.held = self.own.room(len(row.prompt.tokens) + len(row.log_p))
        first = self.own.read(rows, [row.prompt for row in rows])
        start = grammar.start(len(rows))
        log_p = grammar.log_probabilities(self.own.lean.logits(first), start, self.max_side)
        for row, own in zip(rows, log_p, strict=True):
            row.log_p[0] = own
        for number in range(max(len(row.paths) for row in rows)):
            left = [row for row in rows if number < len(row.paths)]
            self._read(left, number)
            for row in left:
                path = row.paths[number]
                choices = torch.from_numpy(path.choices)[:, None]
                own = row.log_p[: len(choices)].gather(1, choices)
                found[path.index] = float(own.double().sum())
        for row in rows:  # room for the next ones
            row.held = torch.empty(0)

    def _read(self, rows: Sequence[_Row], number: int) -> None:
        """Read candidate `number` of each row from where it differs from the one before."""
        reading, fed = [], []
        for row in rows:
            kept, last = self._shared(row, number), len(row.paths[number].choices) - 1
            row.length = len(row.prompt.tokens) + kept
            if kept < last:
                reading.append(row)
                fed.append(slice(kept, last))
        if not reading:
            return
        log_p = self._log_probabilities(reading, [row.paths[number] for row in reading], fed)
        for row, where, own in zip(reading, fed, log_p, strict=True):
            row.log_p[where.start + 1 : where.stop + 1] = own

    def _shared(self, row: _Row, number: int) -> int:
        """Tokens that candidate `number` has in common with the one before, which was read."""
        if number == 0:
            return 0
        before, now = row.paths[number - 1].choices, row.paths[number].choices
        length = min(len(before), len(now)) - 1  # the end is never read
        differ = (before[:length] != now[:length]).nonzero()[0]
        return int(differ[0]) if len(differ) else length

    def _log_probabilities(
        self, rows: Sequence[_Row], paths: Sequence[_Path], fed: Sequence[slice]
    ) -> Sequence[Tensor]:
        """Log-probabilities [T, 12] of what comes after each of the tokens that are `fed` to each
        row.
        """
        lengths, lean = [where.stop - where.start for where in fed], self.own.lean
        after = [slice(where.start + 1, where.stop + 1) for where in fed]
        tokens = np.concatenate([p.choices[s] for p, s in zip(paths, fed, strict=True)])
        y, x = (_joined(paths, name, fed) for name in ("y", "x"))
        spans = torch.tensor(lengths)
        start = torch.tensor([row.start for row in rows]).repeat_interleave(spans)
        condition = lean.condition(torch.tensor([row.prompt.condition for row in rows]))
        hidden = self.own.append(
            rows,
            lean.grid_ids[torch.from_numpy(tokens)],
            self.own.reader.output_positions(start, 0, y, x),
            condition.repeat_interleave(spans, dim=0),
            lengths,
        )
        y, x, width, ended = (_joined(paths, n, after) for n in ("y", "x", "width", "finished"))
        state = GridState(y, x, width, ended)
        log_p = grammar.log_probabilities(lean.logits(hidden), state, self.max_side)
        return log_p.split(lengths)


def _joined(paths: Sequence[_Path], name: str, parts: Sequence[slice]) -> Tensor:
    """A part of a field of each path's state, one after another."""
    return torch.cat([getattr(p.state, name)[s] for p, s in zip(paths, parts, strict=True)])

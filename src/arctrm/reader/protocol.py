"""What the rest of the package asks of a reader, whichever model is behind it.

Callers ask for an attribute, never for the kind of the reader. Writing and scoring grids have one
door each (`reader.decoding.decode`, `reader.scoring.score`). A choice is one of the 12 tokens that
spell a grid, as `reader.grammar` numbers them. Legend: R prompts of a store (its rows), T tokens.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from arctrm.data.task import Grid, Pair
from arctrm.model.layout import Condition, Prompt
from arctrm.reader.grammar import GridState


class Store(Protocol):
    """The keys and values of prompts side by side, and of the outputs written after them so far.

    Rows are numbered as the prompts were given. Nothing that a row gives depends on other rows.
    """

    def read(self) -> Tensor:
        """Read all prompts (equal ones once); logits float32 [R, 12] of the first output token."""

    def append(self, rows: Tensor, choices: Tensor, states: GridState) -> Tensor:
        """Append tokens to rows; logits float32 [T, 12] after each token.

        All are [T] on the reader's device: the row of each token (int64), its choice (int64), and
        the state of the grammar before it. Tokens of one row are neighbours, in order; a row may
        get any number, none included. Rows come in ascending order.
        """

    def rewind(self, row: int, length: int) -> None:
        """Forget the output tokens of a row but the first `length`."""

    def release(self, rows: Sequence[int]) -> None:
        """Give up rows that get no more tokens; the numbers of the others stay."""


class Reader(Protocol):
    """A language model that writes and scores grids."""

    name: str  # For messages

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""

    @property
    def width(self) -> int:
        """Of the hidden states."""

    @property
    def asks_inverse(self) -> bool:
        """Whether it can be asked for the input of an output."""

    @property
    def follows_drafts(self) -> bool:
        """Whether drafts make greedy decoding faster."""

    @property
    def batch_rows(self) -> int:
        """Prompts side by side where nobody says how many."""

    def prompt(self, query: Grid, condition: Condition, pairs: Sequence[Pair] = ()) -> Prompt:
        """The prompt that asks for the output of `query`; a reader that is told the task by its
        condition passes over `pairs`.
        """

    @property
    def capacity(self) -> int:
        """Tokens that all rows of one store may have together, prompts and room."""

    def opened(self, sizes: Sequence[int]) -> "Reader":
        """The same reader, with the weights that it has now, for one call in which rows of so many
        tokens are written or scored: its stores may share memory, so one is used at a time.
        """

    def store(self, prompts: Sequence[Prompt], room: Sequence[int]) -> Store:
        """An empty store for prompts and as many output tokens of each as `room` says."""

"""From a task under a view to a prompt: demonstrations, then the query's input, nothing else.

Two forms. As tokens, "input", rows, "output", rows, built from ids so that no tokenizer merges
cells; and as plain language for chat models, through their chat template. The query is never cut:
where a prompt is too long, whole demonstrations are left out, longest first, and a note says which.
No test output is read here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from arctrm.data.task import Grid, Pair, Task
from arctrm.data.views import IDENTITY, View
from arctrm.errors import ConfigError
from arctrm.reader.grammar import encode_grid
from arctrm.reader.interface import GridTokens, Prompt
from arctrm.reader.probing import merges_digits

INSTRUCTIONS = (
    "Every pair of grids below follows the same rule. A grid is written as one line per row, with "
    "one digit from 0 to 9 per cell. Find the rule, apply it to the last input, and answer with "
    "the output grid only, written in the same way."
)


@dataclass(frozen=True)
class Spelling:
    """The ids around the cells of a grid prompt."""

    tokens: GridTokens
    start: tuple[int, ...] = ()
    """What the tokenizer puts before any text."""
    input_mark: tuple[int, ...] = ()
    """Comes before an input grid."""
    output_mark: tuple[int, ...] = ()
    """Comes before an output grid."""


class PromptReader(Protocol):
    """What prompts need of a hub reader."""

    name: str
    tokenizer: Any
    spelling: Spelling


@dataclass(frozen=True, eq=False)
class BuiltPrompt:
    """A prompt and what had to be left out of it."""

    prompt: Prompt
    dropped: tuple[int, ...] = ()
    """Numbers of the demonstrations that were left out, from 0."""
    note: str = ""
    """One sentence for the user when some were, else empty."""
    text: str = ""
    """The text of a chat prompt."""


def new_spelling(tokenizer: Any, tokens: GridTokens) -> Spelling:
    """The ids around the cells, from a tokenizer; marks are words and a row end."""

    def mark(word: str) -> tuple[int, ...]:
        return (*tokenizer.encode(word, add_special_tokens=False), tokens.row_end)

    return Spelling(tokens, start_tokens(tokenizer), mark("input"), mark("output"))


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before any text (not those it puts after)."""
    ids = text_tokens(tokenizer, "")
    return tuple(token for token in ids if token in tokenizer.all_special_ids)


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that goes on: with what comes before any text, without what ends it."""
    ids = list(tokenizer.encode(text))
    while ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    return ids


def spell_grid(tokens: GridTokens, grid: Grid) -> np.ndarray:
    """Ids of a grid, int64 [height x (width + 1) + 1]: rows, row ends, the end."""
    return encode_grid(grid, tokens)[0]


def task_prompt(
    reader: PromptReader, task: Task, index: int, max_tokens: int, view: View = IDENTITY
) -> BuiltPrompt:
    """The grid prompt of test input `index` of a task under a view, at most `max_tokens` long.

    Raises:
        ConfigError: the query alone is longer.
    """
    where = f"task {task.id}, test input {index}"
    query = view.apply(task.test[index].input)
    return pairs_prompt(reader.spelling, viewed(task, view), query, max_tokens, where)


def pairs_prompt(
    spelling: Spelling,
    demonstrations: Sequence[Pair],
    query: Grid,
    max_tokens: int,
    where: str = "prompt",
) -> BuiltPrompt:
    """The grid prompt that asks for the output of `query`; demonstrations as they are to be seen.

    Raises:
        ConfigError: the query alone is longer than `max_tokens`.
    """
    parts = [_pair_ids(spelling, pair) for pair in demonstrations]
    asked = np.concatenate([_input_ids(spelling, query), spelling.output_mark])
    sizes = [len(part) for part in parts]
    fixed = len(spelling.start) + len(asked)
    kept = keep_within(sizes, lambda kept: fixed + sum(sizes[i] for i in kept), max_tokens, where)
    ids = np.concatenate([spelling.start, *(parts[i] for i in kept), asked]).astype(np.int64)
    return _built(ids, kept, len(parts), max_tokens, where)


def chat_prompt(
    reader: PromptReader, task: Task, index: int, max_tokens: int, view: View = IDENTITY
) -> BuiltPrompt:
    """The plain-language prompt of test input `index` through the model's chat template.

    Raises:
        ConfigError: the model has no chat template, or the query alone is too long.
    """
    where = f"task {task.id}, test input {index}"
    pairs, query = viewed(task, view), view.apply(task.test[index].input)
    between = " " if merges_digits(reader.tokenizer) else ""

    def rendered(kept: Sequence[int]) -> str:
        return _chat_text(reader, plain_text([pairs[i] for i in kept], query, between))

    def tokens(kept: Sequence[int]) -> list[int]:
        return list(reader.tokenizer.encode(rendered(kept), add_special_tokens=False))

    sizes = [pair.input.size + (0 if pair.output is None else pair.output.size) for pair in pairs]
    kept = keep_within(sizes, lambda kept: len(tokens(kept)), max_tokens, where)
    ids = np.array(tokens(kept), dtype=np.int64)
    return _built(ids, kept, len(pairs), max_tokens, where, rendered(kept))


def plain_text(pairs: Sequence[Pair], query: Grid, between: str = " ") -> str:
    """What a chat model is asked, in plain language; `between` stands between cells."""
    shown = [INSTRUCTIONS]
    for number, pair in enumerate(pairs, 1):
        shown.append(f"Demonstration {number}\nInput:\n{grid_text(pair.input, between)}")
        if pair.output is not None:
            shown[-1] += f"\nOutput:\n{grid_text(pair.output, between)}"
    return "\n\n".join([*shown, f"Test\nInput:\n{grid_text(query, between)}\nOutput:"])


def grid_text(grid: Grid, between: str = " ") -> str:
    """One line per row."""
    return "\n".join(between.join(map(str, row)) for row in grid.tolist())


def viewed(task: Task, view: View) -> list[Pair]:
    """The demonstrations as a view shows them."""
    return [
        Pair(view.apply(pair.input), None if pair.output is None else view.apply(pair.output))
        for pair in task.demonstrations
    ]


def keep_within(
    sizes: Sequence[int], length: Callable[[Sequence[int]], int], max_tokens: int, where: str
) -> list[int]:
    """Numbers of the demonstrations that stay, in order; the longest go first (last of equals).

    `length(kept)` is the length of the prompt with these.

    Raises:
        ConfigError: it is above `max_tokens` with none.
    """
    kept = list(range(len(sizes)))
    while (needed := length(kept)) > max_tokens:
        if not kept:
            raise ConfigError(
                f"{where}: the query alone takes {needed} tokens, allowed are {max_tokens}; raise "
                "max_tokens or use a reader with a longer context"
            )
        kept.remove(max(kept, key=lambda i: (sizes[i], i)))
    return kept


def _built(
    ids: np.ndarray, kept: Sequence[int], total: int, max_tokens: int, where: str, text: str = ""
) -> BuiltPrompt:
    dropped = tuple(i for i in range(total) if i not in kept)
    note = ""
    if dropped:
        numbers = ", ".join(f"train[{i}]" for i in dropped)
        note = (
            f"{where}: {len(dropped)} of {total} demonstrations do not fit into {max_tokens} "
            f"tokens and were left out: {numbers}"
        )
    return BuiltPrompt(Prompt(ids, np.arange(len(ids)), len(ids)), dropped, note, text)


def _pair_ids(spelling: Spelling, pair: Pair) -> np.ndarray:
    ids = _input_ids(spelling, pair.input)
    if pair.output is None:
        return ids
    return np.concatenate([ids, spelling.output_mark, spell_grid(spelling.tokens, pair.output)])


def _input_ids(spelling: Spelling, grid: Grid) -> np.ndarray:
    """An input needs no end: the mark of the output follows."""
    return np.concatenate([spelling.input_mark, spell_grid(spelling.tokens, grid)[:-1]])


def check_chat_template(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that cannot write a conversation.

    Raises:
        ConfigError: it has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{name}: the tokenizer has no chat template, which prompt = 'chat' needs; set "
            "prompt = 'grid' or use the instruction-tuned version of the model"
        )


def _chat_text(reader: PromptReader, question: str) -> str:
    check_chat_template(reader.tokenizer, reader.name)
    messages = [{"role": "user", "content": question}]
    try:
        return reader.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program of the model's makers
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{reader.name}: the chat template cannot be rendered ({reason}); set prompt = 'grid'"
        ) from error

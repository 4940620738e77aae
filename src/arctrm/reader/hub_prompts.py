"""Prompts of hub models: the tokens that spell a grid in any tokenizer, pairs and chat around them.

A grid is spelt by ids, one for each cell: "123" stays three tokens where the tokenizer would
make one of it. The ids are looked up in the vocabulary under every form that a lone character has
there. No query is cut: where a prompt is too long, whole demonstrations are left out, the longest
first. Legend: T tokens of the layout of pairs (`model.layout`), N ids, P prefix vectors.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from arctrm.data.task import NUM_COLOURS, Grid, Pair
from arctrm.errors import ConfigError
from arctrm.model.layout import CHOICES, SEPARATOR, START, VOCABULARY, Prompt, pair_tokens

SPACE_MARKS = ("Ġ", "▁", " ")  # before a token: byte-level, SentencePiece, plain
ROW_ENDS, ENDS = "\n;|,", "#;|"  # in order of preference; of a grid: without a special token
INSTRUCTIONS = (
    "Every pair of grids below follows the same rule. A grid is written as one line per row, with "
    "one digit from 0 to 9 per cell. Find the rule, apply it to the last input, and answer with "
    "the output grid only, written in the same way."
)


@dataclass(frozen=True, eq=False)
class HubPrompt(Prompt):
    """A prompt in ids of a hub model."""

    soft: Tensor | None = None  # soft prefix [P, D], read after the tokens
    layout: np.ndarray | None = None  # int64 [T]: the same in tokens of the layout; None for a text


@dataclass(frozen=True)
class Spelling:
    """The ids of a tokenizer that spell pairs of grids."""

    choices: tuple[int, ...]  # ids of the 12 choices: colours 0..9, row end, end
    start: tuple[int, ...]  # what the tokenizer puts before any text
    input_mark: tuple[int, ...]
    output_mark: tuple[int, ...]
    """Read where the layout has START and SEPARATOR; end with a row end."""

    def spelt(
        self, tokens_T: np.ndarray, begins: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [N], and the place of the last id of each token, int64 [T].

        Texts begin at the tokens `begins`. Tokens without an id (a soft prefix) are read as id 0.
        """
        own = dict(zip(CHOICES, ((one,) for one in self.choices), strict=True))
        own |= {START: self.input_mark, SEPARATOR: self.output_mark}
        spelt = [own.get(token, (0,)) for token in range(VOCABULARY)]
        spelt += [(*self.start, *one) for one in spelt]
        kinds = tokens_T.copy()
        kinds[list(begins)] += VOCABULARY
        lengths = np.array([len(one) for one in spelt])
        first = lengths.cumsum() - lengths
        ends = lengths[kinds].cumsum()
        skipped = np.repeat(first[kinds] - ends + lengths[kinds], lengths[kinds])
        flat = np.array([id_ for one in spelt for id_ in one])
        return flat[skipped + np.arange(len(skipped))], ends - 1


def find_spelling(tokenizer: Any, name: str = "the tokenizer") -> Spelling:
    """Look the ids up: bare digits, else digits with the space before them. Raises ConfigError if a
    digit, a row end or an end has no id of its own.
    """
    digits = [str(colour) for colour in range(NUM_COLOURS)]
    found = [_bare(tokenizer, digit) for digit in digits]
    forms = ([mark + digit for mark in SPACE_MARKS] for digit in digits)
    both = ((" " + digit, digit) for digit in digits)  # some decoders drop the space
    spaced = [_token(tokenizer, *own) for own in zip(forms, both, strict=True)]
    if len({*found} - {None}) < NUM_COLOURS == len({*spaced} - {None}):
        found = spaced
    found += [_free((_bare(tokenizer, character) for character in ROW_ENDS), found)]
    ends = [getattr(tokenizer, f"{kind}_token_id", None) for kind in ("eos", "sep", "bos", "pad")]
    found += [_free((*ends, *(_bare(tokenizer, character) for character in ENDS)), found)]
    choices = tuple(token for token in found if token is not None)
    if len(choices) < len(CHOICES):
        lacks = (*digits, "a newline", "the end")[found.index(None)]
        raise ConfigError(
            f"{name}: the tokenizer has no token of its own for {lacks}, and a grid is spelt with "
            "one token per cell; use a reader whose tokenizer has one (Llama 3, Qwen 2.5 and 3, "
            "Gemma and Mistral do) or the tiny reader"
        )
    start = tuple(i for i in text_ids(tokenizer, "") if i in tokenizer.all_special_ids)
    words = (tokenizer.encode(word, add_special_tokens=False) for word in ("input", "output"))
    return Spelling(choices, start, *((*word, choices[-2]) for word in words))


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that goes on: with what comes before any text, without what ends it."""
    ids = list(tokenizer.encode(text))
    while ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    return ids


def new_prompt(ids: Sequence[int] | np.ndarray, **others: Any) -> HubPrompt:
    """Tokens one after another; the output follows them."""
    return HubPrompt(np.array(ids, dtype=np.int64), np.arange(len(ids)), len(ids), **others)


def pairs_prompt(
    spelling: Spelling, query: Grid, pairs: Sequence[Pair], max_tokens: int, name: str
) -> HubPrompt:
    """The prompt that asks for the output of `query` after `pairs`, at most `max_tokens` long.
    Raises ConfigError, which begins with the model's `name`, if the query alone is longer.
    """
    parts = [pair_tokens(pair)[0] for pair in (*pairs, Pair(query))]
    sizes = [len(spelling.spelt(part, [])[0]) for part in parts]
    fixed = len(spelling.start) + sizes.pop()
    kept = _keep(sizes, lambda kept: fixed + sum(sizes[i] for i in kept), max_tokens, name)
    layout = np.concatenate([parts[i] for i in (*kept, -1)])
    return new_prompt(spelling.spelt(layout, [0])[0], layout=layout)


def chat_prompt(
    tokenizer: Any, query: Grid, pairs: Sequence[Pair], max_tokens: int, name: str
) -> HubPrompt:
    """The same in plain language, through the chat template; ConfigError if there is none, too."""
    check_chat_template(tokenizer, name)
    digits = "0123456789" * 2
    merges = len(tokenizer.encode(digits, add_special_tokens=False)) < len(digits)
    between = " " if merges else ""

    def ids(kept: Sequence[int]) -> list[int]:
        asked = chat_text(query, [pairs[index] for index in kept], between)
        message = {"role": "user", "content": asked}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False))

    sizes = [pair.input.size + (0 if pair.output is None else pair.output.size) for pair in pairs]
    return new_prompt(ids(_keep(sizes, lambda kept: len(ids(kept)), max_tokens, name)))


def chat_text(query: Grid, pairs: Sequence[Pair], between: str = "") -> str:
    """The request in plain language; `between` stands between cells."""
    shown = [INSTRUCTIONS]
    for number, pair in enumerate(pairs, 1):
        shown.append(f"Demonstration {number}\nInput:\n{grid_text(pair.input, between)}")
        if pair.output is not None:
            shown[-1] += f"\nOutput:\n{grid_text(pair.output, between)}"
    return "\n\n".join([*shown, f"Test\nInput:\n{grid_text(query, between)}\nOutput:"])


def check_chat_template(tokenizer: Any, name: str) -> None:
    """Refuse (ConfigError) a tokenizer that cannot write a conversation."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{name}: the tokenizer has no chat template, which prompt = 'chat' needs; set "
            "prompt = 'grid' or use the instruction-tuned version of the model"
        )


def grid_text(grid: Grid, between: str = "") -> str:
    """One line for each row; `between` stands between cells."""
    return "\n".join(between.join(map(str, row)) for row in grid.tolist())


def _keep(
    sizes: Sequence[int], needs: Callable[[Sequence[int]], int], max_tokens: int, name: str
) -> list[int]:
    """Numbers of the demonstrations that fit, in order."""
    kept = list(range(len(sizes)))
    while (needed := needs(kept)) > max_tokens:
        if not kept:
            raise ConfigError(
                f"{name}: the query alone takes {needed} tokens, allowed are {max_tokens}; raise "
                "max_tokens or use a reader with a longer context"
            )
        kept.remove(max(kept, key=lambda i: (sizes[i], i)))
    return kept


def _free(found: Iterable[int | None], taken: Sequence[int | None]) -> int | None:
    return next((token for token in found if token is not None and token not in taken), None)


def _bare(tokenizer: Any, character: str) -> int | None:
    """The id that stands for this character and nothing else, if the vocabulary has one."""
    forms = [character, "Ċ" if character == "\n" else character, f"<0x{ord(character):02X}>"]
    # Encoded alone, SentencePiece may put its mark before it: as a token of its own, or as part.
    last = list(tokenizer.encode(character, add_special_tokens=False))[-1:]
    pieces = tokenizer.convert_ids_to_tokens(last)
    forms += [p for p in pieces if len(p) == 1 or not p.startswith(SPACE_MARKS)]
    return _token(tokenizer, forms, (character,))


def _token(tokenizer: Any, forms: Sequence[str], decoded: Sequence[str]) -> int | None:
    for form in forms:
        token = tokenizer.convert_tokens_to_ids(form)  # "unknown" where there is none
        known = token is not None and tokenizer.convert_ids_to_tokens(token) == form
        if known and tokenizer.decode([token]) in decoded:
            return token
    return None

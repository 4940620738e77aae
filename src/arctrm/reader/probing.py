"""Finds the tokens that spell a grid in any tokenizer: one id per cell, one per row end, one end.

Nothing is asked of the tokenizer's merges: a grid is spelt by ids, so "123" stays three tokens
where the tokenizer would make one of it. The ids are looked up in the vocabulary under every form
that a lone character takes there: as it is, in byte-level letters, behind a mark for the space, as
a byte.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from arctrm.data.task import NUM_COLOURS
from arctrm.errors import ConfigError
from arctrm.reader.interface import GridTokens

Cells = Literal["auto", "restricted", "separated"]

SPACE_MARKS = ("Ġ", "▁", " ")
"""How vocabularies write the space before a token: byte-level, SentencePiece, plain."""
ROW_ENDS = {"\n": "a newline", ";": "';'", "|": "'|'", ",": "','"}
"""What ends a row, in order of preference."""
WAY_OUT = (
    "use a reader whose tokenizer has one (Llama 3, Qwen 2.5 and 3, Gemma and Mistral do) or the "
    "tiny reader"
)


@dataclass(frozen=True)
class Probe:
    """What was found in a tokenizer."""

    tokens: GridTokens
    cells: Literal["restricted", "separated"]
    """Cells are bare digits, or digits with the space before them."""
    how: str
    """For people: what the tokens are."""


def probe(tokenizer: Any, cells: Cells = "auto", name: str = "the tokenizer") -> Probe:
    """Find the ids that spell a grid. `auto` prefers bare digits to digits with a space.

    Raises:
        ConfigError: a digit, a row end or an end has no id of its own.
    """
    colours, found = _colours(tokenizer, cells, name)
    row_end, row_end_name = _row_end(tokenizer, colours, name)
    end, end_name = _end(tokenizer, (*colours, row_end), name)
    shown = "bare digits" if found == "restricted" else "digits with the space before them"
    return Probe(
        GridTokens(colours, row_end, end),
        found,
        f"cells are {shown}, rows end with {row_end_name}, a grid with {end_name}",
    )


def single_token(tokenizer: Any, character: str) -> int | None:
    """The id that stands for this character and nothing else, if the vocabulary has one."""
    forms = (character, _byte_letter(character), f"<0x{ord(character):02X}>")
    ids = [_id_of(tokenizer, form) for form in forms]
    # Encoded alone, SentencePiece may put its mark before it: as a token of its own, or as part.
    ids += [i for i in _encode(tokenizer, character)[-1:] if not _has_space(tokenizer, i)]
    return next((i for i in ids if i is not None and tokenizer.decode([i]) == character), None)


def spaced_token(tokenizer: Any, character: str) -> int | None:
    """The id that stands for a space and this character together."""
    ids = [_id_of(tokenizer, mark + _byte_letter(character)) for mark in SPACE_MARKS]
    # Some decoders drop the space of a first token.
    wanted = (" " + character, character)
    return next((i for i in ids if i is not None and tokenizer.decode([i]) in wanted), None)


def merges_digits(tokenizer: Any) -> bool:
    """Whether the tokenizer writes several digits in a row as fewer tokens."""
    digits = "0123456789" * 2
    return len(_encode(tokenizer, digits)) < len(digits)


def _colours(
    tokenizer: Any, cells: Cells, name: str
) -> tuple[tuple[int, ...], Literal["restricted", "separated"]]:
    digits = [str(colour) for colour in range(NUM_COLOURS)]
    bare = {digit: single_token(tokenizer, digit) for digit in digits}
    spaced = {digit: spaced_token(tokenizer, digit) for digit in digits}
    if cells != "separated" and _complete(bare):
        return tuple(token for token in bare.values() if token is not None), "restricted"
    if cells != "restricted" and _complete(spaced):
        return tuple(token for token in spaced.values() if token is not None), "separated"
    wanted, lacking, other = (
        ("with a space before it", spaced, _complete(bare) and "restricted")
        if cells == "separated"
        else ("of its own", bare, _complete(spaced) and "separated")
    )
    digit = next((d for d in digits if lacking[d] is None), "0")
    cure = f"set cells = {other!r} or {WAY_OUT}" if other else WAY_OUT
    raise ConfigError(
        f"{name}: the tokenizer has no token {wanted} for the digit {digit}, and a grid is spelt "
        f"with one token per cell; {cure}"
    )


def _complete(ids: dict[str, int | None]) -> bool:
    """Whether every digit has an id that no other digit has."""
    return None not in ids.values() and len(set(ids.values())) == NUM_COLOURS


def _row_end(tokenizer: Any, taken: tuple[int, ...], name: str) -> tuple[int, str]:
    for character, shown in ROW_ENDS.items():
        token = single_token(tokenizer, character)
        if token is not None and token not in taken:
            return token, shown
    raise ConfigError(
        f"{name}: the tokenizer has no token for a newline (nor for ; | or ,), and every row of a "
        f"grid ends with one; {WAY_OUT}"
    )


def _end(tokenizer: Any, taken: tuple[int, ...], name: str) -> tuple[int, str]:
    for attribute in ("eos_token", "sep_token", "bos_token", "pad_token"):
        token = getattr(tokenizer, f"{attribute}_id", None)
        if token is not None and token not in taken:
            return token, str(getattr(tokenizer, attribute))
    for character in "#;|":
        token = single_token(tokenizer, character)
        if token is not None and token not in taken:
            return token, repr(character)
    raise ConfigError(
        f"{name}: the tokenizer has no end-of-text token, and a grid ends with one; {WAY_OUT}"
    )


def _id_of(tokenizer: Any, form: str) -> int | None:
    """The id of a vocabulary entry, None where there is none (tokenizers answer with unknown)."""
    token = tokenizer.convert_tokens_to_ids(form)
    known = token is not None and tokenizer.convert_ids_to_tokens(token) == form
    return token if known else None


def _has_space(tokenizer: Any, token: int) -> bool:
    """Whether a vocabulary entry has the mark of a space before something."""
    piece = tokenizer.convert_ids_to_tokens(token)
    return len(piece) > 1 and piece.startswith(SPACE_MARKS)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _byte_letter(character: str) -> str:
    """The letter that byte-level vocabularies write for this character."""
    return _byte_letters().get(ord(character), character)


@cache
def _byte_letters() -> dict[int, str]:
    """Byte -> letter, as GPT-2 numbered them: bytes that do not print are moved above 255."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved: Iterator[int] = iter(range(256, 512))
    return {byte: chr(byte if byte in printing else next(moved)) for byte in range(256)}

"""Mutations of valid files: bytes, JSON trees, headers of safetensors; seeds that are printed."""

import copy
import json
import os
import random
import time

SECONDS = float(os.environ.get("CAMPAIGN_SECONDS", "20"))  # of each campaign
SEED = int(os.environ.get("CAMPAIGN_SEED", time.time_ns() % 2**32))

TEXTS = ("", "[/]", "[red]x", "\x1b[31m\x07", "a\nb", "\u202ex", "\ud800", "../../x", "x" * 5000)
WORDS = (*TEXTS, "null", "inf", "nan", "1e999", "=", ".", "[", "{", '"', "'''", "%s", "{}")
DIGITS = "9" * 5000  # of an integer that Python refuses to read
ODD = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**70), 10**30, 1.5, 1e308, 1e-320),
    *(float("inf"), float("-inf"), float("nan"), [], {}, [[]], [[1, 2], [3]], {"": 0}, *TEXTS),
)
NUL = b"\x00"


def some_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes of single bytes, spans, words, or the end."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 8, 64)))
        word = rng.choice((*WORDS, DIGITS)).encode("utf-8", "surrogatepass")
        how = rng.randrange(7)
        if how == 0:
            data = data[:at] + bytes(rng.randrange(256) for _ in range(end - at)) + data[end:]
        elif how == 1:
            data = data[:at] + data[end:]
        elif how == 2:
            data = data[:end] + data[at:]
        elif how == 3:
            data = data[:at] + word + data[at:]
        elif how == 4:
            data = data[:at] + word + data[end:]
        elif how == 5:
            data = data[:at]
        else:
            times = rng.choice((100, 300, 900, 20_000))
            data = data[:at] + rng.choice((b"[", b'{"a":', b"{", b"[[")) * times + data[at:]
    return data


def some_tree(rng: random.Random, tree: object) -> object:
    """One to three nodes of a JSON tree replaced, removed, doubled, renamed or wrapped."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        nodes = [(holder, key) for holder, key in _places(tree)]
        if not nodes:
            return rng.choice(ODD)
        # Every depth alike: most nodes are cells of grids.
        shallow = rng.randint(0, max(len(path) for _, path in nodes))
        holder, path = rng.choice([n for n in nodes if len(n[1]) >= shallow] or nodes)
        key, how = path[-1], rng.randrange(6)
        if how <= 2:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif how == 3:
            del holder[key]
        elif how == 4 and isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder.pop(key)
        elif how == 4:
            holder.append(copy.deepcopy(holder[key]))
        else:
            for _ in range(rng.choice((1, 1, 1, 100, 400))):
                holder[key] = rng.choice(([holder[key]], {"x": holder[key]}))
    return tree if rng.random() > 0.02 else rng.choice(ODD)


def _places(tree, path=()):
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, (*path, key)
            yield from _places(tree[key], (*path, key))


def some_json(rng: random.Random, text: bytes) -> bytes:
    """A file of JSON with other bytes, or with another tree."""
    if rng.random() < 0.3:
        return some_bytes(rng, text)
    try:
        found = json.dumps(some_tree(rng, json.loads(text)))
    except RecursionError:  # wrapped too often to be written
        return b"[" * 2000
    return found.replace("1e+30", DIGITS).encode()


def some_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A file of safetensors whose header, its length, or bytes are others."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.2:
        return some_bytes(rng, data)
    if rng.random() < 0.1:
        told = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, length + 1))
        return told.to_bytes(8, "little") + header + rest
    header = some_json(rng, header)
    return len(header).to_bytes(8, "little") + header + rest

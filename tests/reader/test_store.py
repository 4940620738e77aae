"""Keys and values of rows: read, appended, taken back; alike in both forms and as computed anew."""

import numpy as np
import pytest
import torch
from plain_reader import CONFIGS, INJECTED, grid, new_prompts, new_trunk, plain_logits

from arctrm.model.attention import Pieces, ragged_attention
from arctrm.model.layout import groups
from arctrm.reader import grammar, store
from arctrm.reader.store import PackedStore, Places, RowStore, distinct, ranges

ROOM = 60


def stores(trunk, prompts, room=ROOM):
    """Both forms; in the packed one some places are left at the end."""
    frozen, room = trunk.cast(trunk.dtype), [room] * len(prompts)
    count = sum(len(prompt.tokens) for prompt in prompts) + sum(room)
    packed = PackedStore(Places(frozen, count + 3), prompts, room)
    return {"rows": RowStore(frozen, prompts, room), "packed": packed}


def part(choices, states, where):
    return choices[where], grammar.GridState(*(own[where] for own in vars(states).values()))


def appended(one, tokens):
    """Append `tokens` {row: (choices, states)} to rows of a store; logits of each row."""
    rows = [row for row, (choices, _) in tokens.items() for _ in choices]
    joined = [torch.cat([torch.as_tensor(c) for c, _ in tokens.values()])]
    for name in ("y", "x", "width", "finished"):
        joined.append(torch.cat([getattr(state, name) for _, state in tokens.values()]))
    logits = one.append(torch.tensor(rows), joined[0], grammar.GridState(*joined[1:]))
    return dict(zip(tokens, logits.split([len(c) for c, _ in tokens.values()]), strict=True))


def close(found, exact):
    np.testing.assert_allclose(np.asarray(found), exact, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["rows", "packed"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_rows_appended_in_pieces_are_those_computed_anew(config, form):
    trunk, prompts, rng = new_trunk(config), new_prompts(5), np.random.default_rng(0)
    one = stores(trunk, prompts)[form]
    grids = [grammar.encode_choices(grid(rng)) for _ in prompts]
    exact = [
        plain_logits(trunk, prompt, choices)
        for prompt, (choices, _) in zip(prompts, grids, strict=True)
    ]
    first = one.read()
    assert first.dtype == torch.float32
    close(first, np.stack([own[0] for own in exact]))
    done = [0] * len(prompts)
    while any(len(choices) > count for (choices, _), count in zip(grids, done, strict=True)):
        ahead = {
            row: min(int(rng.integers(0, 4)), len(choices) - done[row])
            for row, (choices, _) in enumerate(grids)
        }
        now = {
            row: part(*grids[row], slice(done[row], done[row] + count))
            for row, count in ahead.items()
            if count
        }
        for row, logits in (appended(one, now) if now else {}).items():
            close(logits, exact[row][done[row] + 1 : done[row] + ahead[row] + 1])
            done[row] += ahead[row]


@pytest.mark.parametrize("form", ["rows", "packed"])
def test_what_was_taken_back_leaves_no_trace(form):
    trunk, prompts, rng = new_trunk(), new_prompts(4), np.random.default_rng(1)
    one = stores(trunk, prompts)[form]
    one.read()
    old, new = (grammar.encode_choices(rng.integers(0, 10, (4, 3)).astype(np.uint8)) for _ in "on")
    appended(one, dict.fromkeys(range(4), old))
    kept = [0, 3, len(old[0]), 8]
    for row, length in enumerate(kept):
        one.rewind(row, length)
    tokens = {0: part(*new, slice(0, 5)), 1: part(*new, slice(3, 7)), 3: part(*new, slice(8, 9))}
    found = appended(one, tokens)
    for row, (choices, _) in tokens.items():
        path = [*old[0][: kept[row]].tolist(), *choices.tolist()]
        close(found[row], plain_logits(trunk, prompts[row], path)[-len(choices) :])


@pytest.mark.parametrize("form", ["rows", "packed"])
def test_equal_prompts_are_read_once_and_go_on_apart(form):
    trunk, (one, other) = new_trunk(), new_prompts(3)[:2]
    prompts = [one, other, one, one]
    both = stores(trunk, prompts)
    seen = []
    hidden = both[form].trunk.hidden

    def counted(x, *given):
        seen.append(len(x))
        return hidden(x, *given)

    both[form].trunk.hidden = counted
    first = both[form].read()
    assert seen == [len(one.tokens) + len(other.tokens)]
    assert torch.equal(first[0], first[2])
    path = grammar.encode_choices(np.array([[1, 2]], np.uint8))
    found = appended(both[form], {0: part(*path, slice(0, 1)), 3: part(*path, slice(0, 2))})
    for row, length in ((0, 1), (3, 2)):
        exact = plain_logits(trunk, one, path[0][:length].tolist())[1:]
        close(found[row], exact)


def test_released_rows_leave_the_others_as_they_are():
    trunk, prompts = new_trunk(), new_prompts(3)
    path = grammar.encode_choices(np.array([[1, 2]], np.uint8))
    for one in stores(trunk, prompts).values():
        one.read()
        one.release([1])
        found = appended(one, {0: path, 2: path})
        for row in (0, 2):
            close(found[row], plain_logits(trunk, prompts[row], path[0].tolist())[1:])


def test_many_tokens_go_in_several_passes(monkeypatch):
    trunk, prompts = new_trunk(), new_prompts(6)
    path = grammar.encode_choices(np.arange(12).reshape(3, 4).astype(np.uint8) % 10)
    whole = stores(trunk, prompts)["packed"]
    expected = whole.read(), appended(whole, dict.fromkeys(range(6), path))
    monkeypatch.setattr(store, "TOKENS_AT_ONCE", 40)
    split = stores(trunk, prompts)["packed"]
    close(split.read(), expected[0].numpy())
    for row, logits in appended(split, dict.fromkeys(range(6), path)).items():
        close(logits, expected[1][row].numpy())


def test_the_weights_of_a_store_are_those_of_its_making():
    trunk, prompts = new_trunk(INJECTED, dtype=torch.bfloat16), new_prompts(2)
    one = stores(trunk, prompts)["rows"]
    before = one.read()
    trunk.layers[0].o_proj.weight.zero_()
    assert not torch.equal(stores(trunk, prompts)["rows"].read(), before)
    assert torch.equal(one.read(), before)


def test_equal_prompts_are_found_by_what_is_in_them():
    one, other = new_prompts(3)[:2]
    first, place_of = distinct([one, other, new_prompts(3)[2], other])
    assert first.tolist() == [0, 1]
    assert place_of.tolist() == [0, 1, 0, 1]


def test_groups_hold_what_fits_and_at_least_one():
    def parts(rows, places, *bounds):
        return [(own.start, own.stop) for own in groups(rows, places, *bounds)]

    assert parts([1] * 6, [1, 2, 3, 9, 1, 1], 2, 4) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert parts([3, 0, 2, 1], [0] * 4, 3, 1) == [(0, 2), (2, 4)]
    assert parts([], [], 2, 4) == []


def test_ranges_are_laid_end_to_end():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.array([], int), np.array([], int)).tolist() == []


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_the_packed_kernel_passes_over_keys_without_queries(causal):
    """As a store gives them: what a row does not fill is a piece of its own."""
    torch.manual_seed(0)
    begin_k = torch.tensor([2, 40, 300, 301, 310, 350], dtype=torch.int32)
    begin_q = torch.tensor([0, 30, 30, 31, 31, 50], dtype=torch.int32)
    query, key, value = (torch.randn(n, 4, 16, dtype=torch.bfloat16) for n in (50, 360, 360))
    exact = ragged_attention(query, key, value, Pieces(begin_q, begin_k), 30, 260, causal)
    moved = [x.cuda() for x in (query, key, value, begin_q, begin_k)]
    found = ragged_attention(*moved[:3], Pieces(*moved[3:]), 30, 260, causal)
    torch.testing.assert_close(found.cpu(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_rows_on_a_gpu_are_those_of_a_cpu(dtype):
    prompts, logits = new_prompts(20), []
    for device in ("cpu", "cuda"):
        frozen = new_trunk(device=device, dtype=dtype).cast(dtype)
        one = PackedStore(Places(frozen, 10**4), prompts, [ROOM] * 20)
        spelled = grammar.spell([np.full((3, 1 + i % 5), i % 10, np.uint8) for i in range(20)])
        moved = [own.to(device) for own in (spelled.grid, spelled.choices)]
        states = grammar.GridState(*(own.to(device) for own in vars(spelled.states).values()))
        logits.append(torch.cat((one.read(), one.append(*moved, states))).cpu())
    tolerance = 1e-3 if dtype == torch.float32 else 0.06
    difference = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert difference < tolerance

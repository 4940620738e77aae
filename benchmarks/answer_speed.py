"""How fast the trunk answers: grids written, scored and refined, through the functions of `eval`.

    python benchmarks/answer_speed.py --bundled                    # two threads of a CPU, or a GPU
    python benchmarks/answer_speed.py --bundled --max-prompts 3352 --views 8 --profile
    python benchmarks/answer_speed.py --checkpoint runs/pretrain --tasks 4 --dtype bfloat16

The prompts are test inputs of ARC-AGI-1 evaluation tasks, drawn with a fixed seed, under `--views`
views each. The grids scored are what the reader wrote for all views of a test input, at most eight.
"following" are drafts: the answer of another view, or the input. TRM refines hidden cells of the
likeliest size, one step. Ways take turns `--repeats` times; a time is the least of them. "floor" is
what the machine allows, measured in the same run: 2 operations for each weight of a layer and
token, at the rate of a matrix product; on a GPU at least the bytes of the weights for each token of
the longest grid, and of filled keys and values for each token written, at the rate of a copy.
mdlARC's decoder (75.5M weights) writes 25 grids/s on one H200.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from arctrm.config import InferenceConfig, TaskChoiceConfig
from arctrm.console import console
from arctrm.data.task import Grid
from arctrm.errors import ConfigError
from arctrm.model.trunk import Trunk
from arctrm.reader.decoding import Decoded
from arctrm.reader.grammar import num_tokens
from arctrm.reader.tiny import TinyReader
from arctrm.solve.propose import prompt_of, refine, write
from arctrm.solve.questions import Key, Question, all_questions, load_test_set
from arctrm.solve.rank import judged
from arctrm.solve.weights import load_solver
from arctrm.system import git_revision, processor
from common import guarded

MOST_GRIDS = 8


@dataclass
class Way:
    """Something that is timed."""

    work: Callable[[], list]
    grids: int = 0
    tokens: int = 0
    """Output tokens."""
    floor: float = 0.0
    """Seconds."""
    seconds: float = float("inf")


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    solver = load_solver(args.checkpoint, InferenceConfig(dtype=args.dtype), device)
    reader, trunk = solver.reader, solver.model
    if not isinstance(reader, TinyReader) or not isinstance(trunk, Trunk):
        raise ConfigError(f"{solver.name}: holds no reader on a trunk; give a checkpoint with one")
    tasks, _ = load_test_set(TaskChoiceConfig())
    order = np.random.default_rng(1).permutation(len(tasks))[: args.tasks]
    asked = all_questions(solver, [tasks[i] for i in order], args.views, 0)
    if args.max_prompts is not None and len(asked) > args.max_prompts:
        kept = np.linspace(0, len(asked) - 1, args.max_prompts).astype(int)
        asked = [asked[i] for i in kept]

    # 1. What is written once tells how much there is to do.
    ways = {"writing": Way(lambda: write(reader, asked, follow=False))}
    written = write(reader, asked)  # also warms up
    if reader.follows_drafts:
        ways["writing, following"] = Way(lambda: write(reader, asked))
    grids, alone = proposed(asked, written), solver.refiner
    ways["scoring"] = Way(lambda: judged(reader, asked, grids))
    if alone is not None:
        ways["refining, one step"] = Way(lambda: refine(alone, asked, None, num_steps=1))
    count_work(ways, asked, written, grids, reader, trunk)

    # 2. The ways take turns.
    same: dict[str, int] = {}
    for number in range(args.repeats):
        for name, way in ways.items():
            begin = time.perf_counter()
            found = way.work()
            way.seconds = min(way.seconds, time.perf_counter() - begin)
            if name.startswith("writing") and number == 0:
                both = zip(found, written, strict=True)
                same[name] = sum(one.choices == other.choices for one, other in both)
    show(ways, same, asked, written, reader, args)
    if args.profile:
        show_profile(ways["writing"].work)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, default=None)
    weights.add_argument("--bundled", action="store_true", help="the default")
    parser.add_argument("--tasks", type=int, default=400)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--max-prompts", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--profile", action="store_true", help="time by kernel of writing")
    args = parser.parse_args()
    if args.max_prompts is None and (args.cpu or not torch.cuda.is_available()):
        args.max_prompts = 32
    return args


def proposed(asked: list[Question], written: list[Decoded]) -> dict[Key, list[Grid]]:
    """Different grids that were written for each test input."""
    found: dict[Key, dict[bytes, Grid]] = {}
    for question, one in zip(asked, written, strict=True):
        grid = question.turned_back(one.grid)
        own = found.setdefault(question.key, {})
        if grid is not None and len(own) < MOST_GRIDS:
            own.setdefault(bytes(grid.shape) + grid.tobytes(), grid)
    return {key: list(own.values()) for key, own in found.items()}


def count_work(
    ways: dict[str, Way],
    asked: list[Question],
    written: list[Decoded],
    grids: dict[Key, list[Grid]],
    reader: TinyReader,
    trunk: Trunk,
) -> None:
    """Grids, tokens and the floor of each way."""
    prompts = np.array([len(prompt_of(question).tokens) for question in asked])
    outputs = np.array([one.num_tokens for one in written])
    scored = [num_tokens(grid) for question in asked for grid in grids[question.key]]
    refined = sum(height * (width + 1) + 1 for height, width in (one.shape for one in asked))
    plain = len(asked), int(outputs.sum()), prompts.sum()
    sizes = {
        "writing": plain,
        "writing, following": plain,
        "scoring": (len(scored), sum(scored), prompts.sum()),
        "refining, one step": (len(asked), refined, prompts.sum()),
    }
    copies, products = rates(reader.device, reader.dtype)
    looped = sum(p.numel() for p in trunk.layers.parameters()) * trunk.config.loops
    per_token = looped + sum(p.numel() for p in trunk.injections.parameters())
    place = 2 * trunk.config.depth * trunk.width
    for name, way in ways.items():
        way.grids, way.tokens, read = sizes[name]
        way.floor = 2 * per_token * (way.tokens + read) / products
        if name == "writing" and reader.device.type == "cuda":
            held = (outputs * (prompts + outputs / 2)).sum() * place
            moved = (per_token * outputs.max() + held) * reader.dtype.itemsize
            way.floor = max(way.floor, float(moved) / copies)


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a large copy, read and written; operations per second of a product."""
    gpu, repeats = device.type == "cuda", 5
    source = torch.ones(2**31 if gpu else 2**27, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    size = 8192 if gpu else 1024
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")

    def seconds(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(repeats):
            begin = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
        return best

    copies = 2 * len(source) / seconds(lambda: target.copy_(source))
    return copies, 2 * size**3 / seconds(lambda: one @ other)


def show(
    ways: dict[str, Way],
    same: dict[str, int],
    asked: list[Question],
    written: list[Decoded],
    reader: TinyReader,
    args: argparse.Namespace,
) -> None:
    gpu, kind = reader.device.type == "cuda", str(reader.dtype).removeprefix("torch.")
    where = torch.cuda.get_device_name() if gpu else f"{processor()}, {args.threads} threads"
    title = f"answering, {git_revision()[:12]}, {where}, {kind}"
    tokens = np.mean([one.num_tokens for one in written])
    prompts = np.mean([len(prompt_of(question).tokens) for question in asked])
    caption = f"tokens of a prompt {prompts:.0f}, of a grid {tokens:.0f} (means)"
    table = Table(title=title, caption=caption, title_justify="left")
    for column in ("way", "grids", "seconds", "grids/s", "tokens/s", "floor, s", "the same"):
        table.add_column(column)
    for name, way in ways.items():
        rate, speed = way.grids / way.seconds, way.tokens / way.seconds
        numbers = f"{way.seconds:.2f}", f"{rate:.2f}", f"{speed:,.0f}", f"{way.floor:.2f}"
        alike = f"{same[name]} of {len(asked)}" if name in same else ""
        table.add_row(name, str(way.grids), *numbers, alike)
    console().print(table)


def show_profile(work: Callable[[], object]) -> None:
    """Time of `work` by kernel of the GPU, or by operator of the CPU."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as trace:
        work()
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    console().print(trace.key_averages().table(sort_by=key, row_limit=25), markup=False)


if __name__ == "__main__":
    guarded(main)

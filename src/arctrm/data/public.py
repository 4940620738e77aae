"""Public sets: tasks and pairs from public repositories, the same for everybody who makes them.

`arctrm data build NAME` downloads one commit of a repository and checks the SHA-256 of its files.
ConceptARC's files are tasks. RE-ARC and ARC-GEN are programs: pair n of a task is what its
generator makes after `random.seed("<task id> <n>")`. The SHA-256 of the made set is checked, too.
"""

import gzip
import hashlib
import json
import random
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from http.client import HTTPException
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import MagicMock
from urllib.error import URLError
from urllib.request import urlopen
from zipfile import BadZipFile, ZipFile

from rich.progress import DownloadColumn, Progress, TextColumn, track

from arctrm.console import note, progress_console
from arctrm.data.overlap import describe, find_overlaps
from arctrm.data.parse import parse_pairs
from arctrm.data.sources import PUBLIC, load_tasks, public_path
from arctrm.data.task import held_out_ids
from arctrm.errors import DataError
from arctrm.system import hold, write_bytes_atomically

URL = "https://github.com/{repository}/archive/{commit}.zip"
EVALUATED = ("evaluation", "evaluation2")
NUM_KEPT_OUT = 60  # training tasks, the first by the hash of their ids, that nothing is trained on
MAX_SEEDS = 400  # seeds that are tried for each task
MAX_DRAWS = 20_000  # random numbers that one pair may take: some generators never end

Pairs = list[dict[str, Any]]
Generators = dict[str, Callable[[], Any]]
"""Task id -> maker of a random pair, which raises where its draw gives none."""


def _re_arc() -> Generators:
    for name in ("matplotlib", "matplotlib.pyplot", "matplotlib.colors"):
        sys.modules[name] = MagicMock()  # the programs import it, for drawing alone
    make, solve = (vars(import_module(name)) for name in ("generators", "verifiers"))

    def verified(task_id: str) -> Any:
        pair = make[f"generate_{task_id}"](0, 1)  # of any difficulty
        is_right = solve[f"verify_{task_id}"](pair["input"]) == pair["output"]
        return pair if is_right and pair["input"] != pair["output"] else None

    names = [name.partition("_") for name in make if name.startswith("generate_")]
    return {task_id: partial(verified, task_id) for _, _, task_id in names}


def _arc_gen() -> Generators:
    tasks = import_module("task_list").task_list()
    return {task_id: generator for task_id, (generator, _) in tasks.items()}


@dataclass(frozen=True)
class PublicSet:
    """One set: where it comes from, and how it is made."""

    repository: str  # owner/name on GitHub
    commit: str
    licence: str
    files: str  # regular expression of the files that are used
    files_sha256: str  # over path and content of these files
    generators: Callable[[], Generators] | None = None  # None: the files are tasks
    num_pairs: int = 0  # of each ARC-AGI-1 training task
    num_new_pairs: int = 0  # of each other task


_CONCEPT_ARC = PublicSet(
    "victorvikram/ConceptARC",
    "b22ef526b4656679816b7811e78f55cc24d736d7",
    "MIT",
    r"corpus/\w+/[A-Za-z]\w*\.json",
    "92f3718c97f0fdbc9258cb8bc4e613cb278714c85e0291a18159133beacbc5cf",
)
_RE_ARC = PublicSet(
    "michaelhodel/re-arc",
    "e5b7f1d06362a76f9d3b8c25154ff1fafca897ce",
    "MIT",
    r"(dsl|generators|utils|verifiers)\.py",
    "f50a17fbca4b5499bf4b55134982f53e709555826c881fbc6a47a4e9bb618e11",
    _re_arc,
    num_pairs=40,
)
_ARC_GEN = PublicSet(
    "google/ARC-GEN",
    "a15cbdb44c776610aeeb9f487a06af875d3d0878",
    "Apache-2.0",
    r"(common|task_list|tasks/task_[0-9a-f]{8})\.py",
    "83c12b61de7957c9847f09893c7f474da1fc7d28b79120ee97132dadf3b2c1a8",
    _arc_gen,
    num_pairs=40,
    num_new_pairs=80,
)
PUBLIC_SETS = {
    "concept_arc": _CONCEPT_ARC,
    "re_arc": replace(_RE_ARC, num_pairs=100),
    "re_arc_40": _RE_ARC,
    "arc_gen": _ARC_GEN,
}


def make(name: str, archive: Path | None = None) -> str:
    """Make the public set `name`, where it is not yet made, from the zip file `archive` or a
    download; a report of it. After an interruption it goes on with the next task.

    Raises:
        DataError: no such set, no network, or another content than expected.
    """
    if name not in PUBLIC_SETS:
        raise DataError(f"{name}: no such public set; there are {', '.join(PUBLIC_SETS)}")
    wanted, path = PUBLIC_SETS[name], public_path(name)
    if not path.is_file():
        with hold(path.parent), TemporaryDirectory() as folder:
            _unpack(archive or _downloaded(wanted, Path(folder)), wanted, Path(folder))
            if wanted.generators is None:
                files = Path(folder).rglob("*.json")
                made = {file.stem: json.loads(file.read_bytes()) for file in files}
            else:
                made = _generated(name, wanted.generators, folder, path)
            content = json.dumps(made, sort_keys=True, separators=(",", ":")).encode()
            if (got := hashlib.sha256(content).hexdigest()) != PUBLIC[name]:
                _part(path).unlink(missing_ok=True)
                both = f"the set that was made has the SHA-256 {got}, expected {PUBLIC[name]}"
                raise DataError(f"{name}: {both}; try another version of Python")
            write_bytes_atomically(path, gzip.compress(content, mtime=0))
            _part(path).unlink(missing_ok=True)
    # The report, with the tasks that the overlap guard will find in the set.
    tasks = load_tasks(name)
    evaluated = [task for source in EVALUATED for task in load_tasks(source)]
    num_pairs = sum(len(task.demonstrations) + len(task.test) for task in tasks)
    leaks = describe(find_overlaps({name: tasks}, evaluated)) or "none"
    return (
        f"{name}: {len(tasks):,} tasks, {num_pairs:,} pairs in {path}\n"
        f"from {wanted.repository} at {wanted.commit} ({wanted.licence})\n"
        f"SHA-256 of its JSON: {PUBLIC[name]}\n"
        f"tasks that hold test content of {' or '.join(EVALUATED)}: {leaks}"
    )


def _downloaded(wanted: PublicSet, folder: Path) -> Path:
    """The archive of the repository, in `folder`."""
    path, url = folder / "archive.zip", URL.format(**vars(wanted))
    columns = (TextColumn("{task.description}"), DownloadColumn())
    with path.open("wb") as file, Progress(*columns, console=progress_console()) as progress:
        try:
            with urlopen(url, timeout=60) as answer:
                size = answer.headers["Content-Length"]
                bar = progress.add_task(url, total=int(size) if size else None)
                while block := answer.read(2**16):
                    file.write(block)
                    progress.advance(bar, len(block))
        except (URLError, HTTPException, TimeoutError) as error:
            reason = getattr(error, "reason", None) or error
            cure = "download it on a machine with a network and give it by --archive"
            raise DataError(f"{url}: cannot be downloaded ({reason}); {cure}") from error
    return path


def _unpack(archive: Path, wanted: PublicSet, folder: Path) -> None:
    """Write the files of the set into `folder`; DataError where they are not the expected ones."""
    digest, used = hashlib.sha256(), re.compile(rf"(?:[^/]+/)?({wanted.files})")
    try:
        with ZipFile(archive) as packed:
            found = [(used.fullmatch(name), name) for name in packed.namelist()]
            for name, member in sorted((match[1], name) for match, name in found if match):
                content = packed.read(member)
                digest.update(f"{name} {len(content)}\n".encode() + content)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
    except (OSError, BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        cure = f"download {URL.format(**vars(wanted))} again"
        raise DataError(f"{archive}: cannot be read as a zip file ({reason}); {cure}") from error
    if digest.hexdigest() != wanted.files_sha256:
        origin = f"{wanted.repository} at commit {wanted.commit[:12]}"
        both = f"SHA-256 {digest.hexdigest()}, expected {wanted.files_sha256}"
        cure = f"download {URL.format(**vars(wanted))}"
        raise DataError(f"{archive}: holds other files than {origin} ({both}); {cure}")


# --- Generated sets


def _part(path: Path) -> Path:
    """Where the finished tasks of a set stand until it is whole: a line for each."""
    return path.with_name(f"{path.name}.part")


def _generated(
    name: str, find: Callable[[], Generators], folder: str, path: Path
) -> dict[str, Any]:
    """Task id -> pairs, by the programs in `folder`."""
    wanted, part = PUBLIC_SETS[name], _part(path)
    lines = part.read_text().splitlines(keepends=True) if part.is_file() else []
    done = dict(json.loads(line) for line in lines if line.endswith("\n"))
    training, evaluated, kept_out = _reserved()
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends this process, which ends the others
    with get_context("spawn").Pool(None, signal.signal, ignore) as pool, part.open("w") as file:
        file.writelines(line for line in lines if line.endswith("\n"))
        known = set(pool.apply(_known, (folder, find)))
        note(
            f"{name}: without the generators of {len(known & evaluated)} evaluation tasks and of "
            f"{len(known & kept_out)} training tasks that are kept out"
        )
        jobs = [
            (task_id, wanted.num_pairs if task_id in training else wanted.num_new_pairs)
            for task_id in sorted(known - evaluated - kept_out - done.keys())
        ]
        made = pool.imap_unordered(partial(_pairs, folder, find), jobs)
        for task_id, pairs in track(made, name, len(jobs), console=progress_console()):
            done[task_id] = pairs
            file.write(json.dumps([task_id, pairs]) + "\n")
            file.flush()
    return done


def _reserved() -> tuple[set[str], set[str], set[str]]:
    """Ids of the ARC-AGI-1 training tasks, of evaluation tasks, of the kept-out tasks."""
    ids = lambda source: {task.id for task in load_tasks(source)}
    training = ids("training")
    evaluated = set().union(*map(ids, EVALUATED))
    return training, evaluated, held_out_ids(training, NUM_KEPT_OUT)


# What follows runs in processes of its own, whose `random` is replaced.


class _Draws(random.Random):
    """Python's generator, which raises OverflowError after MAX_DRAWS numbers."""

    left = 0

    def random(self) -> float:
        self._count()
        return super().random()

    def getrandbits(self, k: int, /) -> int:
        self._count()
        return super().getrandbits(k)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OverflowError


@cache
def _programs(folder: str, find: Callable[[], Generators]) -> tuple[Generators, _Draws]:
    draws = _Draws()
    for name in random.__all__:
        if hasattr(draws, name) and not isinstance(getattr(random, name), type):
            setattr(random, name, getattr(draws, name))
    sys.path.insert(0, folder)
    return find(), draws


def _known(folder: str, find: Callable[[], Generators]) -> list[str]:
    return list(_programs(folder, find)[0])


def _pairs(folder: str, find: Callable[[], Generators], job: tuple[str, int]) -> tuple[str, Pairs]:
    """A task id and its first distinct pairs that are valid, in the order of their seeds."""
    (task_id, count), (generators, draws) = job, _programs(folder, find)
    texts: dict[str, None] = {}
    for number in range(MAX_SEEDS):
        if len(texts) == count:
            break
        draws.left = MAX_DRAWS
        draws.seed(f"{task_id} {number}")
        try:
            pair = json.loads(json.dumps(generators[task_id]()))
            parse_pairs([pair], task_id)
        except Exception:  # whatever a program of others raises: this seed gives no pair
            continue
        texts[json.dumps({side: pair[side] for side in ("input", "output")})] = None
    return task_id, [json.loads(text) for text in texts]

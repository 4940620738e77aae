"""Public sets: the expected files become the expected set, once; everything else is refused."""

import gzip
import hashlib
import itertools
import json
import random
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from zipfile import ZipFile

import pytest

from arctrm.config.data import DataConfig
from arctrm.data import public
from arctrm.data.base_set import build
from arctrm.data.public import NUM_KEPT_OUT, make
from arctrm.data.sources import PUBLIC, load_tasks, public_path
from arctrm.data.task import held_out_ids
from arctrm.errors import DataError

TASK = {
    "train": [{"input": [[1, 2]], "output": [[5]]}],
    "test": [{"input": [[3]], "output": [[6]]}],
}
CORPUS = {f"corpus/Same/Same{n}.json": json.dumps(TASK) for n in (1, 2)}
TRAINING = sorted(task.id for task in load_tasks("training"))
KEPT_OUT = held_out_ids(TRAINING, NUM_KEPT_OUT)
FIRST, SECOND = [i for i in TRAINING if i not in KEPT_OUT][:2]
EVALUATED = load_tasks("evaluation", max_tasks=1)[0].id
GENERATORS = "\n".join(
    [
        "import matplotlib.pyplot as plt",
        "from random import randint",
        *(
            f"def generate_{i}(low, high):\n"
            "    while randint(0, 9) == 0: low = [randint(0, 9) for _ in iter(int, 1)]\n"  # endless
            "    return {'input': ((randint(0, 9),),), 'output': ((1, 1),)}"
            for i in (FIRST, SECOND, EVALUATED, min(KEPT_OUT))
        ),
    ]
)
VERIFIERS = "\n".join(
    f"def verify_{i}(grid): return ((1, 1),) if grid[0][0] < 8 else grid" for i in (FIRST, SECOND)
)


def packed(path, files):
    with ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"repository-{path.stem}/{name}", text)
    return path


def sha256(files):
    parts = (f"{name} {len(text)}\n{text}" for name, text in sorted(files.items()))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The folder of made sets; two sets of this test's files; an address where nobody listens."""
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *names: folder)
    monkeypatch.setattr(public, "URL", "http://127.0.0.1:9/{commit}.zip")
    corpus = replace(public.PUBLIC_SETS["concept_arc"], commit="abc", files_sha256=sha256(CORPUS))
    content = json.dumps({"Same1": TASK, "Same2": TASK}, sort_keys=True, separators=(",", ":"))
    monkeypatch.setitem(public.PUBLIC_SETS, "concept_arc", corpus)
    monkeypatch.setitem(PUBLIC, "concept_arc", hashlib.sha256(content.encode()).hexdigest())
    return folder


def test_a_downloaded_set_is_a_source_by_its_name_and_is_made_once(tmp_path, monkeypatch, kept):
    (tmp_path / "served").mkdir()
    packed(tmp_path / "served/abc.zip", CORPUS | {"corpus/README.md": "no task"})
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(quiet, directory=tmp_path / "served")
    ) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        monkeypatch.setattr(public, "URL", f"http://127.0.0.1:{web.server_port}/{{commit}}.zip")
        report = make("concept_arc")
        web.shutdown()
    assert "concept_arc: 2 tasks, 4 pairs" in report
    assert PUBLIC["concept_arc"] in report
    assert make("concept_arc", tmp_path / "no file") == report
    assert [task.id for task in load_tasks("concept_arc")] == ["Same1", "Same2"]
    base, _ = build(DataConfig(subsets=("concept_arc",), test_set=None))
    assert base.meta.counts == {"concept_arc": dict(tasks=2, demonstrations=2, test_pairs=2)}


def test_without_a_network_the_archive_is_asked_for_and_nothing_is_left(kept):
    with pytest.raises(DataError, match=r"abc\.zip: cannot be downloaded \(.*refused.*--archive"):
        make("concept_arc")
    assert [path.name for path in kept.iterdir()] == [".lock"]
    with pytest.raises(DataError, match=r"concept_arc: .* make it by `arctrm data build"):
        load_tasks("concept_arc")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (CORPUS | {"corpus/Same/Same3.json": json.dumps(TASK)}, "holds other files than"),
        ({"README.md": "another repository"}, "holds other files than"),
        (None, "cannot be read as a zip file"),
    ],
)
def test_another_archive_is_refused(files, said, tmp_path, kept):
    archive = tmp_path / "given.zip"
    archive.write_text("<html>") if files is None else packed(archive, files)
    with pytest.raises(DataError, match=rf"given\.zip: {said}.*abc\.zip"):
        make("concept_arc", archive)
    assert not list(kept.glob("*.json.gz"))


def test_an_unknown_set_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"re_arc_7: .*concept_arc, re_arc, re_arc_40, arc_gen"):
        make("re_arc_7")


def pairs_of(task_id, count):
    """What the generator above makes: seeds that end, inputs that the verifier accepts, once."""
    found, seeds = {}, itertools.count()
    while len(found) < count:
        random.seed(f"{task_id} {next(seeds)}")
        if random.randint(0, 9) and (colour := random.randint(0, 9)) < 8:
            found[colour] = {"input": [[colour]], "output": [[1, 1]]}
    return list(found.values())


@pytest.mark.slow
def test_a_generated_set_follows_from_seeds_and_an_interrupted_run_goes_on(
    tmp_path, monkeypatch, kept
):
    programs = {
        "generators.py": GENERATORS,
        "verifiers.py": VERIFIERS,
        "dsl.py": "",
        "utils.py": "",
    }
    archive = packed(tmp_path / "abc.zip", programs)
    row = replace(public.PUBLIC_SETS["re_arc"], files_sha256=sha256(programs), num_pairs=5)
    monkeypatch.setitem(public.PUBLIC_SETS, "re_arc", row)
    # Nothing of the evaluated task and of the task that is kept out.
    expected = {task_id: pairs_of(task_id, 5) for task_id in (FIRST, SECOND)}
    content = json.dumps(expected, sort_keys=True, separators=(",", ":")).encode()
    monkeypatch.setitem(PUBLIC, "re_arc", hashlib.sha256(content).hexdigest())
    asked = []

    def interrupted(made, name, total, **_):
        asked.append(total)
        yield next(made)
        raise KeyboardInterrupt

    monkeypatch.setattr(public, "track", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make("re_arc", archive)
    monkeypatch.setattr(public, "track", lambda made, name, total, **_: asked.append(total) or made)
    assert "re_arc: 2 tasks, 10 pairs" in make("re_arc", archive)
    assert asked == [2, 1]
    assert gzip.decompress(public_path("re_arc").read_bytes()) == content
    assert [path.name for path in kept.iterdir() if ".part" in path.name] == []


def test_another_content_than_expected_is_refused(tmp_path, monkeypatch, kept):
    monkeypatch.setitem(PUBLIC, "concept_arc", "0" * 64)
    with pytest.raises(DataError, match=r"concept_arc: .* SHA-256 [0-9a-f]{64}, expected 000"):
        make("concept_arc", packed(tmp_path / "abc.zip", CORPUS))
    assert not list(kept.glob("*.json.gz"))


@pytest.mark.parametrize("name", PUBLIC)
def test_the_sha256_of_every_set_is_known(name):
    assert len(PUBLIC[name]) == len(public.PUBLIC_SETS[name].files_sha256) == 64
    assert len(public.PUBLIC_SETS[name].commit) == 40 or name == "concept_arc"

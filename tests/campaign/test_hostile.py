"""Checkpoints from strangers: refused in one sentence, within five seconds and a gibibyte."""

import json
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arctrm.cli import describe_error
from arctrm.config import InferenceConfig
from arctrm.errors import ArctrmError
from arctrm.solve.weights import load_solver

SECONDS, MEMORY = 5, 2**30


def told(**changes):
    """Metadata with other keys of the stored configuration, `table__key`, or at the top."""

    def make(folder: Path) -> Path:
        file = next(folder.glob("run/checkpoints/*/checkpoint.json"))
        content = json.loads(file.read_text())
        for name, value in changes.items():
            *tables, key = name.split("__")
            place = content["config"] if tables else content
            for table in tables[1:] if tables[:1] == ["config"] else tables:
                place = place[table]
            place[key] = value
        file.write_text(json.dumps(content))
        return folder / "run"

    return make


def text(content: str):
    def make(folder: Path) -> Path:
        next(folder.glob("run/checkpoints/*/checkpoint.json")).write_text(content)
        return folder / "run"

    return make


def tensors(change, header=None):
    """Other tensors, or another header, in a file whose size the metadata names."""

    def make(folder: Path) -> Path:
        file = next(folder.glob("run/checkpoints/*/model.safetensors"))
        found = load_file(file)
        change(found)
        size = file.stat().st_size
        save_file(found, file)
        if header is not None:
            data = json.dumps(header).encode() if isinstance(header, dict) else header
            file.write_bytes(struct.pack("<Q", len(data)) + data)
        meta = file.with_name("checkpoint.json")
        meta.write_text(meta.read_text().replace(f": {size}", f": {file.stat().st_size}"))
        return folder / "run"

    return make


def published(**config):
    """The reference checkpoint with another configuration."""

    def make(folder: Path) -> Path:
        path = folder / "published.safetensors"
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            own = json.loads(json.loads(file.read(length))["__metadata__"]["config"])
        save_file(load_file(path), path, {"config": json.dumps(own | config)})
        return path

    return make


def reference(change):
    def make(folder: Path) -> Path:
        path = folder / "published.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)
        return path

    return make


def pickled(content):
    def make(folder: Path) -> Path:
        path = folder / "step_1"
        torch.save(content() if callable(content) else content, path)
        return path

    return make


class Builds:
    """Unpickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def zip_bomb(folder: Path) -> Path:
    path = folder / "step_1"
    torch.save({"puzzle_emb.weights": torch.zeros(2**26)}, path)
    with zipfile.ZipFile(path) as packed:
        parts = {name: packed.read(name) for name in packed.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in parts.items():
            packed.writestr(name, data)
    return path


def bare_pickle(folder: Path) -> Path:
    (folder / "step_1").write_bytes(pickle.dumps(Builds(os.system, "touch pwned")))
    return folder / "step_1"


FAR = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
NAMES = "ema.trunk.layers.{}.o_proj.weight"
HOSTILE = {
    "layers": told(config__trunk__num_layers=300_000),
    "layers times loops": told(config__trunk__num_layers=256, config__trunk__loops=256),
    "width": told(config__trunk__hidden_size=2**40),
    "infinite expansion": told(config__trunk__expansion=float("inf")),
    "wide": told(config__trunk__hidden_size=16384, config__trunk__expansion=64.0),
    "heads": told(config__trunk__num_heads=20_000),
    "supervision steps": told(config__trm__halt_max_steps=10**9),
    "slots": told(config__coupling={"num_context_slots": 10**12}),
    "ways of scaling": told(
        config__data__scaling={"share": 0.5, "factors": [[6, 6]] * 20_000, "shapes": []}
    ),
    "task ids": told(task_ids=["x"] * 20_000, task_fingerprints=["x"] * 20_000),
    "processes": told(world_size=2**40),
    "steps": told(step=-1),
    "deep metadata": text("[" * 10**6),
    "metadata of 300 MiB": text(" " * (300 * 2**20)),
    "metadata of small parts": text(f"[{'[],' * 10**7}0]"),
    "version": told(version=10**400),
    "20,000 tensors": tensors(
        lambda t: t.update({NAMES.format(n): torch.zeros(0) for n in range(20_000)})
    ),
    "not a number": tensors(lambda t: t["ema.trunk.norm"].fill_(float("nan"))),
    "shapes beyond the file": tensors(lambda t: None, {"weights.trunk.norm": FAR}),
    "deep header": tensors(lambda t: None, b"[" * 10**6),
    "long header": tensors(lambda t: None, b" " * (150 * 2**20)),
    "cycles": published(H_cycles=10**7),
    "cycles of L": published(L_cycles=10**5),
    "infinite theta": published(rope_theta=1e999),
    "prefix": published(puzzle_emb_len=10**5),
    "steps of the reference": published(halt_max_steps=10**5),
    "20,000 layers": reference(
        lambda t: t.update({f"L_level.layers.{n}.x": torch.zeros(0) for n in range(20_000)})
    ),
    "expanded to 2 TB": pickled(lambda: {"a": torch.zeros(1).expand(10**6, 5 * 10**5)}),
    "a zip bomb": zip_bomb,
    "a terabyte by call": pickled({"a": Builds(bytearray, 10**12)}),
    "a command": pickled({"a": Builds(os.system, "touch pwned")}),
    "a bare pickle": bare_pickle,
}


def in_a_child(path: Path) -> tuple[str, float]:
    """How loading ends in a process that may take so much more memory, and its seconds."""
    begin, (reader, writer) = time.monotonic(), os.pipe()
    if (child := os.fork()) == 0:
        said = "loaded"
        try:
            held = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
            resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, held + MEMORY))
            load_solver(path, InferenceConfig(), torch.device("cpu"))
        except ArctrmError as error:
            sentence, code = describe_error(error)
            said = f"refused {code}: {sentence}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, said.encode()[:4000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said or "killed", time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits memory through /proc")
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_time_and_memory(make, seeds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(seeds / "run", tmp_path / "run")
    for name in ("published.safetensors", "identifiers.json"):
        shutil.copy(seeds / name, tmp_path / name)
    said, seconds = in_a_child(make(tmp_path))
    assert said.startswith("refused 2: error: "), said
    assert seconds < SECONDS
    assert not Path("pwned").exists()


def test_the_checkpoints_behind_them_load(seeds):
    for path in ("run", "published.safetensors"):
        assert load_solver(seeds / path, InferenceConfig(), torch.device("cpu")).refiner

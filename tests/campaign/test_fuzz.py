"""Files from anywhere through the public loaders: loaded, or refused in one clean sentence.

`CAMPAIGN_SECONDS=600 python -m pytest tests/campaign -m slow -s -n 0` runs longer, and
`CAMPAIGN_SEED` repeats a run. What it finds becomes a plain test in `test_findings.py`.
"""

import gzip
import random
import re
import shutil
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch
from mutator import SECONDS, SEED, WORDS, some_bytes, some_json, some_safetensors
from seed_files import eval_config

from arctrm.cli import describe_error
from arctrm.config import InferenceConfig, PretrainConfig, TrackingConfig
from arctrm.config.base import all_fields
from arctrm.config.commands import COMMANDS
from arctrm.config.load import load_config, shipped_configs
from arctrm.data.base_set import open_base_set
from arctrm.data.sources import load_tasks
from arctrm.errors import ArctrmError
from arctrm.model.reference import read_reference_file, reference_views
from arctrm.solve.evaluate import evaluate
from arctrm.solve.results import read_candidates, read_submission
from arctrm.solve.weights import load_solver
from arctrm.train.tracking import Tracker

LONGEST, SLOWEST = 700, 5.0  # characters of a sentence, seconds of a load
CPU = torch.device("cpu")


def complaint(load) -> str | None:
    """What is wrong about the end of `load`; None where it loads or refuses well."""
    begin = time.monotonic()
    sentence, code = "", 0
    try:
        load()
    except Exception as error:
        sentence, code = describe_error(error)
        if not isinstance(error, ArctrmError):
            return f"internal error: {type(error).__name__}: {str(error)[:300]}"
    if code not in (0, 2):
        return f"exit code {code}: {sentence[:300]}"
    if len(sentence) > LONGEST:
        return f"{len(sentence)} characters: {sentence[:200]}"
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in sentence):
        return f"control characters: {sentence[:300]!r}"
    if (seconds := time.monotonic() - begin) > SLOWEST:
        return f"{seconds:.1f} s: {sentence[:200]}"
    return None


# --- One way to make an input and a loader for it, each: (rng, seeds, a new folder) -> loader


def changed(rng, seeds: Path, name: str, folder: Path, change) -> Path:
    """The file `name` of the seeds, changed, at the same place in `folder`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(change(rng, (seeds / name).read_bytes()))
    return path


def a_task(rng, seeds, folder):
    name = rng.choice(sorted(p.name for p in (seeds / "tasks").iterdir()))
    path = changed(rng, seeds, f"tasks/{name}", folder, some_json)
    if rng.random() < 0.2:
        packed = gzip.compress(path.read_bytes(), 1)
        path = path.with_name(f"{path.name}.gz")
        path.write_bytes(some_bytes(rng, packed) if rng.random() < 0.5 else packed)
    return lambda: load_tasks(str(path))


def kaggle_files(rng, seeds, folder):
    shutil.copytree(seeds / "kaggle", folder / "kaggle")
    name = rng.choice(("a_challenges.json", "a_solutions.json"))
    changed(rng, seeds, f"kaggle/{name}", folder, some_json)
    source = folder / rng.choice(("kaggle", "kaggle/a_challenges.json"))
    return lambda: load_tasks(str(source))


def a_toml(rng, seeds, folder):
    text = rng.choice(list(shipped_configs().values())).read_bytes()
    lines = [some_bytes(rng, text)] if rng.random() < 0.5 else [text]
    lines += [odd_setting(rng).encode("utf-8", "surrogatepass") for _ in range(rng.randint(0, 3))]
    path = folder / "a.toml"
    path.write_bytes(b"\n".join(rng.sample(lines, len(lines))))
    return lambda: load_config(COMMANDS[rng.choice(list(COMMANDS))], [path])


def an_override(rng, seeds, folder):
    model = COMMANDS[rng.choice(list(COMMANDS))]
    given = [odd_setting(rng, model) for _ in range(rng.randint(1, 3))]
    return lambda: load_config(model, (), given)


NUMBERS = ("-1", "0", "1e9", "1e400", "nan", "-inf", "9" * 5000, "0x10", "1_000", "1979-05-27")


def odd_setting(rng, model=PretrainConfig) -> str:
    key = rng.choice([".".join(path) for path in all_fields(model)])
    key = rng.choice((key, key, key, f"{key}.x", "a." * 1000 + "a", rng.choice(WORDS)))
    word = rng.choice((*NUMBERS, *WORDS, "[" * 3000, "{a=" * 2000, "[1, 2]", "{x = 1}", '"a"'))
    text = f"{key}={word}" if rng.random() < 0.9 else word
    return (
        text
        if rng.random() < 0.7
        else some_bytes(rng, text.encode("utf-8", "replace")).decode("utf-8", "replace")
    )


def a_record(rng, seeds, folder):
    path = changed(rng, seeds, "run/config.json", folder, some_json)
    return lambda: load_config(PretrainConfig, record=path)


def a_metrics_file(rng, seeds, folder):
    changed(rng, seeds, "run/metrics.jsonl", folder, some_bytes)

    def load():
        with Tracker(folder / "run", TrackingConfig(), {}, resume_step=1):
            pass

    return load


def metadata(rng, seeds, folder):
    shutil.copytree(seeds / "run" / "checkpoints", folder / "run" / "checkpoints")
    name = next(seeds.glob("run/checkpoints/*/checkpoint.json")).relative_to(seeds)
    changed(rng, seeds, str(name), folder, some_json)
    return lambda: load_solver(folder / "run", InferenceConfig(), CPU)


def weights(rng, seeds, folder):
    shutil.copytree(seeds / "run" / "checkpoints", folder / "run" / "checkpoints")
    name = next(seeds.glob("run/checkpoints/*/model.safetensors")).relative_to(seeds)
    path = changed(rng, seeds, str(name), folder, some_safetensors)
    told, size = path.with_name("checkpoint.json"), (seeds / name).stat().st_size
    text = told.read_text().replace(f": {size}", f": {path.stat().st_size}")
    told.write_text(text)
    return lambda: load_solver(folder / "run", InferenceConfig(), CPU)


def a_base_set(rng, seeds, folder):
    path = changed(rng, seeds, "base/base.safetensors", folder, some_safetensors)
    return lambda: open_base_set(path.parent)


def a_published_file(rng, seeds, folder):
    path = changed(rng, seeds, "published.safetensors", folder, some_safetensors)
    return lambda: read_reference_file(path)


def identifiers(rng, seeds, folder):
    path = changed(rng, seeds, "identifiers.json", folder, some_json)
    return lambda: reference_views(path.with_name("published.safetensors"), 3)


def a_submission(rng, seeds, folder):
    path = changed(rng, seeds, "scores/submission.json", folder, some_json)
    return lambda: read_submission(path)


def candidates(rng, seeds, folder):
    text = gzip.decompress((seeds / "scores/candidates.json.gz").read_bytes())
    path = folder / "candidates.json.gz"
    packed = gzip.compress(some_json(rng, text), 1)
    path.write_bytes(packed if rng.random() < 0.8 else some_bytes(rng, packed))
    return lambda: read_candidates(path)


def answers_so_far(rng, seeds, folder):
    *before, last = (seeds / "unfinished.jsonl").read_bytes().splitlines()
    lines = [*before, last]
    at = rng.randrange(len(lines))
    lines[at] = some_json(rng, lines[at])
    (folder / "unfinished.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return lambda: evaluate(eval_config(seeds, folder), resume=True)


KINDS = (
    *(a_task, kaggle_files, a_toml, an_override, a_record, a_metrics_file, metadata, weights),
    *(a_base_set, a_published_file, identifiers, a_submission, candidates, answers_so_far),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_input_loads_or_is_refused_in_one_sentence(kind, seeds, tmp_path, capsys):
    rng, begin, faults, count = random.Random(f"{SEED} {kind.__name__}"), time.monotonic(), {}, 0
    seen = Counter()
    while time.monotonic() - begin < SECONDS / len(KINDS):
        count += 1
        folder = tmp_path / str(count)
        folder.mkdir()
        if fault := complaint(kind(rng, seeds, folder)):
            like = re.sub(r"[^a-z]", "", fault.lower())[:40]
            seen[like] += 1
            faults.setdefault(like, f"{fault}\n    in {folder}")
        else:
            shutil.rmtree(folder)
    capsys.readouterr()
    with capsys.disabled():
        print(f"\n{kind.__name__}: {count} inputs, {sum(seen.values())} faults, seed {SEED}")
    assert not faults, "\n".join(f"{seen[like]} x {fault}" for like, fault in faults.items())

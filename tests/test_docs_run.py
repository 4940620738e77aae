"""The commands and Python blocks of the README and of the pages run, in order, with tiny weights.

Every page gets a folder with the files that pages speak of. A command keeps its words; added are
the settings that let it end in seconds, and a tiny checkpoint where the bundled weights would
answer (tests/test_readme.py runs these).
"""

import gzip
import json
import re
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import hub_models
from arctrm.cli import main
from arctrm.data.sources import PUBLIC
from helpers import as_json, random_task, write_tasks
from test_docs import BLOCK, PAGES, ROOT, arctrm_words, shell_lines

pytestmark = pytest.mark.slow

TRAINED = "runs/arc1"
SMALL = {
    "trunk.hidden_size": 32,
    "trunk.num_heads": 2,
    "trunk.num_layers": 1,
    "trunk.loops": 2,
    "trm.halt_max_steps": 2,
    "training.tokens_per_batch": 4096,
    "training.schedule.budget": "2s",
    "training.schedule.warmup_steps": 1,
    "data.max_tasks": 4,
}
HUB = {
    "trm_hidden_size": 32,
    "coupling.adapter_heads": 2,
    "coupling.reader_tokens_per_batch": 2048,
    "hub.max_tokens": 1000,
    "trm.drafted_pairs": 2,
    "data.max_tasks": 2,
}
FEW = {"inference.views": 2, "judge.scored_candidates": 2, "judge.scoring_views": 2}
# dev/ is history; tests/test_python.py runs docs/python.md beside a server of the hub.
SHOWN = [page for page in PAGES if "dev" not in page.parts and page.name != "python.md"]
NOT_HERE = re.compile(r"torchrun|--version|published/")
ERROR = re.compile(r"\$ arctrm (.*)\n(error: .*)")
MODEL = re.compile(r"(meta-llama|Qwen|HuggingFaceTB)/[\w.-]+")


def tiny(words: list[str]) -> list[str]:
    """The command with what makes it small."""
    command, more = words[0], {}
    words = [MODEL.sub("models/llama", word) for word in words]
    is_hub = "joint_llama" in words or "runs/lora" in words
    if command in ("pretrain", "joint") and "--resume" not in words:
        more = SMALL | (HUB if is_hub else {})
        if command == "joint":
            more |= FEW | {"evaluation.max_tasks": 1}
        if is_hub and not any("llama_model" in word for word in words):
            more["llama_model"] = "models/llama"
    elif command in ("pretrain", "joint"):
        more = {"training.schedule.budget": "4s"}
    if command in ("eval", "solve"):
        more = FEW
    if any("schedule.max_steps" in word for word in words):
        more = {k: v for k, v in more.items() if k != "training.schedule.budget"}
        more |= {"training.schedule.max_steps": 2}
    for key, value in more.items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    if command in ("eval", "baseline") and "--resume" not in words and "--submission" not in words:
        words += ["--max-tasks", "1", *(["--views", "1"] if command == "baseline" else [])]
    if "--total-budget" in words:  # which counts from the start of this process
        age = time.time() - psutil.Process().create_time()
        words[words.index("--total-budget") + 1] = f"{age + 12:.0f}s"
    elif command == "solve":
        words += ["--budget", "3s"]
    answers = command in ("eval", "baseline", "solve") and "--submission" not in words
    if answers and not {"--checkpoint", "--model", "--resume"} & set(words):
        words = [word for word in words if word != "--bundled"] + ["--checkpoint", TRAINED]
    return words


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Tasks of one's own, Kaggle files, a language model, and weights of both voices."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    tasks = {f"task{n}": random_task(rng, f"task{n}") for n in range(3)}
    write_tasks(folder / "my_tasks", tasks.values())
    shutil.copy(folder / "my_tasks/task0.json", folder / "my_task.json")
    challenges = {name: as_json(task.without_answers()) for name, task in tasks.items()}
    solutions = {name: [p.output.tolist() for p in task.test] for name, task in tasks.items()}
    for name in ("challenges.json", "arc-agi_test_challenges.json"):
        (folder / name).write_text(json.dumps(challenges))
    for name in ("solutions.json", "answers.json"):
        (folder / name).write_text(json.dumps(solutions))
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "public").mkdir()
    for name, digest in PUBLIC.items():  # as if they were made
        content = json.dumps({name: as_json(random_task(rng))}).encode()
        (folder / f"public/{name}-{digest[:8]}.json.gz").write_bytes(gzip.compress(content))
    hub_models.save_model(folder / "models/llama", max_position_embeddings=4096, chat=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(tiny(["joint", "--config", "arc1_1h", "--out", TRAINED, "--set", "evaluate=false"]))
    return folder


def run(words: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == code, words


@pytest.mark.parametrize("page", SHOWN, ids=[str(p.relative_to(ROOT)) for p in SHOWN])
def test_the_commands_and_python_of_a_page_run_one_after_another(
    page, prepared, tmp_path, monkeypatch, capfd
):
    folder, names = tmp_path / "page", {"__name__": "page"}
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *_: prepared / "public")
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python" and page.name != "README.md":  # of which see tests/test_readme.py
            exec(compile(MODEL.sub("models/llama", block), str(page), "exec"), names)
        if language == "console" and (shown := ERROR.search(block)):
            capfd.readouterr()
            run(shlex.split(shown[1]), code=2)
            pattern = re.escape(shown[2]).replace(r"\.\.\.", ".*")
            assert re.fullmatch(pattern, capfd.readouterr().err.strip())
        elif block.startswith("$ arctrm pretrain"):
            run(shlex.split(block.partition("\n")[0])[2:])
        for line in shell_lines(f"```bash\n{block}```\n") if language == "bash" else ():
            words = arctrm_words(line)
            if not words or NOT_HERE.search(line):
                continue
            words = tiny([word.replace("$BUNDLED", TRAINED) for word in words])
            if words[0] == "joint" and TRAINED in words and "--resume" not in words:
                shutil.move(TRAINED, "runs/before")
            run(words)

"""Bad tasks, full disks and vanished files through every command that reads tasks."""

import json
from pathlib import Path

import pytest

GRID = [[1, 2], [3, 0]]
PAIR = {"input": GRID, "output": GRID}


def with_grid(grid):
    return {"train": [{"input": grid, "output": GRID}], "test": [PAIR]}


BAD = {
    "not JSON": ('{"train": [', "is not JSON"),
    "ragged": (with_grid([[1, 2], [3]]), "row 1"),
    "no output": ({"train": [{"input": GRID}], "test": [PAIR]}, 'train[0]: has no "output"'),
}
"""Some of the mistakes of tests/data/test_parse.py: one parser reads for every command."""
COMMANDS = {
    "data show": ["data", "show", "{}"],
    "data build": ["data", "build", "--subsets", "{}", "--test-set", "{}", "--out", "written"],
    "solve": ["solve", "{}", "--out", "written"],
    "baseline": ["baseline", "--test-set", "{}", "--out", "written"],
    "eval": ["eval", "--test-set", "{}", "--out", "written"],
    "joint": ["joint", "--set", "data_path={}", "--out", "written"],
    "pretrain": [
        *("pretrain", "--set", 'data.subsets=["{}"]', "--set", "data.test_set="),
        *("--out", "written"),
    ],
}


def refused(run, command, source, said):
    code, out, err = run(*(word.replace("{}", source) for word in COMMANDS[command]))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not Path("written").exists()
    return err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", BAD)
def test_every_command_refuses_a_bad_task_in_one_sentence(run, command, name):
    content, said = BAD[name]
    text = content if isinstance(content, str) else json.dumps(content)
    Path("[red]x.json").write_text(text)
    assert "[red]x.json" in refused(run, command, "[red]x.json", said)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["a folder", "a vanished file", "a loop", "no tasks", "nothing"])
def test_every_command_refuses_what_cannot_be_read(run, command, name):
    source = Path("source")
    if name == "nothing":
        said = "source: no such file or folder"
    else:
        source.mkdir()
        file, said = source / "a.json", "source/a.json: cannot be read"
        if name == "a folder":
            file.mkdir()
        elif name == "a vanished file":
            file.symlink_to("nowhere")
        elif name == "a loop":
            file.symlink_to("a.json")
        else:
            said = "source: has no usable task"
    refused(run, command, "source", said)

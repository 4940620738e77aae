"""docs/python.md: its blocks run as they stand, and every public name is there."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import arctrm
from hub_server import TOKEN, new_hub, point_to, serving
from test_docs import blocks

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_blocks_run_in_order_and_the_first_solves_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    found = blocks((ROOT / "docs/python.md").read_text(encoding="utf-8"), "python")
    names: dict = {}
    with serving(new_hub({})) as address:
        point_to(monkeypatch, tmp_path, address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for number, block in enumerate(found):
            exec(compile(block, f"docs/python.md, block {number + 1}", "exec"), names)
            if number == 0:
                right = arctrm.load_task("arc1:45737921").test[0].output
                assert any(np.array_equal(grid, right) for grid in names["solution"].attempts[0])
    assert names["same"].rows == names["solver"].rows
    assert names["result"].total_attempts in (1, 2)
    assert (tmp_path / "scores/scores.json").is_file()


def test_every_public_name_is_on_the_page():
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    assert [name for name in arctrm._HOME_OF if name not in page] == []

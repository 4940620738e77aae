"""The README: its first command and its Python do what they say, and it stays short.

.ci/run runs the command that installs the development extra; tests/test_docs_run.py runs the rest.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_it_has_at_most_110_lines_and_two_pictures():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    assert len(re.findall(r"^!\[", text, re.M)) == 2


@pytest.mark.slow
def test_six_lines_of_python_solve_the_example(monkeypatch):
    code = re.search(r"```python\n(.*?)\n```", (ROOT / "README.md").read_text(), re.S)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line]) <= 6
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(code[1], names)
    answer = json.loads((ROOT / "examples/45737921.json").read_text())["test"][0]["output"]
    assert names["attempt_1"].tolist() == answer


@pytest.mark.slow
def test_the_first_command_solves_a_real_task_correctly():
    text = (ROOT / "README.md").read_text()
    first = re.search(r"```bash\n(.*?)\n```", text, re.S)
    assert first is not None
    install, _, solve = first[1].partition("arctrm solve ")
    assert "pip install" in install
    command = [sys.executable, "-m", "arctrm", "solve", *shlex.split(solve)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 test inputs with a known answer solved" in done.stdout
    assert "attempt_2" in done.stdout

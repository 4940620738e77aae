"""The README's first command does what it says (.ci/run runs the second)."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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

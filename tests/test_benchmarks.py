"""The scripts in `benchmarks/`: what cannot be used of what the user gave is one line."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("trm_inference", ["--checkpoint", "NOWHERE"]),
        ("grid_decoding", ["--checkpoint", "NOWHERE"]),
        ("held_out_loss", ["NOWHERE"]),
        ("rankings", ["NOWHERE"]),
    ],
)
def test_a_missing_checkpoint_is_one_line_and_exit_code_2(
    script, words, tmp_path, monkeypatch, capsys
):
    nowhere = str(tmp_path / "nowhere")
    given = [word.replace("NOWHERE", nowhere) for word in words]
    assert refusal(script, given, monkeypatch, capsys).startswith(f"error: {nowhere}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_gpu_is_one_line_and_exit_code_2(monkeypatch, capsys):
    line = refusal("decode_attention", [], monkeypatch, capsys)
    assert line.startswith("error: decode_attention: there is no CUDA device")


def refusal(script, words, monkeypatch, capsys):
    """The one line that a script ends with."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line

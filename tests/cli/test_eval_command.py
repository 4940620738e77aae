"""`arctrm eval` from the command line: what it writes, and what it refuses in one sentence."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arctrm.cli import main
from arctrm.training.checkpoints import latest_checkpoint

SMALL = ("--views", "2", "--set", "inference.steps=1", "--set", "inference.tokens_per_batch=4096")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def arctrm(capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        return stop.value.code, printed.out, printed.err

    return call


def refused(result, *said):
    """Exit code 2, nothing on stdout, one sentence on stderr that says all of `said`."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for words in said:
        assert words in err


def test_a_submission_is_scored_again_without_weights(arctrm, trained, monkeypatch):
    test_set = ("--set", f"evaluation.test_set={trained.folder}")
    code, _, _ = arctrm(
        *("eval", "--checkpoint", trained.run, *SMALL, "--out", "scores", *test_set),
    )
    assert code == 0
    first = json.loads(Path("scores/scores.json").read_text())
    monkeypatch.setattr("arctrm.solving.evaluate.load_solver", None)
    code, out, _ = arctrm("eval", "--submission", "scores", "--out", "again", *test_set)
    assert code == 0
    assert "pass@10" not in out
    second = json.loads(Path("again/scores.json").read_text())
    assert second["tasks"] == first["tasks"]
    assert second["task_fraction"]["pass@2"] == first["task_fraction"]["pass@2"]
    refused(arctrm("eval", "--submission", "scores", "--bundled"), "--bundled contradicts")


def test_eval_writes_scores_submission_and_configuration(arctrm, trained):
    code, out, _ = arctrm(
        *("eval", "--checkpoint", trained.run, *SMALL, "--out", "scores", "--seed", "3"),
        *("--set", f"evaluation.test_set={trained.folder}"),
    )
    assert code == 0
    for name in ("task_fraction", "pair_fraction", "whole_task", trained.known[0].id):
        assert name in out
    written = json.loads(Path("scores/scores.json").read_text())
    assert (written["views"], written["seed"], written["num_tasks"]) == (2, 3, 6)
    assert set(json.loads(Path("scores/submission.json").read_text())) == {
        task.id for task in trained.known
    }
    assert json.loads(Path("scores/config.json").read_text())["config"]["seed"] == 3


def test_brackets_in_a_folder_are_printed_as_they_are(arctrm, trained, write_kaggle):
    """They would be markup to the console."""
    challenges, solutions = write_kaggle(Path("kaggle"), trained.known[:1])
    words = ("--checkpoint", trained.run, *SMALL, "--out", "scores[/x]")
    for more in ((), ("--set", f"evaluation.solutions={solutions}")):
        code, _, err = arctrm("eval", *words, "--set", f"evaluation.test_set={challenges}", *more)
        assert code == 0
        assert "scores[/x]" in "".join(err.split())
    code, _, _ = arctrm("eval", *words, "--set", f"evaluation.test_set={challenges}", "--dry-run")
    assert code == 0


@pytest.mark.slow
def test_two_processes_share_the_views_and_write_what_one_would(trained):
    words = ["eval", "--checkpoint", str(trained.run), *SMALL]
    words += ["--set", f"evaluation.test_set={trained.folder}", "--views", "5", "--out"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for more, out in (([], "one"), (launch, "two")):
        done = subprocess.run(
            [sys.executable, *more, "-m", "arctrm", *words, out],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    one, two = (Path(out, "submission.json").read_bytes() for out in ("one", "two"))
    assert one == two
    scores = [json.loads(Path(out, "scores.json").read_text()) for out in ("one", "two")]
    assert scores[0]["tasks"] == scores[1]["tasks"]


def test_the_ablation_is_one_flag_and_is_recorded(arctrm, trained):
    code, _, _ = arctrm(
        *("eval", "--checkpoint", trained.run, *SMALL, "--blank-task-embedding"),
        *("--set", f"evaluation.test_set={trained.folder}", "--out", "blank"),
    )
    assert code == 0
    assert json.loads(Path("blank/scores.json").read_text())["blank_task_embedding"] is True


@pytest.fixture
def settings_of(arctrm, monkeypatch):
    """The configuration that `arctrm eval` would run with."""
    from arctrm.solving import evaluate

    def call(*words):
        ran = []
        monkeypatch.setattr(evaluate, "run", lambda settings, *_: ran.append(settings))
        assert arctrm("eval", *words)[0] == 0
        return ran[0]

    return call


def test_ablations_are_listed_repeated_or_set(settings_of):
    expected = ("no-reader", "no-draft", "swap-context")
    listed = '["no-reader", "no-draft", "swap-context"]'
    for words in (
        ("--ablate", "no-reader", "--ablate", "no-draft", "--ablate", "swap-context"),
        ("--ablate", "no-reader,no-draft", "--ablate", "no-draft, swap-context"),
        ("--set", f"evaluation.ablate={listed}"),
    ):
        assert settings_of(*words).evaluation.ablate == expected


def test_the_bundled_weights_can_be_asked_for(settings_of, arctrm):
    Path("eval.toml").write_text('checkpoint = "runs/first"')
    assert settings_of("--config", "eval.toml").checkpoint == Path("runs/first")
    assert settings_of("--config", "eval.toml", "--bundled").checkpoint is None
    result = arctrm("eval", "--bundled", "--checkpoint", "runs/first", "--out", "scores")
    refused(result, "--bundled contradicts --checkpoint runs/first")


@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry_run"])
def test_an_ablation_that_does_not_apply_is_refused(arctrm, trained, dry_run):
    words = ("--checkpoint", trained.run, "--out", "scores", *(["--dry-run"] if dry_run else []))
    words += ("--set", f"evaluation.test_set={trained.folder}")
    refused(arctrm("eval", *words, "--ablate", "no-reader"), "holds one model")
    refused(arctrm("eval", *words, "--ablate", "no-readr"), "--ablate", "'no-readr'")
    assert not Path("scores").exists()


def test_bundled_tasks_are_evaluated_by_name(arctrm, trained):
    code, _, err = arctrm(
        *("eval", "--checkpoint", trained.run, *SMALL, "--out", "scores"),
        *("--set", "evaluation.test_set=training"),
        *("--set", f'evaluation.tasks=["{trained.known[0].id}", "{trained.others[0].id}"]'),
    )
    assert code == 0
    assert "1 of 2 tasks are not in the id map" in " ".join(err.split())


def test_a_dry_run_counts_and_writes_nothing(arctrm, trained):
    code, out, _ = arctrm(
        *("eval", "--checkpoint", trained.run, "--dry-run", "--out", "scores"),
        *("--set", f"evaluation.test_set={trained.folder}"),
    )
    assert code == 0
    assert "6, 6" in out
    assert list(Path().iterdir()) == []


def test_a_reference_file_is_evaluated(arctrm, trained, reference_file):
    code, _, err = arctrm(
        *("eval", "--checkpoint", reference_file, *SMALL, "--out", "scores"),
        *("--set", "evaluation.test_set=evaluation"),
        *("--set", 'evaluation.tasks=["00576224", "009d5c81"]'),
    )
    assert code == 0, err
    assert json.loads(Path("scores/scores.json").read_text())["num_tasks"] == 2
    assert set(json.loads(Path("scores/submission.json").read_text())) == {"00576224", "009d5c81"}


@pytest.mark.parametrize(
    "identifiers", [None, '["<blank>"]', json.dumps(["<blank>"] * 8 + ["a|||b"])]
)
def test_a_reference_file_needs_its_identifiers(arctrm, trained, reference_file, identifiers):
    path = reference_file.with_name("identifiers.json")
    path.unlink() if identifiers is None else path.write_text(identifiers)
    refused(
        arctrm(
            *("eval", "--checkpoint", reference_file, "--out", "scores"),
            *("--set", f"evaluation.test_set={trained.folder}"),
        ),
        "identifiers.json",
    )
    assert not Path("scores").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"evaluation.tasks": '["ffffffff"]'}, "evaluation.tasks names 'ffffffff'"),
        ({"evaluation.test_set": "nowhere"}, "nowhere: no such file or folder"),
        ({"evaluation.max_tasks": "0"}, "evaluation.max_tasks"),
        ({"inference.views": "0"}, "inference.views"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(arctrm, trained, overrides, said):
    settings = {"evaluation.test_set": trained.folder, **overrides}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    refused(arctrm("eval", "--checkpoint", trained.run, "--out", "scores", *words), said)
    assert not Path("scores").exists()


def broken(name: str, run: Path) -> tuple[Path, str]:
    """A checkpoint of the kind `name`, and what is to be said about it."""
    if name == "missing":
        return Path("nowhere"), "nowhere: not a folder"
    copy = Path(shutil.copytree(run, "copy"))
    folder = latest_checkpoint(copy)
    meta, model = folder / "checkpoint.json", folder / "model.safetensors"
    if name == "not a checkpoint":
        shutil.rmtree(copy / "checkpoints")
        return copy, "copy: no checkpoint"
    if name == "truncated":
        model.write_bytes(model.read_bytes()[:5000])
        return copy, "model.safetensors: truncated"
    if name == "damaged":
        model.write_bytes(b"\xff" * model.stat().st_size)
        return copy, "model.safetensors: damaged"
    if name == "no model":
        model.unlink()
        return copy, "model.safetensors: missing"
    content = json.loads(meta.read_text())
    if name == "another size":
        content["config"]["trm"]["hidden_size"] = 64
        meta.write_text(json.dumps(content))
        return copy, "has shape"
    if name == "another id map":
        content["task_ids"].append("ffffffff")
        content["notes"]["task_fingerprints"].append("f" * 12)
        meta.write_text(json.dumps(content))
        return copy, "puzzle_emb.weights"
    assert name == "not JSON"
    meta.write_text("{")
    return copy, "checkpoint.json: not JSON"


BROKEN = (
    "missing",
    "not a checkpoint",
    "truncated",
    "damaged",
    "no model",
    "another size",
    "another id map",
    "not JSON",
)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", ["eval", "solve"])
@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry_run"])
def test_a_bad_checkpoint_is_refused_in_one_sentence(arctrm, trained, name, command, dry_run):
    checkpoint, said = broken(name, trained.run)
    words = ("--checkpoint", checkpoint, "--out", "written", *(["--dry-run"] if dry_run else []))
    if command == "eval":
        result = arctrm("eval", *words, "--set", f"evaluation.test_set={trained.folder}")
    else:
        result = arctrm("solve", trained.folder, *words)
    refused(result, said)
    assert not Path("written").exists()

"""`arctrm baseline` from the command line: what it writes, resumes, and refuses in one sentence."""

import json
from pathlib import Path

import pytest
from hub_models import save_model

from arctrm.cli import main
from arctrm.solving import baseline as solving


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


@pytest.fixture
def words(trained, tiny_reader):
    """A run of the tiny reader, but for `--out`."""
    return ("baseline", "--checkpoint", tiny_reader, "--subset", trained.folder, "--views", "2")


def refused(result, *said):
    """Exit code 2, nothing on stdout, one sentence on stderr that says all of `said`."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for text in said:
        assert text in err


def test_results_and_submission_stand_side_by_side_and_scores_are_printed(arctrm, words, trained):
    code, out, err = arctrm(*words, "--out", "made/[x]results.json", "--seed", "3")
    assert code == 0, err
    for name in ("task_fraction", "pair_fraction", "whole_task", "pass@2"):
        assert name in out
    assert sorted(path.name for path in Path("made").iterdir()) == [
        "[x]results.json",
        "submission.json",
    ]
    written = json.loads(Path("made/[x]results.json").read_text())
    assert written["config"]["seed"] == 3
    assert list(written["tasks"]) == [task.id for task in trained.known]
    assert "made/[x]results.json and submission.json" in " ".join(err.split())


@pytest.mark.parametrize("out", ["folder", "folder.json"])
def test_out_may_be_a_folder(arctrm, words, out):
    if out == "folder.json":
        Path(out).mkdir()
    code, _, err = arctrm(*words, "--out", out, "--set", "evaluation.max_tasks=1")
    assert code == 0, err
    assert sorted(p.name for p in Path(out).iterdir()) == ["results.json", "submission.json"]


def test_ctrl_c_exits_130_and_resume_needs_only_the_file(arctrm, words, trained, monkeypatch):
    answer_task, count = solving.answer_task, iter(range(9))

    def interrupted(*arguments):
        if next(count) == 2:
            raise KeyboardInterrupt
        return answer_task(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(solving, "answer_task", interrupted)
        code, _, err = arctrm(*words, "--out", "results.json")
    assert code == 130
    last = "stopped after 2 of 6 tasks, which are in results.json; go on with --resume\n"
    assert err.endswith(last)
    assert len(json.loads(Path("results.json").read_text())["tasks"]) == 2
    refused(arctrm(*words, "--out", "results.json"), "add --resume")
    refused(
        arctrm("baseline", "--out", "results.json", "--resume", "--views", "3"),
        "views = 2 there, 3 now",
    )
    code, out, _ = arctrm("baseline", "--out", "results.json", "--resume", "--dry-run")
    assert code == 0
    assert "answered before" in out
    code, _, err = arctrm("baseline", "--out", "results.json", "--resume")
    assert code == 0, err
    assert len(json.loads(Path("results.json").read_text())["tasks"]) == len(trained.known)
    assert Path("submission.json").exists()


def test_a_hub_model_answers_bundled_tasks(arctrm):
    model = save_model(Path("model"), chat=True, max_position_embeddings=8192)
    tasks = ("--subset", "training", "--set", 'evaluation.tasks=["0520fde7"]', "--views", "1")
    for form, more in (("grid", ()), ("chat", ("--set", "max_new_tokens=8"))):
        code, _, err = arctrm(
            *("baseline", "--model", model, *tasks, "--out", form),
            *("--set", f"hub.prompt={form}", *more),
        )
        assert code == 0, err
        written = json.loads(Path(form, "results.json").read_text())
        assert written["model"]["name"] == "model"
        assert written["scores"]["num_tasks"] == 1
        assert list(json.loads(Path(form, "submission.json").read_text())) == ["0520fde7"]


def test_a_dry_run_writes_nothing(arctrm, words):
    code, out, _ = arctrm(*words, "--dry-run", "--out", "scores")
    assert code == 0
    assert "6, 6" in out
    assert list(Path().iterdir()) == []


def test_what_is_given_wrongly_is_refused(arctrm, words, trained):
    cases = [
        (("--attempts", "0"), "--attempts: attempts = 0, allowed is a number of at least 1"),
        (("--set", "attempts=0"), "--set: attempts = 0, allowed is a number of at least 1"),
        (("--views", "0"), "--views: views = 0"),
        (("--checkpoint", "a", "--model", "b"), "--checkpoint and --model: checkpoint = 'a'"),
        (("--subset", "nowhere"), "nowhere: no such file or folder"),
        (("--model", "meta-llama/Llama-3.2-8B-Instruct"), "meta-llama/Llama-3.1-8B-Instruct"),
        (("--model", "./nowhere"), "there is no such folder"),
        (("--set", "hub.prompt=chat"), "set hub.name or hub.prompt = 'grid'"),
        (("--model", "x", "--set", "hub.prompt=chat", "--set", "reader.rank=experts"), "free text"),
        (("--resume",), "--resume: no results were given"),
        (("--resume", "--out", "none.json"), "none.json: there are no results to resume"),
        (("--checkpoint", trained.run, "--out", "submission.json"), "where the submission goes"),
        (("--checkpoint", trained.run, "--out", trained.run), "is the folder of a training run"),
        (("--checkpoint", trained.run), "no reader"),
    ]
    for given, *said in cases:
        refused(arctrm("baseline", "--set", "evaluation.max_tasks=1", *given), *said)
    assert list(Path().iterdir()) == []


def test_models_that_cannot_spell_or_chat_are_refused(arctrm, capfd):
    save_model(Path("plain"), max_position_embeddings=8192)
    capfd.readouterr()  # saving shows progress
    refused(arctrm("baseline", "--model", "plain", "--set", "hub.prompt=chat"), "no chat template")
    digitless(Path("plain"))
    refused(arctrm("baseline", "--model", "plain"), "plain: the tokenizer has no token", "digit")
    assert [path.name for path in Path().iterdir()] == ["plain"]


def digitless(folder: Path) -> None:
    """Take the digits out of a tokenizer's vocabulary."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    model = content["model"]
    model["vocab"] = {
        (f"<{index}>" if any(c.isdigit() for c in piece) else piece): index
        for piece, index in model["vocab"].items()
    }
    model["merges"] = []
    file.write_text(json.dumps(content))


def test_a_full_disk_or_a_file_in_the_way_is_one_sentence(arctrm, words):
    Path("file").write_text("")
    refused(arctrm(*words, "--out", "file"), "file")
    refused(arctrm(*words, "--out", "file/results.json"), "file")
    assert Path("file").read_text() == ""

"""What the tests share: one run of `baseline`, and small hybrids."""

import json

import pytest
from baseline_runs import answered, config

from arctrm.config import JointConfig


@pytest.fixture(scope="session")
def settings(trained, tiny_reader):
    """The tiny reader on the tasks it was trained on."""
    return config(trained.folder, checkpoint=tiny_reader)


@pytest.fixture(scope="session")
def done(settings, tmp_path_factory):
    """The results of an uninterrupted run of `settings`, and where they are."""
    path = tmp_path_factory.mktemp("baseline") / "results.json"
    return answered(settings, path), path


@pytest.fixture(scope="session")
def joined(tmp_path_factory, trained, tiny_reader):
    """Run folder of a tiny hybrid of `trained` and `tiny_reader`: `joined(coupled, sequence)`."""
    from arctrm.training import joint

    done = {}

    def run(coupled=True, sequence="pair"):
        if (coupled, sequence) in done:
            return done[coupled, sequence]
        paths = dict.fromkeys(("context", "draft", "back"), coupled)
        sizes = {"num_context_slots": 4, "adapter_heads": 2, "drafted_pairs": 8, "draft_every": 4}
        config = {
            "batch_size": 4,
            "reader_checkpoint": str(tiny_reader),
            "trm_checkpoint": str(trained.run),
            "data": {"subsets": [str(trained.folder)], "test_set": str(trained.folder)},
            "trm": {
                "hidden_size": 32,
                "num_heads": 2,
                "num_layers": 1,
                "H_cycles": 2,
                "L_cycles": 1,
                "halt_max_steps": 4,
            },
            "reader": {
                "hidden_size": 32,
                "num_heads": 2,
                "num_layers": 2,
                "sequence": sequence,
                "max_pairs": 3,
            },
            "coupling": {**paths, **sizes, "reader_tokens_per_batch": 8400},
            "training": {
                "tokens_per_batch": 5472,
                "ema_decay": 0.9,
                "schedule": {"max_steps": 4, "warmup_steps": 1},
            },
        }
        out = tmp_path_factory.mktemp("hybrid")
        joint.run(JointConfig.model_validate_json(json.dumps(config)), out, False)
        return done.setdefault((coupled, sequence), out)

    return run

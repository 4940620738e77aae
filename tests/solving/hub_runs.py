"""What the tests of hybrids with a hub reader share: small configurations. Not a test."""

import torch

from arctrm.config import JointConfig, SolveConfig

CPU = torch.device("cpu")
QUICK = {"views": 2, "steps": 2, "tokens_per_batch": 1024, "dtype": "float32"}
NO_PATH = {"context": False, "draft": False, "back": False}


def joint_config(model, trained, mode, coupling) -> JointConfig:
    sizes = {"num_context_slots": 4, "adapter_heads": 2, "drafted_pairs": 2, "draft_every": 4}
    return JointConfig.model_validate(
        {
            "batch_size": 2,
            "llama_model": str(model),
            "hub": {"mode": mode, "lora_rank": 4},
            "trm_checkpoint": trained.run,
            "data": {"subsets": [str(trained.folder)], "test_set": str(trained.folder)},
            "trm": trained.trm,
            "reader": {"sequence": "task", "max_pairs": 3, "max_tokens": 1900},
            "coupling": {**sizes, "reader_tokens_per_batch": 4096, **coupling},
            "training": {
                "tokens_per_batch": 5520,
                "ema_decay": 0.9,
                "optimiser": {"adamw_lr": 0.01},
                "schedule": {"max_steps": 2, "warmup_steps": 0},
            },
        }
    )


def config(steps=1, **top) -> SolveConfig:
    """Ends at `steps` steps of adaptation and a few views, long before the budget."""
    learning = {"parts": "all", "max_steps": steps, "tokens_per_batch": 256}
    decoding = {"rank": "experts", "scoring_views": 1}
    return SolveConfig.model_validate(
        {"budget": 60.0, "inference": QUICK, "reader": decoding, "adaptation": learning, **top}
    )

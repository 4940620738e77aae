"""The Hugging Face hub: checkpoints from it and to it, and its refusals as sentences.

A checkpoint on the hub is a bundle: `checkpoint.json`, `model.safetensors`, and a model card made
from the metadata.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCardData,
    constants,
    get_token,
    snapshot_download,
)

from arctrm.checkpoints import (
    META,
    MODEL,
    CheckpointMeta,
    export_bundle,
    read_meta,
    resolve_checkpoint,
)
from arctrm.config import TINY
from arctrm.data.sources import subset_label
from arctrm.errors import CheckpointError, ConfigError

# Types of errors by name, as the HTTP library changes.
UNREACHABLE = "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "TransportError"
UNSEEN = "RepositoryNotFoundError", "HFValidationError"
CARD, CONNECT = "README.md", "connect to the network (unset HF_HUB_OFFLINE)"


def download(name: str) -> Path:
    """The folder of the checkpoint `name` (org/name), which is kept in the library's cache.

    Raises CheckpointError: there is none, or the hub gives none.
    """
    with _talking(name, refusal):
        folder = Path(snapshot_download(name, allow_patterns=[META, MODEL]))
    if not (folder / META).is_file():
        raise CheckpointError(f"{name}: is on the hub, but is no checkpoint: it has no {META}")
    return folder


def push(checkpoint: Path, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a run, checkpoint or bundle as a bundle, with a model card unless there is one; gives
    the address.

    Raises ConfigError without a login, CheckpointError where the hub refuses or is not reached.
    """
    if not (token or get_token()):
        login = "run `hf auth login`, set HF_TOKEN or give a token"
        raise ConfigError(f"{name}: uploading needs a login to the Hugging Face hub; {login}")
    folder, api = resolve_checkpoint(checkpoint), HfApi(token=token)
    meta = read_meta(folder)
    told = f"the hub cannot be reached; {CONNECT}"
    problem = lambda error, _: told if is_unreachable(error) else None
    with TemporaryDirectory() as temporary, _talking(name, problem):
        if set(meta.files) != {MODEL}:
            folder = export_bundle(folder, Path(temporary) / "bundle")
        address = api.create_repo(name, private=private or None, exist_ok=True)
        files = [CommitOperationAdd(own, str(folder / own)) for own in (META, MODEL)]
        if not api.file_exists(address.repo_id, CARD):
            card = model_card(meta, address.repo_id)
            files.append(CommitOperationAdd(CARD, card.encode()))
        api.create_commit(address.repo_id, files, commit_message=f"arctrm, step {meta.step}")
    return str(address)


def model_card(meta: CheckpointMeta, name: str) -> str:
    """README.md of a checkpoint on the hub, in the hub's format."""
    trained = meta.trained
    base = None if trained.llama_model == TINY else trained.llama_model
    data = ModelCardData(
        library_name="arctrm",
        tags=["arc-agi", "arc-prize", "tiny-recursive-model"],
        base_model=base if base and not Path(base).exists() else None,
    )
    rows = {
        "voices": " and ".join(meta.voices),
        **({"reader": base} if base else {}),
        "trunk": f"width {trained.trunk.hidden_size}, {trained.trunk.num_layers} layers gone "
        f"through {trained.trunk.loops} times",
        "trained": f"{meta.step:,} steps, {meta.examples:,} rows, {meta.elapsed:,.0f} s",
        "trained on": ", ".join(map(subset_label, trained.data.subsets)),
        "never trained on": f"test outputs of {trained.data.test_set or 'no set'}",
        "task embeddings": f"{len(meta.task_ids):,}",
        "code": f"arctrm {meta.arctrm_version}, revision {meta.git_revision}",
        "data fingerprint": meta.data_fingerprint or "unknown",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
{data.to_yaml()}
---
# {name.partition("/")[2]}

Weights of `arctrm`, which answers ARC-AGI tasks with a reader and a Tiny Recursive Model.

```python
import arctrm

solver = arctrm.Solver.from_pretrained("{name}")
solution = solver.solve(arctrm.load_task("arc1:00d62c1b"), budget="60s")
```

| | |
|---|---|
{table}
"""


def refusal(error: BaseException, name: str) -> str | None:
    """Why the hub gave nothing, as the rest of a sentence; None where another thing went wrong."""
    if _is(error, ("GatedRepoError",)):
        licence = f"accept its licence at https://huggingface.co/{name}"
        return f"access is restricted; {licence} and log in with `hf auth login`"
    if is_unreachable(error):
        missing = f"is no local folder, is not in the cache {constants.HF_HUB_CACHE}"
        return f"{missing}, and the hub cannot be reached; {CONNECT}, or give a local folder"
    if _is(error, UNSEEN):
        unseen = "is no local folder, and no model on the Hugging Face hub that you may see"
        return f"{unseen}; check the spelling, or log in with `hf auth login`"
    return None


def is_unreachable(error: BaseException) -> bool:
    """Whether there is no connection to the hub."""
    return _is(error, UNREACHABLE)


@contextmanager
def _talking(name: str, refused_for: Callable[[BaseException, str], str | None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        problem = refused_for(error, name)
        if problem is None and not _is(error, ("HfHubHTTPError",)):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        refused = f"the Hugging Face hub refuses ({lines[0].rstrip('.:')}); check name and login"
        raise CheckpointError(f"{name}: {problem or refused}") from error


def _is(error: BaseException | None, kinds: tuple[str, ...]) -> bool:
    """Whether the error or one of its causes is of such a type."""
    while error is not None:
        if any(base.__name__ in kinds for base in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False

"""The training steps of adaptation: those of pretraining and joint training, on a few tasks.

TRM takes a `MicroStep`, a reader a `ReaderStep`; a hybrid without adapters takes both side by side,
one with adapters a `JointStep`, which trains reader, adapters and TRM together. Of a hub reader the
LoRA matrices are trained, or all weights, as in joint training; the rest of the model is shared.

Batches hold at least the largest demonstration, however small the configured batch is.
"""

from collections.abc import Sequence

import torch
from torch import nn

from arctrm.config import DataConfig, LearningConfig, OptimiserConfig, ReaderConfig
from arctrm.data.canvas import pair_canvas
from arctrm.data.dataset import BaseSet, base_set_from_tasks
from arctrm.data.task import MAX_SIDE, Pair, Task
from arctrm.hybrid import Hybrid
from arctrm.reader.hub_module import HubModule
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tokens import grid_length, pair_length
from arctrm.training.drafts import DraftPool
from arctrm.training.joint_hub import joint_reader
from arctrm.training.joint_reader import JointReader
from arctrm.training.joint_step import JointStep
from arctrm.training.joint_stream import JointStream
from arctrm.training.optimisers import FlatGradients, Optimisers
from arctrm.training.reader_step import ReaderStep
from arctrm.training.reader_stream import ReaderStream
from arctrm.training.source import PairSource
from arctrm.training.stages import MANY_ROWS, TOKENS_PER_ROW
from arctrm.training.step import GraphedStep, MicroStep, Step
from arctrm.training.stream import PairStream
from arctrm.training.update import Update
from arctrm.trm.model import TASK_TABLES, TRM

GPU_TOKENS, CPU_TOKENS = (1024, 16384), (256, 1024)
"""Of a batch for each task, and of several tasks at most."""
HUB_GPU_TOKENS = 8192
"""Of a batch with a hub reader on a GPU: as many as it answers at once."""
DRAFT_EVERY = 50
"""Steps of a coupled hybrid between two rounds of drafting, for each task; of many tasks not more
than in joint training."""
CLIP_NORM = 1.0
SPARE_ROWS = 1.3
"""Rows of a large batch, as a multiple of what it holds on average."""
MORE = 2
"""Rows and columns that a draft may have beyond the true output (see `DraftPool`)."""
MAX_ATTEMPTS = 2
"""Attempts in a coupled step, where there is a way back from TRM to the reader."""

Model = TRM | TinyReader | Hybrid
Part = Model | HubModule
"""What has a loss of its own: a model, or what is trained of a hub reader."""


class Learner:
    """The optimisers of what is trained together."""

    def __init__(self, model: nn.Module, config: LearningConfig):
        self.gradients = FlatGradients([p for p in model.parameters() if p.requires_grad])
        rates = OptimiserConfig(kind=config.kind, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
        self.update = Update(self.gradients, Optimisers(model, rates), None, CLIP_NORM)

    def learn(self, step: Step | GraphedStep, factor: float) -> None:
        """One step at `factor` x the learning rates."""
        self.gradients.zero()
        step.prepare()
        step()
        self.gradients.average()
        self.update(factor, 0)  # the number of the step is for a moving average

    def captured(self, step: Step) -> GraphedStep:
        """`step` as a CUDA graph; the update becomes one, too."""
        self.update.capture()
        return GraphedStep(step, prepare=step.prepare)


def trained_apart(model: Model, config: LearningConfig) -> list[Part]:
    """What of a trainable copy learns: the parts that have no loss in common.

    With `parts = "reader"` TRM and the adapters stay as they are, where there is a reader to be
    trained.
    """
    if not isinstance(model, Hybrid):
        return [model]
    reader = model.reader
    assert isinstance(reader, TinyReader | HubModule)
    is_trained = any(parameter.requires_grad for parameter in reader.parameters())
    if config.parts == "reader" and is_trained:
        return [reader]
    if model.adapters:
        return [model]
    return [model.trm, reader] if is_trained else [model.trm]


def new_step(
    part: Part,
    tasks: Sequence[Task],
    config: LearningConfig,
    seed: int,
    identity_colours: float,
) -> Step:
    """What adds the gradient of a batch of views of the demonstrations of `tasks`.

    Their embeddings are in the order of their ids. Test pairs are not trained on.
    """
    base = base_set_from_tasks({"tasks": list(tasks)}, "tasks", 0)
    data = DataConfig(
        subsets=("tasks",),
        test_set="tasks",
        num_aug=0,
        identity_colours=identity_colours,
        enlarge_canvas=0.0,
    )
    if isinstance(part, TRM):
        return _trm_step(part, tasks, config, base, data, seed)
    if isinstance(part, Hybrid):
        return _joint_step(part, tasks, config, base, data, seed)
    return _reader_step(part, tasks, config, base, data, seed)


def batch_tokens(part: Part, tasks: Sequence[Task], config: LearningConfig) -> int:
    """Tokens of a packed batch: at least the largest demonstration, of a hybrid two of them."""
    on_gpu = next(part.parameters()).is_cuda
    has_hub = isinstance(part, HubModule) or (isinstance(part, Hybrid) and part.hub is not None)
    of_each, most = GPU_TOKENS if on_gpu else CPU_TOKENS
    usual = HUB_GPU_TOKENS if on_gpu and has_hub else min(of_each * len(tasks), most)
    return max(config.tokens_per_batch or usual, least_tokens(part, tasks))


def least_tokens(part: Part, tasks: Sequence[Task]) -> int:
    """Tokens of the smallest batch that holds every demonstration."""
    if isinstance(part, TRM):
        return _largest_canvas(part, tasks)
    if not isinstance(part, Hybrid):
        return _longest_sequence(joint_reader(part), tasks)
    per_sequence = part.sequences.pairs_per_sequence
    return 2 * per_sequence * _largest_canvas(part.trm, tasks)


def _trm_step(
    trm: TRM,
    tasks: Sequence[Task],
    config: LearningConfig,
    base: BaseSet,
    data: DataConfig,
    seed: int,
) -> MicroStep:
    stream = PairStream(base, data, trm.config, seed, trm.H_init.device)
    num_tokens = batch_tokens(trm, tasks, config)
    lengths = [trm.config.num_slots + cells for cells in _canvases(tasks)]
    state = stream.new_state(trm, num_tokens, max(2, _num_rows(num_tokens, lengths)))
    return MicroStep(trm, stream, state, config.halt_max_steps, 1.0)


def _reader_step(
    part: TinyReader | HubModule,
    tasks: Sequence[Task],
    config: LearningConfig,
    base: BaseSet,
    data: DataConfig,
    seed: int,
) -> ReaderStep:
    reader = joint_reader(part)
    source = PairSource(base, data, seed, reader.grids.device)
    stream = ReaderStream(source, reader.config, reader.dtype, reader.marks)
    num_tokens = batch_tokens(part, tasks, config)
    pairs = [pair for task in tasks for pair in task.demonstrations]
    lengths = [reader.marks.length(pair_length(pair), 1) for pair in pairs]
    num_rows = _num_rows(num_tokens, lengths) // reader.config.pairs_per_sequence
    return ReaderStep(reader, stream, num_tokens, max(2, num_rows), 1.0)


def _joint_step(
    hybrid: Hybrid,
    tasks: Sequence[Task],
    config: LearningConfig,
    base: BaseSet,
    data: DataConfig,
    seed: int,
) -> JointStep:
    reader, coupling = joint_reader(hybrid.reader), hybrid.config
    source = PairSource(base, data, seed, hybrid.trm.H_init.device)
    own = ReaderStream(source, reader.config, reader.dtype, reader.marks)
    trm = PairStream(base, data, hybrid.trm.config, seed, source.device, source)
    num_tokens = batch_tokens(hybrid, tasks, config)
    num_soft = coupling.num_back_vectors if coupling.back else 0
    num_sequences = num_tokens // TOKENS_PER_ROW // reader.config.pairs_per_sequence
    stream = JointStream(
        own,
        trm,
        DraftPool(own),
        reader_tokens=max(num_tokens, 2 * (_longest_sequence(reader, tasks, MORE) + num_soft)),
        trm_tokens=num_tokens,
        num_sequences=max(2, num_sequences // 2 * 2),
        num_soft=num_soft,
        no_draft_share=coupling.no_draft_share if coupling.draft else 1.0,
        right_draft_share=coupling.right_draft_share,
        trm_dtype=hybrid.trm.dtype,
        in_twos=coupling.context,
    )
    return JointStep(hybrid, reader, stream, max_attempts=MAX_ATTEMPTS, loss_scale=1.0)


def _num_rows(num_tokens: int, lengths: Sequence[int]) -> int:
    """Rows of a batch of pairs of such lengths: more than it holds on average.

    Of the rows that are many, unused ones cost time: attention launches blocks for each. (Training
    has another rule, `stages._num_rows`: a mixture of tasks always has room for pairs of the usual
    length, where large grids alone need fewer rows.)
    """
    needed = SPARE_ROWS * num_tokens * len(lengths) / sum(lengths)
    return min(num_tokens // TOKENS_PER_ROW, max(MANY_ROWS, int(needed)))


def _largest_canvas(trm: TRM, tasks: Sequence[Task]) -> int:
    return trm.config.num_slots + max(_canvases(tasks))


def _canvases(tasks: Sequence[Task]) -> list[int]:
    """Cells of the canvas of each demonstration."""
    sizes = [pair_canvas(pair) for task in tasks for pair in task.demonstrations]
    return [height * width for height, width in sizes]


def _longest_sequence(reader: JointReader, tasks: Sequence[Task], more: int = 0) -> int:
    """Tokens of the longest sequence of any task, with the reader's marks; its last output has
    `more` rows and columns.
    """
    config = reader.config
    longest = max(_longest_of_task(config, task.demonstrations, more) for task in tasks)
    return reader.marks.length(min(config.longest_sequence, longest), config.pairs_per_sequence)


def _longest_of_task(config: ReaderConfig, demonstrations: Sequence[Pair], more: int) -> int:
    pairs = sorted((_longest_seen(pair) for pair in demonstrations), reverse=True)
    total = sum(pairs[: config.pairs_per_sequence])
    return total + max(_growth(pair, more) for pair in demonstrations)


def _longest_seen(pair: Pair) -> int:
    """Tokens of a pair under the view that makes most of it: a turned grid may have more rows."""
    assert pair.output is not None
    return max(pair_length(pair), pair_length(Pair(pair.input.T, pair.output.T)))


def _growth(pair: Pair, more: int) -> int:
    """Tokens that a draft may have beyond the output of a pair."""
    assert pair.output is not None
    height, width = (min(MAX_SIDE, side + more) for side in pair.output.shape)
    return grid_length(height, width) - grid_length(*pair.output.shape)


def trainable_copy(model: Model, rows: Sequence[int]) -> Model:
    """A trainable float32 copy with the task embeddings of `rows`, in that order, and no others.

    Of a hub reader only what is trained is copied; the model itself is shared.
    """
    if isinstance(model, Hybrid):
        return _hybrid_copy(model, rows)
    weights = _float32(model)
    weights |= {n: weights[n][list(rows)] for n in TASK_TABLES if n in weights}
    with torch.device("meta"):
        copy = _empty(model, len(rows))
    copy.load_state_dict(weights, assign=True)
    copy.dtype = model.dtype
    if isinstance(copy, TRM) and isinstance(model, TRM):
        copy.level = model.level
    return copy.eval()


def _empty(model: TRM | TinyReader, num_tasks: int) -> TRM | TinyReader:
    if isinstance(model, TRM):
        return TRM(model.config, num_tasks)
    return TinyReader(model.config, num_tasks)


def _hybrid_copy(model: Hybrid, rows: Sequence[int]) -> Hybrid:
    reader = _reader_copy(model.reader, rows)
    trm, num_tasks = trainable_copy(model.trm, rows), len(rows)
    assert isinstance(trm, TRM)
    draft_every = min(DRAFT_EVERY * num_tasks, max(DRAFT_EVERY, model.config.draft_every))
    coupling = model.config.model_copy(update={"draft_every": draft_every})
    with torch.device("meta"):
        copy = Hybrid(reader, model.hidden_size, trm, coupling)
    copy.adapters.load_state_dict(_float32(model.adapters), assign=True)
    return copy.eval()


def _reader_copy(reader: nn.Module, rows: Sequence[int]) -> nn.Module:
    if isinstance(reader, HubModule):
        return reader.trainable_copy()
    assert isinstance(reader, TinyReader)
    return trainable_copy(reader, rows)


def _float32(module: nn.Module) -> dict[str, torch.Tensor]:
    copies = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return {name: t.float() if t.is_floating_point() else t for name, t in copies.items()}

"""What `data_path` and `epochs` of `arctrm joint` mean, which only the data tells."""

from math import ceil
from pathlib import Path
from typing import Any

import torch

from arctrm.config.data import DataConfig
from arctrm.config.joint import JointConfig
from arctrm.data.dataset import BaseSet, open_base_set
from arctrm.data.sources import BUNDLED, subset_label
from arctrm.errors import ConfigError
from arctrm.training import reader_stream as reading
from arctrm.training.joint_stream import JointStream

MEASURED_BATCHES = 16


def with_data_path(config: JointConfig) -> JointConfig:
    """The configuration with `data_path` written into its table `data`; idempotent.

    Raises:
        DataError: the folder of a built data set cannot be read.
        ConfigError: it contradicts `data.path`.
    """
    if config.data_path is None:
        return config
    folder = Path(config.data_path)
    built = config.data_path not in BUNDLED and (folder / "meta.json").is_file()
    data = _of_built(config, folder) if built else _of_source(config.data, config.data_path)
    return config.model_copy(update={"data": data})


def _of_source(data: DataConfig, source: str) -> DataConfig:
    label = subset_label(source)
    return _changed(
        data,
        subsets=(source,),
        test_set=source if data.test_set == source else None,
        weights={name: weight for name, weight in data.weights.items() if name == label},
    )


def _of_built(config: JointConfig, folder: Path) -> DataConfig:
    data = config.data
    if data.path not in (None, folder):
        raise ConfigError(
            f"data_path = {str(folder)!r} contradicts data.path = {str(data.path)!r}; leave one of "
            "them out"
        )
    meta = open_base_set(folder).meta
    weights = {name: weight for name, weight in data.weights.items() if name in meta.subsets}
    return _changed(data, **meta.built_from, path=folder, weights=weights)


def _changed(data: DataConfig, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({**dict(data), **changes})


def steps_of(
    epochs: int, base: BaseSet, stream: JointStream, batches_per_step: int, seed: int
) -> int:
    """Optimiser steps in which `epochs` times as many outputs are asked for as there are pairs."""
    return ceil(epochs * base.num_pairs / (mean_sequences(stream, seed) * batches_per_step))


@torch.no_grad()
def mean_sequences(stream: JointStream, seed: int) -> float:
    """Sequences in a batch, each of which asks for one output: the mean of a few batches.

    They are drawn from a random state of their own, so that a resumed run finds the same.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = [
            stream.draw().sequences[:, -1, reading.LENGTH] > 0 for _ in range(MEASURED_BATCHES)
        ]
    return max(float(torch.stack(drawn).float().sum(1).mean()), 1.0)

"""What `data_path`, `epochs` and `coupling.heard_pairs` of `arctrm joint` mean, which only the data
tells.
"""

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arctrm.config.data import DataConfig
from arctrm.config.joint import JointConfig
from arctrm.data.dataset import BaseSet, open_base_set
from arctrm.data.sources import BUNDLED, subset_label
from arctrm.errors import ConfigError
from arctrm.training import reader_stream as reading
from arctrm.training.joint_stream import JointStream
from arctrm.training.source import IS_TEST, pair_weights

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


def needs_heard_pairs(config: JointConfig) -> bool:
    """Whether TRM is to hear the reader, and about test pairs only."""
    coupling = config.coupling
    return coupling.heard_pairs == "test" and (coupling.context or coupling.draft)


def require_heard_pairs(config: JointConfig, base: BaseSet) -> None:
    """Refuse a data set about no pair of which TRM would hear the reader.

    Raises:
        ConfigError: says why no test pair is drawn, and what to change.
        DataError: the weights do not fit the data set.
    """
    data = config.data
    if not needs_heard_pairs(config):
        return
    is_test = np.asarray(base.pairs)[:, IS_TEST].astype(bool)
    if (pair_weights(base, data)[is_test] > 0).any():
        return
    num_tests = f"{is_test.sum():,}"
    if not is_test.any():
        problem = (
            f"0 of its {base.num_pairs:,} pairs are test pairs that may be trained "
            f"on (data.test_set = {base.meta.test_set!r}, data.held_out = {data.held_out})"
        )
        cure = "add a set that is not evaluated to data.subsets"
    elif data.test_pair_weight == 0:
        problem = f"all {num_tests} test pairs have data.test_pair_weight = {data.test_pair_weight}"
        cure = "set that above 0"
    else:
        problem = f"all {num_tests} test pairs have no weight in data.weights = {data.weights}"
        cure = "give one of their subsets a weight above 0"
    raise ConfigError(
        "coupling.heard_pairs = 'test': the data set has no test pair about which TRM could hear "
        f"the reader, for {problem}; {cure}, or set coupling.heard_pairs = 'all'"
    )


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

"""A cell's training and held-out sequences, and the order in which every method of a table sees them."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from experiments.data.encode import Encoded, encode
from experiments.data.overlap import evaluation_questions, hub_questions
from experiments.data.sources import HubSet, load, release_root
from experiments.mistakes import ConfigError
from experiments.schema import Config

MEGABATCH = 50  # batches among which lengths are grouped, as in Hugging Face's sampler


@dataclass(frozen=True)
class Examples:
    train: list[Encoded]
    held_out: list[Encoded]
    report: dict


def release_folder(config: Config) -> Path | None:
    """The folder with the benchmarks' release files, or None for the hub."""
    return None if config.source == "hub" else release_root(config.source, config.root and Path(config.root), seed=0)


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Load and encode the data set of a cell. Its rows do not depend on the method or the cell's seed."""
    root = release_folder(config)
    hub = config.data.hub
    loaded = load(
        config.data.name,
        config.source,
        root=config.root and Path(config.root),
        hub=HubSet(hub.id, hub.config, hub.revision, hub.split),
        held_out=config.tasks.heldout_items,
        evaluation=evaluation_questions(root) if root else hub_questions(config.tasks.benchmarks),
    )
    lengths = config.data.source_max_len, config.data.target_max_len
    train, held_out = (
        [encoded for encoded in (encode(e, tokenizer, *lengths) for e in part) if encoded.supervised]
        for part in (loaded.train, loaded.held_out)
    )
    train = _drawn(train, config)
    if len(train) < config.budget.batch:
        raise ConfigError(
            f"budget.batch is {config.budget.batch}, but {config.data.name} has only {len(train)} training rows; "
            "choose a smaller batch or more data"
        )
    report = loaded.report | {
        "sha256": hashlib.sha256(repr([(e.input_ids, e.prompt_tokens) for e in train]).encode()).hexdigest(),
        "truncated": sum(e.truncated for e in train),
        "mean_tokens": float(np.mean([len(e) for e in train])),
        "mean_supervised_tokens": float(np.mean([e.supervised for e in train])),
    }
    return Examples(train, held_out, report)


def _drawn(train: list[Encoded], config: Config) -> list[Encoded]:
    """`data.rows` of the rows. ConfigError if there are fewer."""
    rows = config.data.rows
    if rows is None:
        return train
    if rows > len(train):
        raise ConfigError(
            f"data.rows is {rows}, but {config.data.name} has only {len(train)} training rows; choose fewer, or null"
        )
    return random.Random(0).sample(train, rows)


def order(lengths: list[int], batches: int, batch: int, seed: int, group_by_length: bool) -> np.ndarray:
    """Which example is seen when, shape (batches * batch,): every method of a table gets the same order.

    Epoch by epoch a new permutation. With `group_by_length`, examples of similar length share a batch (sorted
    within 50 batches, as Hugging Face's sampler does; the batches then come in random order). Within a batch
    the longest come first in any case, so that its micro-batches need little padding.
    """
    lengths = np.asarray(lengths)
    per_epoch = len(lengths) // batch

    def longest_first(examples: np.ndarray) -> np.ndarray:
        return examples[np.argsort(-lengths[examples], kind="stable")]

    seen: list[np.ndarray] = []
    for epoch in range(-(-batches // per_epoch)):
        rng = np.random.default_rng((seed, epoch))
        examples = rng.permutation(len(lengths))
        if group_by_length:
            mega = np.array_split(examples, range(MEGABATCH * batch, len(examples), MEGABATCH * batch))
            examples = np.concatenate([longest_first(part) for part in mega])
        rows = examples[: per_epoch * batch].reshape(-1, batch)
        seen += [longest_first(row) for row in (rng.permutation(rows) if group_by_length else rows)]
    return np.concatenate(seen[:batches])


class Ordered(Dataset):
    """Examples in the order of training, to be read from first to last."""

    def __init__(self, examples: list[Encoded], indices: np.ndarray):
        self.examples, self.indices = examples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Encoded:
        return self.examples[self.indices[i]]

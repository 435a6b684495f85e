"""Download what a table needs, for compute nodes without internet:  make prefetch SCALE=paper

Models, data sets and benchmarks go to the Hugging Face cache (HF_HOME says where); with HF_HUB_OFFLINE=1 every
command then finds them there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from datasets import load_dataset
from huggingface_hub import snapshot_download
from hydra.core.hydra_config import HydraConfig

from eval.benchmarks import FEWSHOT_SPLIT, rows
from eval.hub import fetched
from experiments.cell import Cell, note
from experiments.cli import command
from experiments.schema import Config
from experiments.table import cells

MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt"]


def needed(found: list[Cell]) -> dict[str, Callable[[], object]]:
    """What the cells take from the hub, by name, each with the call that fetches it."""
    calls: dict[str, Callable[[], object]] = {}
    for c in (cell.config for cell in found):
        model = c.model.id
        if not model.startswith("package:") and model != "random" and not Path(model).exists():
            calls[model] = partial(snapshot_download, model, revision=c.model.revision, allow_patterns=MODEL_FILES)
        if c.source == "hub":
            hub = c.data.hub
            calls[hub.id] = partial(load_dataset, hub.id, hub.config, revision=hub.revision, split=hub.split)
            for name in c.tasks.benchmarks:
                for split in {"validation", "test", FEWSHOT_SPLIT[name]}:
                    calls[f"{name}, {split}"] = partial(rows, name, split, None)
    return calls


def main(config: Config) -> None:
    found = [cell for _, cell in cells(config, list(HydraConfig.get().overrides.task))]
    calls = needed(found)
    for i, (name, fetch) in enumerate(calls.items(), 1):
        note(f"[{i}/{len(calls)}] {name}")
        with fetched(name):
            fetch()


if __name__ == "__main__":
    command(main)

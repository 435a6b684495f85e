"""A cell - one (table, model, data, method, seed, scale), and budget where a table sweeps it - its folder, and the
files that tell how far it is.

outputs/<scale>/<table>/<model>--<data>--<method>--seed<N>[--steps<N> where the table sweeps budgets]/
    record.json      the result; there is one only when the cell has ended
    adapter/         the trained adapter of rank r_max
    training.json    what training spent
    parts/, items/   scores and per-item outcomes as they are computed
    checkpoints/, log.jsonl, wandb/
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

from experiments.config import Config, substance

SCHEMA = 1
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "lm_eval", "numpy")


@dataclass
class Cell:
    config: Config

    @property
    def name(self) -> str:
        c = self.config
        name = f"{c.model.name}--{c.data.name}--{c.method.name}--seed{c.seed}"
        return f"{name}--steps{c.budget.steps}" if c.table.budgets else name

    @property
    def key(self) -> dict:
        c = self.config
        return {
            "table": c.table.name,
            "model": c.model.name,
            "data": c.data.name,
            "method": c.method.name,
            "seed": c.seed,
            "scale": c.scale,
        }

    @property
    def budget(self) -> dict:
        """What the cell may spend: optimizer steps, examples, and tokens if stated."""
        budget = self.config.budget
        return {"steps": budget.steps, "examples": budget.steps * budget.batch, "tokens": budget.tokens}

    @property
    def folder(self) -> Path:
        return Path(self.config.outputs) / self.config.scale / self.config.table.name / self.name

    @property
    def record_file(self) -> Path:
        return self.folder / "record.json"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def cache(self) -> Path:
        return Path(self.config.outputs) / "cache"

    @cached_property
    def plain_config(self) -> dict:
        """The configuration as JSON holds it."""
        return json.loads(json.dumps(asdict(self.config)))

    @property
    def digest(self) -> str:
        """Changes when, and only when, the configuration asks for other results."""
        return hashlib.sha256(json.dumps(substance(self.plain_config), sort_keys=True).encode()).hexdigest()[:12]

    def record(self) -> dict | None:
        """The record of this very configuration, or None if the cell has not ended or has failed, or if it was
        forecast not to fit another GPU."""
        record = read_json(self.record_file) or {}
        if record.get("digest") != self.digest or record["status"] == "failed":
            return None
        elsewhere = record.get("oom") == "forecast" and record["config"]["forecast"] != self.plain_config["forecast"]
        return None if elsewhere else record

    def prepare(self) -> list[str]:
        """Make the folder. If it holds another configuration's work, put that aside and return what differs."""
        marker = self.folder / "config.json"
        before = read_json(marker)
        changed = []
        if before and before["digest"] != self.digest:
            changed = sorted(_differences(before["config"], substance(self.plain_config)))
            os.replace(self.folder, self.folder.with_name(f"{self.name}~{before['digest']}"))
        if not before or changed:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(marker, {"digest": self.digest, "config": substance(self.plain_config)})
        return changed

    def finish(self, status: str, reason: str | None = None, **results) -> dict:
        """Write and return the record."""
        record = {
            "schema": SCHEMA,
            "name": self.name,
            "cell": self.key,
            "status": status,
            "reason": reason,
            "digest": self.digest,
            "config": self.plain_config,
            **environment(),
            **results,
        }
        write_json(self.record_file, record)
        return record


def environment() -> dict:
    """Versions, commit and machine, for a record."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def commit() -> str | None:
    """The repository's commit, with -dirty if the tree differs from it; None outside a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def read_json(file: Path) -> dict | None:
    """A JSON file's content, None if there is no file. ValueError that names it if it is broken."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}); delete it, and what it says is computed again"
        ) from error


def write_json(file: Path, content: dict) -> None:
    """Write a JSON file so that a reader, or a crash, sees the old one or the new one and nothing between."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with open(draft, "w") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)


def note(text: str) -> None:
    """A line for the user, beside progress bars."""
    print(text, file=sys.stderr, flush=True)


def _differences(a, b, path: str = "") -> list[str]:
    """Dotted names of the leaves in which two configurations differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d for key in a.keys() | b.keys() for d in _differences(a.get(key), b.get(key), f"{path}.{key}".strip("."))
        ]
    return [] if a == b else [path]

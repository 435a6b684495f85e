"""A cell - one (table, model, data, method, seed, scale), and budget where a table sweeps it - its folder, and the
files that tell how far it is.

outputs/<scale>/<table>/<model>--<data>--<method or variant>--seed<N>[--steps<N> where the table sweeps budgets]/
    record.json      the result; there is one only when the cell has ended
    adapter/         the trained adapter of rank r_max
    training.json    what training spent
    parts/, items/   scores and per-item outcomes as they are computed
    checkpoints/, log.jsonl, tracker.json, wandb/
    config.json, starts.json
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

from experiments.config import substance
from experiments.files import Damaged, read_json, write_json
from experiments.schema import Config

SCHEMA = 1
FOLDERS = ("root", "outputs")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "lm_eval", "numpy")


@dataclass
class Cell:
    """at: its folder, where that is not the one that its configuration says."""

    config: Config
    at: Path | None = None

    @property
    def name(self) -> str:
        c = self.config
        rank = f"--r{c.ranks.r_max}" if c.table.ranks else ""
        steps = f"--steps{c.budget.steps}" if c.table.budgets else ""
        return f"{c.model.name}--{c.data.name}--{self.method}{rank}--seed{c.seed}{steps}"

    @property
    def method(self) -> str:
        """What tells the cell from others of its model, data set and seed: its variant's name, or its method's."""
        return self.config.table.variant or self.config.method.name

    @property
    def key(self) -> dict:
        c = self.config
        return {
            "table": c.table.name,
            "model": c.model.name,
            "data": c.data.name,
            "method": self.method,
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
        return self.at or Path(self.config.outputs) / self.config.scale / self.config.table.name / self.name

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
    def portable_config(self) -> dict:
        """`plain_config` without the folders of this machine, for what is read elsewhere."""
        return {key: value for key, value in self.plain_config.items() if key not in FOLDERS}

    @property
    def digest(self) -> str:
        """Changes when, and only when, the configuration asks for other results."""
        return hashlib.sha256(json.dumps(substance(self.plain_config), sort_keys=True).encode()).hexdigest()[:12]

    def record(self) -> dict | None:
        """The record of this very configuration, or None if the cell has not ended or has failed, or if it was
        forecast not to fit another GPU."""
        record = self.ended()
        if record is None or record["status"] == "failed":
            return None
        elsewhere = record.get("oom") == "forecast" and record["config"]["forecast"] != self.plain_config["forecast"]
        return None if elsewhere else record

    def ended(self) -> dict | None:
        """As `record`, but also that of a failed cell. Damaged if the file is, or was written by other code."""
        record = read_json(self.record_file)
        if record is None:
            return None
        if record.get("schema") != SCHEMA:
            raise Damaged(
                f"{self.record_file} has record schema {record.get('schema')!r}, and this code writes {SCHEMA}; "
                "use the code that wrote it, or delete it to have the cell scored again"
            )
        return record if record.get("digest") == self.digest else None

    def prepare(self) -> list[str]:
        """Make the folder. If it holds another configuration's work, put that aside and return what differs."""
        marker = self.folder / "config.json"
        before = read_json(marker)
        changed = []
        if before and before["digest"] != self.digest:
            changed = sorted(differences(before["config"], substance(self.plain_config)))
            os.replace(self.folder, self.folder.with_name(f"{self.name}~{before['digest']}"))
        for draft in self.folder.rglob(".*.json.*"):  # of a process killed while it wrote
            draft.unlink()
        if not before or changed:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(marker, {"digest": self.digest, "config": substance(self.plain_config)})
        return changed

    def withdraw(self) -> None:
        """Remove the folder if nothing has been computed in it."""
        bookkeeping = {self.folder / "config.json", self.folder / "starts.json"}
        if self.folder.is_dir() and set(self.folder.iterdir()) <= bookkeeping:
            shutil.rmtree(self.folder)

    def finish(self, status: str, reason: str | None = None, **results) -> dict:
        """Write and return the record."""
        record = {
            "schema": SCHEMA,
            "name": self.name,
            "cell": self.key,
            "status": status,
            "reason": reason,
            "digest": self.digest,
            "config": self.portable_config,
            **environment(),
            **({"budget": {"asked": self.budget}, "peak_memory_bytes": peak_memory()} if status != "done" else {}),
            **results,
        }
        write_json(self.record_file, record)
        (self.folder / "starts.json").unlink(missing_ok=True)
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


def peak_memory() -> int:
    """Most bytes in use at once so far: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def note(text: str) -> None:
    """A line for the user, beside progress bars."""
    print(text, file=sys.stderr, flush=True)


def differences(a, b, path: str = "") -> list[str]:
    """Dotted names of the leaves in which two configurations differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d for key in a.keys() | b.keys() for d in differences(a.get(key), b.get(key), f"{path}.{key}".strip("."))
        ]
    return [] if a == b else [path]

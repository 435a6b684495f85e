"""The golden records laid out as a scale's outputs folder, with what they lack: logs, sizes, updates, a forecast."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from analysis.stats import Bootstrap

GOLDEN = Path(__file__).parent / "golden" / "records"
HOW = Bootstrap(resamples=500)
RANKS = [1, 2, 4, 8, 16, 32, 64]
ALPACA = "smollm2-135m--alpaca--qdylora--seed0"
FORECAST = {
    "llama2-13b, DyLoRA": {"base_rest": 26 * 2**30, "activations": 5 * 2**30},
    "falcon-40b, QDyLoRA": {"base_4bit": 21 * 2**30, "base_rest": 2**30, "activations": 4 * 2**30},
}


def make(folder: Path) -> Path:
    """`folder` as outputs/mini: the golden records as Table 1, Alpaca's two cells with all that a new record has."""
    shutil.copytree(GOLDEN, folder / "table1")
    for method, memory in (("qlora", 5 * 2**30), ("qdylora", 4 * 2**30)):
        cell = folder / "table1" / ALPACA.replace("qdylora", method)
        expected = [640.0] * 64 if method == "qlora" else [10.0 * (65 - row) for row in range(1, 65)]
        sizes = {str(rank): rank * 2**20 for rank in RANKS}
        counted = [round(count) for count in expected]
        change(cell, adapter_bytes=sizes, peak_memory_bytes=memory, updates=counted, expected_updates=expected)
        losses = [None if step % 2 else {"1": 2.0 / step, "8": 1.0 / step} for step in range(1, 7)]
        lines = [json.dumps(line(step, heldout=loss)) + "\n" for step, loss in enumerate(losses, start=1)]
        (cell / "log.jsonl").write_text("".join(lines))
    (folder.parent / "forecast").mkdir()
    for label, parts in FORECAST.items():
        model, method = label.lower().split(", ")
        raw = {
            "cell": {"scale": "paper", "model": model, "method": method},
            "gpu_gb": 32.0,
            "reserve_gb": 1.0,
            "checkpoint_activations": True,
            "forecasts": {
                "checkpointed": {"parts": parts, "pageable_bytes": 2**30},
                "not_checkpointed": {"parts": {"activations": 2**40}, "pageable_bytes": 0},
            },
        }
        (folder.parent / "forecast" / f"paper--{model}--alpaca--{method}.json").write_text(json.dumps(raw))
    return folder


def line(step: int, **more) -> dict:
    """A line of a training log."""
    measured = {"tokens_per_second": 100.0 * step, "peak_memory_bytes": step * 2**30}
    return {"step": step, "loss": 3.0 / step, "ranks": [step, step, 2 * step], "heldout": None} | measured | more


def change(cell: Path, /, **more) -> None:
    """Add keys to a cell's record."""
    file = cell / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))

"""Forecasts of training memory, as `make forecast` writes them: one JSON a cell, beside the scales' folders."""

import json
from dataclasses import dataclass
from pathlib import Path

from analysis.grid import METHODS

GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """parts: bytes by part at the peak of a training step, as the cell is configured. pageable: bytes of it that may be
    on the host. gpu, reserve: bytes of the GPU asked about and of what is kept free of training there, or None.
    """

    scale: str
    model: str
    method: str
    parts: dict[str, int]
    pageable: int
    gpu: int | None
    reserve: int

    @property
    def label(self) -> str:
        return f"{self.model}, {METHODS.get(self.method, self.method)}"

    def for_claims(self) -> dict:
        """The bytes that the GPU has and those that it must have."""
        needed = sum(self.parts.values()) - self.pageable + self.reserve
        return {"model": self.model, "method": self.method, "gpu_bytes": self.gpu, "needed_bytes": needed}


def forecasts(folder: Path) -> list[Forecast]:
    """The forecasts beside the scale's `folder` (outputs/<scale> -> outputs/forecast), of any scale: they need no run.
    ValueError that names a broken file."""
    return [_read(file) for file in files(folder)]


def files(folder: Path) -> list[Path]:
    """Of the forecasts beside the scale's `folder`, in order of their names."""
    return sorted((folder.resolve().parent / "forecast").glob("*.json"))


def _read(file: Path) -> Forecast:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        found = raw["forecasts"]["checkpointed" if raw["checkpoint_activations"] else "not_checkpointed"]
        cell, gpu = raw["cell"], raw["gpu_gb"]
        return Forecast(
            scale=cell["scale"],
            model=cell["model"],
            method=cell["method"],
            parts={part: int(size) for part, size in found["parts"].items()},
            pageable=int(found["pageable_bytes"]),
            gpu=None if gpu is None else int(gpu * GIB),
            reserve=int(raw["reserve_gb"] * GIB),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a memory forecast ({error!r}). Delete it and run the forecast again.") from error

"""Forecast a cell's training memory, without the model's weights:  make forecast MODEL=falcon_40b METHOD=qdylora GPU=32

Prints bytes by part with and without activation checkpointing, hours of training at forecast.tflops, whether it fits
forecast.gpu_gb, and the largest micro-batch that does; writes the same to outputs/forecast/ as JSON.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig

from experiments.cell import Cell, note
from experiments.cli import command, quiet
from experiments.files import write_json
from experiments.method import adapted, base_settings
from experiments.mistakes import ConfigError
from experiments.schema import Config, MemoryForecast
from qdylora.base import base_without_weights
from qdylora.forecast import Forecast, Shape, Training, forecast, largest_micro_batch, without_weights

GIB = 1 << 30
LABELS = {
    "base_4bit": "base: 4-bit weights",
    "base_constants": "base: quantization constants",
    "base_rest": "base: other weights",
    "adapter": "adapter",
    "gradients": "adapter's gradients",
    "optimizer": "optimizer's state",
    "activations": "activations",
    "logits": "logits and loss",
    "workspace": "workspace",
}


def forecast_of(config: Config) -> Forecast:
    """The forecast of a cell's training step on a GPU, with the longest rows that its data settings allow."""
    return forecast(model_of(config), shape_of(config), training_of(config))


def why_not(memory: Forecast, settings: MemoryForecast) -> str | None:
    """Why training cannot fit the GPU of `settings`, or None if it can, if need be by paging optimizer state out."""
    if memory.needed <= usable(settings):
        return None
    paged = f" even with {memory.pageable / GIB:.1f} GiB of optimizer state on the host" if memory.pageable else ""
    return (
        f"forecast: training needs {memory.needed / GIB:.1f} GiB{paged}, and a GPU of {settings.gpu_gb:g} GiB has "
        f"{usable(settings) / GIB:.1f} left for it"
    )


def usable(settings: MemoryForecast) -> int:
    """Bytes of the GPU that training may allocate."""
    return int((settings.gpu_gb - settings.reserve_gb) * GIB)


def model_of(config: Config) -> PeftModel:
    """The cell's model with its adapter, without weights."""
    base = base_without_weights(architecture(config), **base_settings(on_a_gpu(config)))
    return without_weights(lambda: adapted(base, config))


def on_a_gpu(config: Config) -> Config:
    """`config` with the compute type that `auto` is on a GPU: this machine's, or bfloat16 where it has none."""
    left_open = config.optim.compute_dtype == "auto" and config.method.bits != 32
    if torch.cuda.is_available() or not left_open:
        return config
    return replace(config, optim=replace(config.optim, compute_dtype="bfloat16"))


def architecture(config: Config) -> PreTrainedConfig:
    """The base model's transformers configuration, from the model itself if it is a folder here. ConfigError if it is
    nowhere to be had."""
    model = config.model
    known = model.random or model.architecture
    if known and not (Path(model.id) / "config.json").is_file():
        return AutoConfig.for_model(**{key: value for key, value in known.items() if key != "seed"})
    try:
        return AutoConfig.from_pretrained(model.id, revision=model.revision, trust_remote_code=False)
    except OSError as error:
        raise ConfigError(
            f"model.architecture is not set and {model.id} cannot be asked for it; "
            "set it, as the files in conf/model do"
        ) from error


def shape_of(config: Config) -> Shape:
    data = config.data
    return Shape(config.optim.micro_batch, data.source_max_len + data.target_max_len, 1 + data.target_max_len)


def training_of(config: Config) -> Training:
    c = config
    return Training(
        optimizer=c.optim.name,
        checkpoint_activations=c.optim.checkpoint_activations,
        accumulate=c.budget.batch > c.optim.micro_batch,
        update=c.method.update,
        rank_per_row=c.method.draw.per == "sequence",
    )


def hours(flops_per_step: int, config: Config) -> float:
    """Of training on one GPU of the rate stated, with every row as long as the data settings allow."""
    return flops_per_step * config.budget.steps / (config.forecast.tflops * 1e12) / 3600


def report(config: Config) -> dict:
    """Forecasts with and without activation checkpointing, as plain values."""
    model, shape, training = model_of(config), shape_of(config), training_of(config)
    found = {}
    for name, on in {"checkpointed": True, "not_checkpointed": False}.items():
        choice = replace(training, checkpoint_activations=on)
        memory = forecast(model, shape, choice)
        found[name] = {
            "parts": memory.parts,
            "peak_bytes": memory.peak,
            "pageable_bytes": memory.pageable,
            "flops_per_step": memory.flops * config.budget.batch // config.optim.micro_batch,
        }
        found[name]["hours"] = hours(found[name]["flops_per_step"], config)
        if config.forecast.gpu_gb is not None:
            found[name] |= {
                "fits": why_not(memory, config.forecast) is None,
                "largest_micro_batch": largest_micro_batch(model, shape, choice, usable(config.forecast)),
            }
    return {
        "cell": Cell(config).key,
        "gpu_gb": config.forecast.gpu_gb,
        "reserve_gb": config.forecast.reserve_gb,
        "tflops": config.forecast.tflops,
        "steps": config.budget.steps,
        "micro_batch": shape.micro_batch,
        "batch": config.budget.batch,
        "length": shape.length,
        "logits": shape.logits,
        "bits": config.method.bits,
        "r_max": config.ranks.r_max,
        "compute_dtype": str(model.dtype).removeprefix("torch."),
        "adapter_dtype": config.optim.adapter_dtype,
        "optimizer": config.optim.name,
        "checkpoint_activations": config.optim.checkpoint_activations,
        "forecasts": found,
    }


def table(r: dict) -> str:
    """A report as text: a line by part, in GiB."""
    chosen = "checkpointed" if r["checkpoint_activations"] else "not_checkpointed"
    columns = list(r["forecasts"].values())
    heads = [name.replace("_", " ") + (" *" if name == chosen else "") for name in r["forecasts"]]
    lines = [("GiB at the peak", *heads)]
    lines += [(label, *(_gib(c["parts"][part]) for c in columns)) for part, label in LABELS.items()]
    lines.append(("total", *(_gib(c["peak_bytes"]) for c in columns)))
    if any(c["pageable_bytes"] for c in columns):
        lines.append(("of it pageable to the host", *(_gib(c["pageable_bytes"]) for c in columns)))
    lines.append(("10^12 operations a step", *(f"{c['flops_per_step'] / 1e12:.1f}" for c in columns)))
    lines.append((f"hours of training at {r['tflops']:g} of them a second", *(f"{c['hours']:.1f}" for c in columns)))
    if r["gpu_gb"] is not None:
        lines.append((f"fits {r['gpu_gb']:g} GiB less {r['reserve_gb']:g}", *(_verdict(c, r) for c in columns)))
        lines.append(("largest micro-batch", *(str(c["largest_micro_batch"]) for c in columns)))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    body = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in lines]
    return "\n".join([_title(r), "", *body])


def _title(r: dict) -> str:
    cell = r["cell"]
    dtypes = f"{r['bits']}-bit base, {r['compute_dtype']} compute, {r['adapter_dtype']} adapter of r_max {r['r_max']}"
    return (
        f"{cell['model']}, {cell['method']}, scale {cell['scale']}: {dtypes}, {r['optimizer']};\n"
        f"{cell['data']}: rows of up to {r['length']} tokens, logits of {r['logits']}; {r['micro_batch']} at a time, "
        f"{r['batch']} a step, {r['steps']} steps; * as configured"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _verdict(column: dict, r: dict) -> str:
    if not column["fits"]:
        return "no"
    return "yes" if column["peak_bytes"] <= (r["gpu_gb"] - r["reserve_gb"]) * GIB else "by paging"


def main(config: Config) -> None:
    quiet()
    r = report(config)
    c = r["cell"]
    file = Path(config.outputs) / "forecast" / f"{c['scale']}--{c['model']}--{c['data']}--{c['method']}.json"
    write_json(file, r)
    print(table(r))
    note(f"written to {file}")


if __name__ == "__main__":
    command(main)

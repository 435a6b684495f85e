"""Speed of scoring at seven ranks against stock lm-eval:  make bench-score

Both sides answer the same real prompts with the same 4-bit SmolLM2-135M and the same adapter: stock lm-eval on stock
PEFT one rank after the other, at the best of several batch sizes; ours all at once. The questions come from
the release files in the folder named as argument, else from the hub. Writes outputs/bench/score.json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.benchmarks import Settings, Task, load
from eval.dequantize import dequantized
from experiments.against_stock import R_MAX, Subject, max_abs_dlogp, only, outcomes, outcomes_of_all_ranks
from experiments.cell import environment, note
from experiments.cli import quiet
from experiments.files import write_json
from qdylora import compute_dtype

RANKS = [1, 2, 4, 8, 16, 32, 64]
# Of about the average length; with 30 questions in each, stock lm-eval reads 6.5 tokens for one of ours, as on all
# 57 subjects.
MMLU_SUBJECTS = ["mmlu_machine_learning", "mmlu_professional_accounting"]
BATCH_SIZES = {"mmlu": (1, 4, 16), "gsm8k": (8, 16), "triviaqa": (8, 40)}
TRIAL = {"mmlu": 8, "gsm8k": 16, "triviaqa": 40}  # documents of each part on which a batch size is tried


def tasks(root: Path | None) -> dict[str, Task]:
    """The prompts, all five-shot: 30 questions in each of two MMLU subjects, 16 of GSM8K, 40 of TriviaQA."""
    return {
        "mmlu": mmlu(root, 30),
        "gsm8k": load("gsm8k", "test", Settings(5, root, limit=16)),
        "triviaqa": load("triviaqa", "test", Settings(5, root, limit=40)),
    }


def mmlu(root: Path | None, each: int) -> Task:
    return only(load("mmlu", "test", Settings(5, root, limit=57 * each)), MMLU_SUBJECTS)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def ours(subject: Subject, folder: Path, ranks: list[int]) -> Iterator[Callable[[Task], dict]]:
    """Outcomes of a task at `ranks`, each call computed afresh."""
    model = subject.any_rank(folder)
    with dequantized(model):
        lm = subject.ours(model, ranks)

        def answers(task: Task) -> dict[int, dict]:
            lm.forget()
            return outcomes_of_all_ranks(lm, task)

        yield answers


def stock_seconds(subject: Subject, folder: Path, name: str, task: Task) -> dict:
    """Seconds of stock lm-eval at each rank, at the batch size that is fastest on a few documents."""
    lms = {size: subject.stock(folder, RANKS[3], size) for size in BATCH_SIZES[name]}
    trial = {size: seconds(lambda lm=lm: outcomes(lm, task, TRIAL[name])) for size, lm in lms.items()}
    del lms
    best = min(trial, key=trial.get)
    spent = {}
    for rank in RANKS:
        lm = subject.stock(folder, rank, best)
        spent[rank] = seconds(lambda lm=lm: outcomes(lm, task))
        note(f"{name}: stock lm-eval at rank {rank}, batch size {best}: {spent[rank]:.0f} s")
    return {"batch_size": best, "seconds": spent}


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of large matrices on this machine."""
    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(10))


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of what `work` computes."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def arithmetic(subject: Subject, folder: Path, task: Task) -> dict[str, float]:
    """Of a task at one rank: the share of the machine's matrix-multiply rate that ours reaches, and how many times as
    many operations stock lm-eval needs. No scorer that is as busy as stock lm-eval can be faster by more than that."""
    with ours(subject, folder, [RANKS[3]]) as answers:
        needed, spent = flops(lambda: answers(task)), seconds(lambda: answers(task))
    stock = subject.stock(folder, RANKS[3], 1)
    with dequantized(stock.model, "always"):  # the operations of bitsandbytes' own layers would not be counted
        ratio = flops(lambda: outcomes(stock, task)) / needed
    return {"matmul_share": needed / spent / matmul_rate(subject.dtype), "mmlu_flops_ratio": ratio}


def exactness(root: Path | None, folder: Path) -> float:
    """Largest difference in log-likelihood from stock lm-eval in float32, at ranks 1, 8, 64."""
    subject, ranks = Subject(dtype=torch.float32), [1, 8, R_MAX]
    task = mmlu(root, 4)
    with ours(subject, folder, ranks) as answers:
        got = answers(task)
    return max(max_abs_dlogp(got[rank], outcomes(subject.stock(folder, rank, 4), task)) for rank in ranks)


def growth(subject: Subject, folder: Path, task: Task) -> dict[str, float]:
    """Seconds of ours at one rank, at the seven and at all, and their ratios."""
    spent = []
    for ranks in ([R_MAX], RANKS, list(range(1, R_MAX + 1))):
        with ours(subject, folder, ranks) as answers:
            spent.append(seconds(lambda answers=answers: answers(task)))
    one, seven, every = spent
    return {"seconds": spent, "7_to_1": seven / one, "64_to_7": every / seven}


def main(root: Path | None) -> None:
    quiet()
    dtype = compute_dtype()
    subject, prompts = Subject(dtype=dtype), tasks(root)
    result: dict = {"setting": {"model": "smollm2-135m", "bits": 4, "dtype": str(dtype), "ranks": RANKS}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["max_abs_dlogp"] = exactness(root, folder)
        spent = {}
        with ours(subject, folder, RANKS) as answers:
            for task_name, task in prompts.items():
                spent[task_name] = seconds(lambda task=task: answers(task))
                note(f"{task_name}: ours at {len(RANKS)} ranks: {spent[task_name]:.0f} s")
        result |= arithmetic(subject, folder, prompts["mmlu"])
        result["growth"] = growth(subject, folder, mmlu(root, 4))
        for task_name, task in prompts.items():
            stock = stock_seconds(subject, folder, task_name, task)
            result[f"{task_name}_speedup"] = sum(stock["seconds"].values()) / spent[task_name]
            result[task_name] = {
                "documents": sum(len(part.eval_docs) for part in task.loaded["tasks"].values()),
                "ours_seconds": spent[task_name],
                "stock": stock,
            }
    write_json(Path("outputs/bench/score.json"), result | {"machine": environment()["machine"]})
    print({k: round(v, 6) for k, v in result.items() if isinstance(v, float)}, result["growth"])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)

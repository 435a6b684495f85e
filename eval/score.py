"""Score an adapter at all ranks on a benchmark, with lm-eval's metrics, and keep every item's outcome."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import lm_eval
import numpy as np
import sacrebleu

from eval.benchmarks import BENCHMARKS, Task
from eval.engine import AllRanks, Pair
from eval.lm import RankedLM

logging.getLogger("lm_eval").setLevel(logging.ERROR)


def score(lm: RankedLM, task: Task, items_file: Path) -> dict:
    """Evaluate `task` at every rank of `lm`; write the items' outcomes to `items_file`.

    Returns {n, sha256, ranks: {rank: {value, stderr, other metrics}}}, where value is the benchmark's main
    metric: the mean over items (MMLU: over questions; `macro` is over subjects), in the metric's own unit.
    """
    benchmark = BENCHMARKS[task.name]
    ranks, items = {}, {}
    for rank in lm.engine.ranks:
        with _without_lm_eval_progress():
            result = lm_eval.evaluate(lm.view(rank), task.ready(), log_samples=True)
        ranks[str(rank)] = _metrics(result, task, benchmark)
        for name, samples in result["samples"].items():
            for sample in samples:
                if sample["filter"] == benchmark.filter:
                    item = items.setdefault(
                        (name, sample["doc_id"]),
                        {"id": sample["doc_id"], "hash": sample["doc_hash"], "group": _group(name, task), "values": {}},
                    )
                    _add_outcome(item, str(rank), sample[benchmark.metric])
    write_items(items_file, items.values())
    return {"n": len(items), "sha256": task.sha256, "ranks": ranks}


def answer(lm: RankedLM, tasks: Sequence[Task]) -> None:
    """Compute what `score` will ask for `tasks` in one go: few-shot examples they share are then computed once."""
    requests: dict[str, list] = {}
    for task in tasks:
        for part in task.ready()["tasks"].values():
            with _without_lm_eval_progress():
                part.build_all_requests()
            for instance in part.instances:
                requests.setdefault(instance.request_type, []).append(instance)
    lm.what = ", ".join(sorted({task.name for task in tasks}))
    for kind, instances in requests.items():
        lm.at_all_ranks(kind, instances)


@contextmanager
def _without_lm_eval_progress() -> Iterator[None]:
    """lm-eval draws a bar for every subject and rank; the engine's own bar goes to the terminal all the same."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def _metrics(result: dict, task: Task, benchmark) -> dict[str, float]:
    """The main metric's value and standard error (None for BLEU, which has no closed form), and all others by name."""
    metrics = result["results"][task.name]
    main = f"{benchmark.metric},{benchmark.filter}"
    stderr = metrics.get(main.replace(",", "_stderr,"))
    found = {"value": float(metrics[main]), "stderr": float(stderr) if _is_number(stderr) else None}
    if task.loaded["groups"]:
        subjects = [result["results"][name][main] for name in task.loaded["tasks"]]
        found["macro"] = float(np.mean(subjects))
    others = {k: v for k, v in metrics.items() if "," in k and "_stderr" not in k and k != main and _is_number(v)}
    return found | {name: float(value) for name, value in others.items()}


def _is_number(value) -> bool:
    return isinstance(value, (int, float, np.number)) and np.isfinite(value)


def _group(name: str, task: Task) -> str:
    return name.removeprefix(f"{task.name}_")


def _add_outcome(item: dict, rank: str, outcome) -> None:
    if isinstance(outcome, (tuple, list)):  # BLEU is not a mean over items: keep what its sum needs
        reference, answer = outcome
        statistics = sacrebleu.BLEU().corpus_score([answer], [[reference]])
        counts = [statistics.sys_len, statistics.ref_len, *statistics.counts, *statistics.totals]
        item.setdefault("bleu", {})[rank] = counts
        item["values"][rank] = sacrebleu.sentence_bleu(answer, [reference]).score
    else:
        item["values"][rank] = float(outcome)


def heldout_loss(engine: AllRanks, sequences: Sequence[Pair], items_file: Path | None = None) -> dict:
    """Loss per completion token, in nats, at every rank of the engine, over held-out (prompt, completion) tokens.

    Returns {n, tokens, ranks: {rank: {value, stderr}}}. The mean weighs tokens equally, as training does; its standard
    error is that of a ratio of sums over items. The first token of an empty prompt's completion is not predicted.
    """
    pairs = [(p, c) if len(p) else (c[:1], c[1:]) for p, c in sequences]
    logps, _ = engine.loglikelihood(pairs, what="held-out loss")
    tokens = np.array([len(completion) for _, completion in pairs])
    n = len(pairs)
    means = -logps.sum(0) / tokens.sum()
    residuals = -logps - means * tokens[:, None]
    stderrs = np.sqrt((residuals**2).sum(0) * n / (n - 1)) / tokens.sum()
    if items_file:
        losses = -logps / tokens[:, None]
        write_items(
            items_file,
            (
                {"id": i, "weight": int(t), "values": dict(zip(map(str, engine.ranks), row.tolist(), strict=True))}
                for i, (t, row) in enumerate(zip(tokens, losses, strict=True))
            ),
        )
    ranks = {
        str(b): {"value": float(v), "stderr": float(s)} for b, v, s in zip(engine.ranks, means, stderrs, strict=True)
    }
    return {"n": n, "tokens": int(tokens.sum()), "ranks": ranks}


def write_items(file: Path, items: Iterable[dict]) -> None:
    """One JSON line per item, gzipped without a time stamp, so that equal outcomes are equal bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    with open(draft, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as packed:
        for item in items:
            packed.write((json.dumps(item) + "\n").encode())
    draft.replace(file)

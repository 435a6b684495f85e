"""The configuration's schema: unknown keys are refused by Hydra, bad values here, both by name and before any work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub.errors import StrictDataclassError
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.benchmarks import BENCHMARKS, FEWSHOT
from experiments.chat.judging import PROMPTS as JUDGE_PROMPTS
from experiments.chat.prompts import CHAT_FORMATS, OWN_PROMPTS
from experiments.data.formats import FORMATS
from experiments.data.sources import SOURCES
from experiments.files import Damaged, disk_is_full
from qdylora.base import BITS
from qdylora.cut import CUTS
from qdylora.draw import Draw
from qdylora.gate import SCALES

CONF = str(Path(__file__).resolve().parents[1] / "conf")


@dataclass
class Model:
    """A base model. id: see `qdylora.load_base`. recipe: its rows of QLoRA's Table 9, for scale `paper`.
    architecture: its transformers configuration, for a forecast where the model itself is not here."""

    name: str = MISSING
    id: str = MISSING
    revision: str | None = None
    random: dict[str, Any] | None = None
    architecture: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = None


@dataclass
class DrawSettings:
    """See `qdylora.Draw`."""

    kind: str = "uniform"
    per: str = "step"
    ranks: list[int] = field(default_factory=list)
    p: float = 0.15
    at_r_max: float = 0.0
    at_r_min: float = 0.0


@dataclass
class Method:
    name: str = MISSING
    bits: int = 4
    quant_type: str = "nf4"
    double_quant: bool = True
    gate: str = "prefix"
    draw: DrawSettings = field(default_factory=DrawSettings)
    alpha: float = 16
    scale: str = "alpha_over_b"
    update: str = "drift"
    targets: Any = "all-linear"


@dataclass
class Hub:
    id: str = MISSING
    config: str | None = None
    revision: str | None = None
    split: str = "train"


@dataclass
class Data:
    name: str = MISSING
    hub: Hub = field(default_factory=Hub)
    recipe: str = "all"
    source_max_len: int = 384
    target_max_len: int = 128


@dataclass
class Budget:
    """What every cell of a table may spend: optimizer steps of `batch` examples, and tokens if stated."""

    steps: int = MISSING
    batch: int = MISSING
    tokens: int | None = None


@dataclass
class Optim:
    name: str = "adamw"
    lr: float = MISSING
    beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    schedule: str = "constant"
    warmup_ratio: float = 0.0
    lora_dropout: float = 0.0
    micro_batch: int = 1
    group_by_length: bool = True
    checkpoint_activations: bool = True
    compute_dtype: str = "auto"
    adapter_dtype: str = "float32"


@dataclass
class Ranks:
    """cuts: how a static adapter (draw.kind fixed) is scored at lower ranks beside truncation; see `qdylora.cut`."""

    r_min: int = 1
    r_max: int = 64
    eval: list[int] = field(default_factory=list)
    cuts: list[str] = field(default_factory=list)


@dataclass
class Limit:
    """Items of a benchmark's split, or null for all."""

    test: int | None = None
    validation: int | None = None


@dataclass
class Tasks:
    """limit_of: limits of single benchmarks, instead of `limit`; for those that are generated, which takes longer."""

    benchmarks: list[str] = field(default_factory=list)
    num_fewshot: dict[str, int] = field(default_factory=lambda: {"mmlu": 5, "gsm8k": 5, "triviaqa": 0, "webglm": 0})
    fewshot: str = "first"
    limit: Limit = field(default_factory=Limit)
    limit_of: dict[str, Limit] = field(default_factory=dict)
    webglm_references: bool = True
    webglm_citations: bool = True
    heldout_items: int = 64
    tokens_per_batch: int = 8192
    dequantize: str = "auto"


@dataclass
class TableSettings:
    """A table's cells: models x data x methods x seeds, names of the groups' files.

    budgets: to sweep the budget too, shares of the scale's own optimizer steps. ranks: of a sweep, each trained with
    that r_max and scored at it. of: the tables whose settings a table without cells lists.
    """

    name: str = MISSING
    of: list[str] = field(default_factory=list)
    budgets: list[float] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    ranks: list[int] = field(default_factory=list)


@dataclass
class Samples:
    """Prompts answered side by side (`experiments.samples`): the first test items, at these ranks."""

    ranks: list[int] = field(default_factory=lambda: [64, 32, 28, 16])
    items: int = 3


@dataclass
class Contestant:
    """Who answers in a tournament: the cell's adapter at `rank`, that of another folder, or, with no field set, the
    base model; or a file of answers, JSON lines {question_id, text}."""

    rank: int | None = None
    adapter: str | None = None
    answers: str | None = None


@dataclass
class TournamentSettings:
    """contestants: by name. prompts: JSON lines, see `experiments.chat.prompts`, by default a few of our own; limit: how
    many of them, or null.
    format: how a prompt is put to the models, `auto` by the data set trained on. Nucleus sampling as QLoRA's.
    human_matches: pairs of answers on the page for human raters."""

    name: str = MISSING
    contestants: dict[str, Any] = field(default_factory=dict)  # of Contestant, see `resolved`
    prompts: str = str(OWN_PROMPTS)
    limit: int | None = None
    format: str = "auto"
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    batch: int = 16
    human_matches: int = 50


@dataclass
class JudgeSettings:
    """kind: `endpoint`, any OpenAI-compatible server at `address`; `local`, a model that `qdylora.load_base` loads; or
    `none`, when only people judge. prompt: a version of `experiments.chat.judging`. key: the environment variable that
    holds the key. parallel: most requests at once. timeout: seconds of one request. retries: of a request that failed.
    prices: dollars a million tokens, for the estimate."""

    kind: str = MISSING
    model: str = MISSING
    address: str | None = None
    key: str = "OPENAI_API_KEY"
    prompt: str = "explain-v1"
    temperature: float = 0.2
    max_tokens: int = 1024
    parallel: int = 8
    timeout: float = 120
    retries: int = 6
    price_in: float | None = None
    price_out: float | None = None


@dataclass
class Tracker:
    """heldout_every: optimizer steps between held-out losses during training, or null; on `heldout_items` items."""

    wandb: str = "offline"
    project: str = "qdylora"
    heldout_every: int | None = None
    heldout_items: int = 16


@dataclass
class MemoryForecast:
    """gpu_gb: GiB of the GPU that a cell has to fit; one that cannot is recorded as out of memory without being run.
    Null: nothing is asked. reserve_gb: how much of it the driver, CUDA's context, libraries and fragmentation take, an
    assumption."""

    gpu_gb: float | None = None
    reserve_gb: float = 1.0


@dataclass
class Cluster:
    """What a cell asks of SLURM; null leaves it to the cluster. gpus and processes: on each of the nodes. warning:
    seconds before the time limit at which a cell saves itself and is requeued. at_once: tasks of an array. wait: follow
    the array and print the table."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    processes: int = 1
    gpus: int | None = None
    cpus: int | None = None
    memory: str | None = None
    time: str | None = None
    warning: int = 300
    at_once: int | None = None
    modules: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    wait: bool = True


@dataclass
class Config:
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    data: Data = field(default_factory=Data)
    budget: Budget = field(default_factory=Budget)
    optim: Optim = field(default_factory=Optim)
    ranks: Ranks = field(default_factory=Ranks)
    tasks: Tasks = field(default_factory=Tasks)
    tracker: Tracker = field(default_factory=Tracker)
    samples: Samples = field(default_factory=Samples)
    table: TableSettings = field(default_factory=TableSettings)
    forecast: MemoryForecast = field(default_factory=MemoryForecast)
    tournament: TournamentSettings = field(default_factory=TournamentSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    cluster: Cluster = field(default_factory=Cluster)
    scale: str = MISSING
    seed: int = 0
    source: str = "generated"
    root: str | None = None
    outputs: str = "outputs"
    checkpoint_every: int = 20
    when_busy: str = "wait"


ConfigStore.instance().store(name="schema", node=Config)

#: Keys that change where or how fast a cell runs, not what it computes.
INCIDENTAL = (
    "table",
    "cluster",
    "samples",
    "tournament",
    "judge",
    "tracker",
    "forecast",
    "outputs",
    "root",
    "checkpoint_every",
    "when_busy",
)
INCIDENTAL_TASKS = ("tokens_per_batch", "dequantize")


class ConfigError(ValueError):
    """A bad value in the configuration: one sentence that names the field, the value and the way out."""


@contextmanager
def mistakes_in(what: str) -> Iterator[None]:
    """Around the reading of what a user names: a complaint about it becomes a ConfigError that says what was read."""
    try:
        yield
    except (ConfigError, Damaged, FileNotFoundError):
        raise
    except (OSError, ValueError, StrictDataclassError) as error:
        if disk_is_full(error):
            raise
        raise ConfigError(f"{what}: {' '.join(str(error).split())}") from error


def resolved(cfg: DictConfig) -> Config:
    """The configuration as checked dataclasses. Raises ConfigError."""
    try:
        # Merging plain values into the schema refuses what Hydra lets pass: a key added with +.
        plain = OmegaConf.to_container(cfg, resolve=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {str(error.msg or error).splitlines()[0]}") from error
    config.tournament.contestants = {
        name: _contestant(name, fields) for name, fields in config.tournament.contestants.items()
    }
    validate(config)
    return config


def _contestant(name: str, fields: Any) -> Contestant:
    """Checked here because Hydra cannot add an entry of a dataclass type from the command line."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Contestant), fields or {}))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"tournament.contestants.{name}: {str(error).splitlines()[0]}") from error


def validate(c: Config) -> None:
    """Refuse the first bad value with a ConfigError."""
    one_of = {
        "source": (c.source, SOURCES),
        "data.name": (c.data.name, FORMATS),
        "method.bits": (c.method.bits, BITS),
        "method.gate": (c.method.gate, ("prefix", "frozen")),
        "method.scale": (c.method.scale, SCALES),
        "method.update": (c.method.update, ("drift", "masked")),
        "method.quant_type": (c.method.quant_type, ("nf4", "fp4")),
        "optim.name": (c.optim.name, ("adamw", "sgd", "paged_adamw_32bit", "paged_adamw_8bit")),
        "optim.schedule": (c.optim.schedule, ("constant", "linear", "cosine")),
        "optim.compute_dtype": (c.optim.compute_dtype, ("auto", "float32", "bfloat16", "float16")),
        "optim.adapter_dtype": (c.optim.adapter_dtype, ("float32", "bfloat16")),
        "tasks.fewshot": (c.tasks.fewshot, FEWSHOT),
        "tasks.dequantize": (c.tasks.dequantize, ("auto", "always", "never")),
        "when_busy": (c.when_busy, ("wait", "leave")),
        "tracker.wandb": (c.tracker.wandb, ("offline", "online", "off")),
        **{f"ranks.cuts[{i}]": (how, CUTS) for i, how in enumerate(c.ranks.cuts)},
        "tournament.format": (c.tournament.format, ("auto", *CHAT_FORMATS)),
        "judge.kind": (c.judge.kind, ("endpoint", "local", "none")),
        "judge.prompt": (c.judge.prompt, JUDGE_PROMPTS),
        **{f"tasks.benchmarks[{i}]": (name, BENCHMARKS) for i, name in enumerate(c.tasks.benchmarks)},
        **{f"tasks.limit_of.{name}": (name, BENCHMARKS) for name in c.tasks.limit_of},
    }
    for name, (value, choices) in one_of.items():
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}")
    names = {"model": c.model, "data": c.data, "method": c.method, "table": c.table}
    for name, value in {"scale": c.scale, **{f"{group}.name": part.name for group, part in names.items()}}.items():
        if not re.fullmatch(r"\w[\w.-]*", value, re.ASCII):
            raise ConfigError(
                f"{name} is {value!r}; as part of a file name it may have letters, digits, '.', '_' and '-'"
            )
    at_least = {
        "budget.steps": (c.budget.steps, 1),
        "budget.batch": (c.budget.batch, 1),
        "optim.micro_batch": (c.optim.micro_batch, 1),
        "ranks.r_min": (c.ranks.r_min, 1),
        "ranks.r_max": (c.ranks.r_max, c.ranks.r_min),
        "data.source_max_len": (c.data.source_max_len, 1),
        "data.target_max_len": (c.data.target_max_len, 1),
        "tasks.heldout_items": (c.tasks.heldout_items, 2),
        "tasks.tokens_per_batch": (c.tasks.tokens_per_batch, 64),
        "samples.items": (c.samples.items, 1),
        "checkpoint_every": (c.checkpoint_every, 1),
        "cluster.nodes": (c.cluster.nodes, 1),
        "cluster.processes": (c.cluster.processes, 1),
        "cluster.warning": (c.cluster.warning, 1),
        "seed": (c.seed, 0),
        "tournament.max_new_tokens": (c.tournament.max_new_tokens, 1),
        "tournament.batch": (c.tournament.batch, 1),
        "tournament.human_matches": (c.tournament.human_matches, 1),
        "judge.max_tokens": (c.judge.max_tokens, 1),
        "judge.parallel": (c.judge.parallel, 1),
        "judge.retries": (c.judge.retries, 0),
        "judge.timeout": (c.judge.timeout, 0.001),
        "judge.temperature": (c.judge.temperature, 0),
        "tournament.temperature": (c.tournament.temperature, 0),
        **({"tournament.limit": (c.tournament.limit, 1)} if c.tournament.limit is not None else {}),
        **{f"tasks.num_fewshot.{name}": (n, 0) for name, n in c.tasks.num_fewshot.items()},
        **{
            f"tasks.{name}.{split}": (n, 1)
            for name, limit in {
                "limit": c.tasks.limit,
                **{f"limit_of.{k}": v for k, v in c.tasks.limit_of.items()},
            }.items()
            for split, n in vars(limit).items()
            if n is not None
        },
        **({"budget.tokens": (c.budget.tokens, 1)} if c.budget.tokens is not None else {}),
        **({"tracker.heldout_every": (c.tracker.heldout_every, 1)} if c.tracker.heldout_every is not None else {}),
    }
    for name, (value, least) in at_least.items():
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")
    if not 0 <= c.forecast.reserve_gb < float("inf"):
        raise ConfigError(f"forecast.reserve_gb is {c.forecast.reserve_gb}; it must be 0 or a positive number")
    positive = {"optim.lr": c.optim.lr, "method.alpha": c.method.alpha}
    if c.forecast.gpu_gb is not None:
        positive["forecast.gpu_gb"] = c.forecast.gpu_gb
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value}; it must be a positive number")
    if not 0 < c.tournament.top_p <= 1:
        raise ConfigError(f"tournament.top_p is {c.tournament.top_p}; it must be above 0 and at most 1")
    for name in ("warmup_ratio", "lora_dropout", "beta2"):
        if not 0 <= getattr(c.optim, name) < 1:
            raise ConfigError(f"optim.{name} is {getattr(c.optim, name)}; it must be from 0 to less than 1")
    if any(share <= 0 for share in c.table.budgets):
        raise ConfigError(f"table.budgets is {c.table.budgets}; every share of the budget must be more than 0")
    if not c.ranks.eval:
        raise ConfigError("ranks.eval is empty; name at least one rank to score at")
    for name, b in [("ranks.eval", b) for b in c.ranks.eval] + [("samples.ranks", b) for b in c.samples.ranks]:
        if not c.ranks.r_min <= b <= c.ranks.r_max:
            raise ConfigError(f"{name} has {b}; ranks go from r_min {c.ranks.r_min} to r_max {c.ranks.r_max}")
    if c.budget.batch % c.optim.micro_batch:
        raise ConfigError(
            f"budget.batch is {c.budget.batch}, not a multiple of optim.micro_batch {c.optim.micro_batch}; "
            "choose a micro-batch that divides it"
        )
    if c.method.update == "masked" and c.optim.name == "paged_adamw_8bit":
        raise ConfigError("method.update is 'masked' but optim.name is 'paged_adamw_8bit'; choose a 32-bit optimizer")
    _validate_tournament(c)
    if c.source == "local" and (c.root is None or not Path(c.root).is_dir()):
        raise ConfigError(f"root is {c.root!r}; source=local needs the folder that holds the release files")
    try:
        draw(c)
    except ValueError as error:
        raise ConfigError(f"method.{error}") from error


def _validate_tournament(c: Config) -> None:
    for name, who in c.tournament.contestants.items():
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(
                f"tournament.contestants has {name!r}; a name is made of letters, digits, '.', '_' and '-'"
            )
        if who.answers is not None and (who.rank is not None or who.adapter is not None):
            raise ConfigError(f"tournament.contestants.{name} has answers and an adapter; set one of the two")
        if who.adapter is not None and who.rank is None:
            raise ConfigError(f"tournament.contestants.{name} has an adapter but no rank; set the rank to use it at")
        if who.rank is not None and not 1 <= who.rank <= c.ranks.r_max:
            raise ConfigError(f"tournament.contestants.{name}.rank is {who.rank}; ranks go from 1 to {c.ranks.r_max}")
    parts = urlsplit(c.judge.address or "")
    if c.judge.kind == "endpoint" and parts.scheme not in ("http", "https"):
        raise ConfigError(f"judge.address is {c.judge.address!r}; judge.kind=endpoint needs an http(s) address")
    if parts.username or parts.password or parts.query:
        # Not shown: it would put the secret on the screen and into logs.
        raise ConfigError(f"judge.address holds credentials or a query; put the key in the environment ({c.judge.key})")


def draw(c: Config) -> Draw:
    """The draw of a configuration. ValueError for a bad one."""
    settings = vars(c.method.draw) | {"ranks": tuple(c.method.draw.ranks)}
    return Draw(r_max=c.ranks.r_max, r_min=c.ranks.r_min, seed=c.seed, **settings)


def substance(cfg: dict) -> dict:
    """The part of a resolved configuration (plain dicts) that decides a cell's results."""
    kept = {key: value for key, value in cfg.items() if key not in INCIDENTAL}
    kept["model"] = {key: value for key, value in cfg["model"].items() if key != "architecture"}
    kept["tasks"] = {key: value for key, value in cfg["tasks"].items() if key not in INCIDENTAL_TASKS}
    return kept

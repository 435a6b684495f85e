"""The configuration's schema: unknown keys are refused by Hydra, bad values here, both by name and before any work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.benchmarks import BENCHMARKS
from experiments.data.formats import FORMATS
from experiments.data.sources import SOURCES
from experiments.files import Damaged, disk_is_full
from qdylora.base import BITS
from qdylora.draw import Draw
from qdylora.gate import SCALES

CONF = str(Path(__file__).resolve().parents[1] / "conf")


@dataclass
class Model:
    """A base model. id: see `qdylora.load_base`. recipe: its rows of QLoRA's Table 9, for scale `paper`."""

    name: str = MISSING
    id: str = MISSING
    revision: str | None = None
    random: dict[str, Any] | None = None
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
    r_min: int = 1
    r_max: int = 64
    eval: list[int] = field(default_factory=list)


@dataclass
class Limit:
    """Items of a benchmark's split, or null for all."""

    test: int | None = None
    validation: int | None = None


@dataclass
class Tasks:
    benchmarks: list[str] = field(default_factory=list)
    num_fewshot: dict[str, int] = field(default_factory=lambda: {"mmlu": 5, "gsm8k": 5, "triviaqa": 0, "webglm": 0})
    limit: Limit = field(default_factory=Limit)
    webglm_references: bool = True
    webglm_citations: bool = True
    heldout_items: int = 64
    tokens_per_batch: int = 8192
    dequantize: str = "auto"


@dataclass
class TableSettings:
    """A table's cells: models x data x methods x seeds, names of the groups' files; and, of a sweep, x ranks: each
    trained with that r_max and scored at it."""

    name: str = MISSING
    models: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    ranks: list[int] = field(default_factory=list)


@dataclass
class Tracker:
    """heldout_every: optimizer steps between held-out losses during training, or null; on `heldout_items` items."""

    wandb: str = "offline"
    project: str = "qdylora"
    heldout_every: int | None = None
    heldout_items: int = 16


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
    table: TableSettings = field(default_factory=TableSettings)
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
INCIDENTAL = ("table", "cluster", "tracker", "outputs", "root", "checkpoint_every", "when_busy")
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
    validate(config)
    return config


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
        "tasks.dequantize": (c.tasks.dequantize, ("auto", "always", "never")),
        "when_busy": (c.when_busy, ("wait", "leave")),
        "tracker.wandb": (c.tracker.wandb, ("offline", "online", "off")),
        **{f"tasks.benchmarks[{i}]": (name, BENCHMARKS) for i, name in enumerate(c.tasks.benchmarks)},
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
        "checkpoint_every": (c.checkpoint_every, 1),
        "cluster.nodes": (c.cluster.nodes, 1),
        "cluster.processes": (c.cluster.processes, 1),
        "cluster.warning": (c.cluster.warning, 1),
        "seed": (c.seed, 0),
        **{f"tasks.num_fewshot.{name}": (n, 0) for name, n in c.tasks.num_fewshot.items()},
        **{f"tasks.limit.{split}": (n, 1) for split, n in vars(c.tasks.limit).items() if n is not None},
        **({"budget.tokens": (c.budget.tokens, 1)} if c.budget.tokens is not None else {}),
        **({"tracker.heldout_every": (c.tracker.heldout_every, 1)} if c.tracker.heldout_every is not None else {}),
    }
    for name, (value, least) in at_least.items():
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")
    for name, value in {"optim.lr": c.optim.lr, "method.alpha": c.method.alpha}.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value}; it must be a positive number")
    for name in ("warmup_ratio", "lora_dropout", "beta2"):
        if not 0 <= getattr(c.optim, name) < 1:
            raise ConfigError(f"optim.{name} is {getattr(c.optim, name)}; it must be from 0 to less than 1")
    if not c.ranks.eval:
        raise ConfigError("ranks.eval is empty; name at least one rank to score at")
    for b in c.ranks.eval:
        if not c.ranks.r_min <= b <= c.ranks.r_max:
            raise ConfigError(f"ranks.eval has {b}; ranks go from r_min {c.ranks.r_min} to r_max {c.ranks.r_max}")
    if c.budget.batch % c.optim.micro_batch:
        raise ConfigError(
            f"budget.batch is {c.budget.batch}, not a multiple of optim.micro_batch {c.optim.micro_batch}; "
            "choose a micro-batch that divides it"
        )
    if c.method.update == "masked" and c.optim.name == "paged_adamw_8bit":
        raise ConfigError("method.update is 'masked' but optim.name is 'paged_adamw_8bit'; choose a 32-bit optimizer")
    if c.source == "local" and (c.root is None or not Path(c.root).is_dir()):
        raise ConfigError(f"root is {c.root!r}; source=local needs the folder that holds the release files")
    try:
        draw(c)
    except ValueError as error:
        raise ConfigError(f"method.{error}") from error


def draw(c: Config) -> Draw:
    """The draw of a configuration. ValueError for a bad one."""
    settings = vars(c.method.draw) | {"ranks": tuple(c.method.draw.ranks)}
    return Draw(r_max=c.ranks.r_max, r_min=c.ranks.r_min, seed=c.seed, **settings)


def substance(cfg: dict) -> dict:
    """The part of a resolved configuration (plain dicts) that decides a cell's results."""
    kept = {key: value for key, value in cfg.items() if key not in INCIDENTAL}
    kept["tasks"] = {key: value for key, value in cfg["tasks"].items() if key not in INCIDENTAL_TASKS}
    return kept

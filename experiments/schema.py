"""The configuration's schema: every key there is, its type and its default where `conf/` gives none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


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
    """See `qdylora.Draw`. after: the share of the steps before the first draw."""

    kind: str = "uniform"
    per: str = "step"
    ranks: list[int] = field(default_factory=list)
    p: float = 0.15
    at_r_max: float = 0.0
    at_r_min: float = 0.0
    after: float = 0.0


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
    """rows: train on so many rows alone, drawn once for all seeds, or null for all."""

    name: str = MISSING
    hub: Hub = field(default_factory=Hub)
    recipe: str = "all"
    source_max_len: int = 384
    target_max_len: int = 128
    rows: int | None = None


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

    variants: instead of methods, the overrides that make each of several cells, by name. variant: the one of a cell.
    budgets: to sweep the budget too, shares of the scale's own optimizer steps. ranks: of a sweep, each trained with
    that r_max and scored at it. of: the tables whose settings a table without cells lists.
    """

    name: str = MISSING
    of: list[str] = field(default_factory=list)
    budgets: list[float] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    variants: dict[str, list[str]] = field(default_factory=dict)
    variant: str | None = None
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
class Answering:
    """How prompts are answered. prompts: a file, JSON lines, see `experiments.chat.prompts`. format: how a prompt is
    put to a model, `auto` by the data set trained on, `chat` by the tokenizer's template. Sampled as in QLoRA."""

    prompts: str | None = None
    format: str = "auto"
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512


@dataclass
class TournamentSettings(Answering):
    """contestants: by name. They answer the first `limit` of the prompts, by default a few of our own. human_matches:
    pairs of answers on the page for human raters."""

    name: str = MISSING
    contestants: dict[str, Any] = field(default_factory=dict)  # of Contestant, see `config.resolved`
    limit: int | None = None
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
class ExportSettings:
    """A cell's adapter for use elsewhere (`experiments.export`). cell: its folder, instead of overrides. rank: one, or
    `best` (the default), the one that validation items choose; or several `ranks`, a folder each in `out`. cut: how it
    is cut to that rank, see `qdylora.cut`. merge: the whole model in 16 bits instead of the adapter. gguf: for
    llama.cpp."""

    cell: str | None = None
    cut: str = "truncate"
    rank: Any = None
    ranks: list[int] = field(default_factory=list)
    out: str | None = None
    merge: bool = False
    gguf: bool = False


@dataclass
class GenerateSettings(Answering):
    """Prompts answered side by side (`experiments.generate`), by default those typed. cell, cut: as in
    ExportSettings."""

    cell: str | None = None
    cut: str = "truncate"
    ranks: list[int] = field(default_factory=lambda: [1, 8, 64])
    max_new_tokens: int = 256
    sampling_seed: int = 0


@dataclass
class PickSettings:
    """The smallest rank that is good enough (`experiments.pick`). cell, cut: as in ExportSettings. within: how far from
    the best score, a share of it (1%) or a number in the metric's unit. on: a benchmark, or `heldout` for the loss; by
    default the cell's first benchmark."""

    cell: str | None = None
    cut: str = "truncate"
    within: Any = "1%"
    on: str | None = None


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
    assumption. tflops: 10^12 operations a second that training sustains on it, for the hours; an assumption too, of a
    sixth of an A100's peak in bfloat16."""

    gpu_gb: float | None = None
    reserve_gb: float = 1.0
    tflops: float = 50.0


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
    export: ExportSettings = field(default_factory=ExportSettings)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    pick: PickSettings = field(default_factory=PickSettings)
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

"""Whatever is wrong with the input: one sentence that names it, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.commands import inside, run

SMOKE = ("table=table1", "scale=smoke", "tracker=none", "tasks.benchmarks=[]", "data=alpaca", "budget.steps=2")
CELL = "outputs/smoke/table1/tiny--alpaca--qdylora--seed0"
ADAPTER, RECORD = f"{CELL}/adapter", f"{CELL}/record.json"
WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"
LOCAL = ("source=local", "root=data")
SCORE = "experiments.score"


@dataclass
class Bad:
    """What is done to a folder, the command line on top of SMOKE, and a pattern of what is said."""

    says: str
    overrides: tuple[str, ...] = ()
    prepare: Callable[[Path], None] = lambda folder: None
    command: str = "experiments.run"
    environment: dict[str, str] = field(default_factory=dict)
    on_cell: bool = False


def put(name: str, content: str | bytes, also: Callable[[Path], None] = lambda folder: None):
    """Write one file of the folder."""

    def prepare(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        also(folder)

    return prepare


def flipped(name: str):
    """Change one bit in the middle of a file."""

    def prepare(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return prepare


def truncated(name: str):
    def prepare(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return prepare


def removed(name: str):
    return lambda folder: (folder / name).unlink()


def edited(name: str, **keys):
    """Change keys of a JSON file and drop its checksum, as by hand."""

    def prepare(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | keys
        content.pop("checksum", None)
        (folder / name).write_text(json.dumps(content))

    return prepare


def config(says: str, *overrides: str) -> Bad:
    return Bad(says, overrides)


def on_cell(says: str, prepare: Callable[[Path], None], *overrides: str, command: str = "experiments.run") -> Bad:
    """A case that starts from a finished cell."""
    return Bad(says, overrides, prepare, command, on_cell=True)


def both(*actions: Callable[[Path], None]):
    return lambda folder: [action(folder) for action in actions]


def alpaca(**row: str) -> str:
    return json.dumps([{"instruction": f"Say {i}", "input": "", "output": f"{i}"} | row for i in range(40)])


def mmlu(letter: str):
    """MMLU's files with one question each."""
    return both(*(put(f"data/mmlu/{part}/law_{part}.csv", f"q,a,b,c,d,{letter}\n") for part in ("dev", "val", "test")))


ALPACA, GSM8K, TSV = "data/alpaca/a.json", "data/gsm8k/train.jsonl", "data/flan_v2/cot_data/a.tsv"
MODEL = ("model.id=model", "model.random=null")
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}

BAD = {
    # configurations
    "unknown key": config("typo", "typo=1"),
    "unknown key, added": config("typo", "+typo=1"),
    "unknown key in a group": config("typo", "+method.typo=1"),
    "not an override": config("budget", "budget"),
    "unknown data set": config("data/wikipedia", "data=wikipedia"),
    "unknown table": config("table/table9", "table=table9"),
    "unknown scale": config("scale/huge", "scale=huge"),
    "no number": config("budget.steps", "budget.steps=many"),
    "no steps": config("budget.steps is 0; it must be at least 1", "budget.steps=0"),
    "indivisible batch": config("budget.batch is 6, not a multiple of optim.micro_batch 4", "budget.batch=6"),
    "rank 0": config("ranks.eval has 0; ranks go from r_min 1 to r_max 64", "ranks.eval=[0]"),
    "rank above r_max": config("ranks.eval has 65", "ranks.eval=[65]"),
    "no rank": config("ranks.eval is empty", "ranks.eval=[]"),
    "r_min above r_max": config("ranks.r_max is 8; it must be at least 16", "ranks.r_min=16", "ranks.r_max=8"),
    "8 bits": config("method.bits is 8; choose one of 4, 16, 32", "method.bits=8"),
    "unknown gate": config("method.gate is 'suffix'", "method.gate=suffix"),
    "unknown draw": config("method.draw.kind is 'normal'", "method.draw.kind=normal"),
    "graded steps of a coarse type": config(
        "method.update is 'graded' but optim.adapter_dtype is 'bfloat16'",
        "method=qlora_graded",
        "optim.adapter_dtype=bfloat16",
    ),
    "first draw after the end": config("method.draw.after is 1.0", "method=qdylora_sorted", "method.draw.after=1"),
    "sorted ranks of unequal scale": config("method.scale is 'alpha_over_b'", "method.draw.after=0.5"),
    "8-bit state of sorted ranks": config(
        "method.draw.after sorts ranks", "method=qdylora_sorted", "optim.name=paged_adamw_8bit"
    ),
    "sorting without a draw": config("draw.from_step", "method=qlora", "method.draw.after=0.5"),
    "list draw without ranks": config("method.draw.ranks", "method.draw.kind=list"),
    "negative learning rate": config("optim.lr is -1.0; it must be a positive number", "optim.lr=-1"),
    "learning rate NaN": config("optim.lr is nan", "optim.lr=nan"),
    "unknown optimizer": config("optim.name is 'lion'", "optim.name=lion"),
    "unknown layers": config("method.targets|Target modules", "method.targets=[no_proj]"),
    "unknown benchmark": config(r"tasks.benchmarks\[0\] is 'hellaswag'", "tasks.benchmarks=[hellaswag]"),
    "unknown source": config("source is 'ftp'", "source=ftp"),
    "negative seed": config("seed is -1", "seed=-1"),
    "no root": config("root is None; source=local needs the folder", "source=local", "root=null"),
    "unknown way to wait": config("when_busy is 'push'", "when_busy=push"),
    "a name that leaves the folder": config("model.name is '../../x'", "model.name=../../x"),
    "a name with a blank": config("method.name is 'a b'", "method.name='a b'"),
    # data files
    "empty data folder": Bad("alpaca.*is missing", LOCAL, lambda folder: (folder / "data").mkdir()),
    "root is a file": Bad("root is 'data'", LOCAL, put("data", "x")),
    "JSON cut off": Bad("data alpaca: 1 of 1 rows do not parse.*a.json", LOCAL, put(ALPACA, alpaca()[:500])),
    "JSON of another kind": Bad("data alpaca: .*a.json", LOCAL, put(ALPACA, "3")),
    "rows without an answer": Bad("data alpaca: .*do not parse", LOCAL, put(ALPACA, '[{"instruction": "x"}]')),
    "empty answers": Bad("has only 0 training rows", LOCAL, put(ALPACA, alpaca(output=""))),
    "too few rows": Bad("budget.batch is 64, but alpaca has only", (*LOCAL, "budget.batch=64"), put(ALPACA, alpaca())),
    "binary": Bad("data gsm8k: .*train.jsonl:1", (*LOCAL, "data=gsm8k"), put(GSM8K, b"\x00\xff\xfe\n" * 5)),
    "a row that is a list": Bad("data gsm8k: .*train.jsonl:1", (*LOCAL, "data=gsm8k"), put(GSM8K, "[1]\n")),
    "missing column": Bad("data flan_v2: .*a.tsv:1", (*LOCAL, "data=flan_v2"), put(TSV, "question\tanswer\n")),
    "bad choice letter": Bad(
        "answer is 'E'",
        (*LOCAL, "tasks.benchmarks=[mmlu]"),
        put(ALPACA, alpaca(), mmlu("E")),
    ),
    "changed generated data": Bad(
        "alpaca.json is not as generated", (), lambda folder: next(folder.glob("outputs/data/*/alpaca/*.json")).unlink()
    ),
    # models
    "no such package": Bad("no package no_such_package is installed", ("model.id=package:no_such_package", MODEL[1])),
    "no such model": Bad("model.id 'no/such'", ("model.id=no/such", MODEL[1])),
    "empty model folder": Bad("model", MODEL, lambda folder: (folder / "model").mkdir()),
    "a model in pickle files only": Bad("model.id 'model': .*safetensors", MODEL, lambda folder: pickled(folder)),
    "a model with its own code": Bad("model.id 'model': ", MODEL, lambda folder: with_code(folder)),
    "a model of unknown type": Bad("model.id 'model': ", MODEL, put("model/config.json", '{"model_type": "no_such"}')),
    "an impossible model": Bad("model.id 'random': .*hidden size", ("model.random.hidden_size=63", "model.name=odd")),
    "broken model config": Bad("model.id 'model': ", MODEL, put("model/config.json", "{")),
    # adapters
    "no adapter": Bad("has no trained adapter", command=SCORE),
    "a flipped bit in the adapter": on_cell(
        "adapter_model.safetensors .*differs from its checksum; delete .*training.json", flipped(WEIGHTS), command=SCORE
    ),
    "half an adapter": on_cell("adapter_model.safetensors .*checksum", truncated(WEIGHTS), command=SCORE),
    "an adapter without settings": on_cell(
        "qdylora.json is missing", removed(f"{ADAPTER}/qdylora.json"), command=SCORE
    ),
    "an adapter changed by hand": on_cell(
        "adapter_config.json", edited(f"{ADAPTER}/adapter_config.json", r=8), command=SCORE
    ),
    # records
    "half a record": on_cell("record.json is not valid JSON.*delete it", truncated(RECORD)),
    "a flipped bit in a record": on_cell("record.json.*delete it", flipped(RECORD)),
    "a record changed by hand": on_cell("record.json differs from its checksum", put(RECORD, '{"checksum": "0"}')),
    "a record that is a list": on_cell("record.json holds no JSON object", put(RECORD, "[]")),
    "an older record": on_cell("record schema 0, and this code writes 1", edited(RECORD, schema=0)),
    "an older record in a table": on_cell("record schema 0", edited(RECORD, schema=0), command="experiments.table"),
    "a part with a flipped bit": on_cell("heldout.json", both(removed(RECORD), flipped(f"{CELL}/parts/heldout.json"))),
    "half of what training spent": on_cell("training.json", both(removed(RECORD), truncated(f"{CELL}/training.json"))),
    "half a marker": on_cell("config.json", truncated(f"{CELL}/config.json"), "budget.steps=3"),
    # environment
    "outputs is a file": Bad("Not a directory.*outputs=FOLDER", ("outputs=here",), put("here", "")),
    "several processes for a cell": Bad("WORLD_SIZE is more than 1", environment={"WORLD_SIZE": "2"}),
}


def pickled(folder: Path) -> None:
    """A model folder whose weights are a pickle that would write a file."""
    put("model/config.json", json.dumps(LLAMA | {"hidden_size": 8, "num_attention_heads": 1, "vocab_size": 258}))(
        folder
    )
    put("model/pytorch_model.bin", b"cos\nsystem\n(S'touch run-by-pickle'\ntR.")(folder)
    tokenizer_into(folder / "model")


def with_code(folder: Path) -> None:
    """A model folder that brings its own code, which would write a file."""
    code = "open('run-by-model', 'w')\nclass C: pass\n"
    own = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"}
    put("model/config.json", json.dumps({"model_type": "own", "auto_map": own}))(folder)
    put("model/own.py", code)(folder)


def tokenizer_into(folder: Path) -> None:
    from qdylora.base import byte_tokenizer

    byte_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with one finished cell."""
    folder = tmp_path_factory.mktemp("finished")
    done = inside("experiments.run", *SMOKE, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def files(folder: Path) -> dict[Path, int]:
    """Every file and when it was written, but for what was read in from elsewhere and kept."""
    kept = (folder / "outputs/cache", folder / "outputs/data")
    found = [f for f in folder.rglob("*") if f.is_file() and not any(f.is_relative_to(k) for k in kept)]
    return {f: f.stat().st_mtime_ns for f in found}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_gets_one_sentence_and_changes_nothing(name, finished, tmp_path, monkeypatch):
    bad = BAD[name]
    folder = tmp_path / "w"
    if bad.on_cell:
        shutil.copytree(finished, folder)
    else:
        shutil.copytree(finished / "outputs/data", folder / "outputs/data")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for key, value in bad.environment.items():
        monkeypatch.setenv(key, value)
    bad.prepare(folder)
    before = files(folder)
    done = inside(bad.command, *SMOKE, *bad.overrides, cwd=folder)
    print(done.stderr)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith("error: ") and re.search(bad.says, last), done.stderr
    assert "Traceback" not in done.stderr
    assert files(folder) == before


@pytest.mark.parametrize("name", ["unknown key", "JSON cut off", "a model with its own code"])
def test_so_it_is_for_the_command_a_user_types(name, tmp_path):
    BAD[name].prepare(tmp_path)
    before = files(tmp_path)
    done = run("experiments.run", *SMOKE, *BAD[name].overrides, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and re.search(BAD[name].says, done.stderr)
    assert files(tmp_path) == before

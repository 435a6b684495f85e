"""`python -m experiments.export`: what it writes, loaded by stock PEFT and transformers, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import pytest
import tiny_gguf
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import base, tokens
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdylora import export_rank, load_adapter, load_base, set_rank
from qdylora.base import byte_tokenizer
from tests.commands import inside

BASE = ("table=table1", "scale=smoke", "data=alpaca", "method=qdylora", "tracker=none", "tasks.benchmarks=[]")
PRECISE = ("method.bits=32", "optim.lr=1e-2", "ranks.eval=[1,8,64]")
CELL = "outputs/smoke/table1/tiny--alpaca--qdylora--seed0"
COMMAND = "experiments.export"


def overrides(folder: Path) -> tuple[str, ...]:
    return (*BASE, *PRECISE, f"model.id={folder}/base.gguf", "model.random=null")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder in which a cell over a GGUF base has been trained and scored, in float32."""
    folder = tmp_path_factory.mktemp("home")
    tiny_gguf.write(folder / "base.gguf")
    done = inside("experiments.run", *overrides(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def export(home: Path, *options: str):
    done = inside(COMMAND, f"cell={CELL}", *options, cwd=home)
    assert done.returncode == 0, done.stderr
    return done


def stock_base(home: Path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(home, gguf_file="base.gguf", dtype=dtype)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(tokens()).logits


@pytest.fixture(scope="module")
def at_8(home) -> torch.Tensor:
    """Logits of the trained adapter at rank 8, over the base of this repository."""
    base = load_base(f"{home}/base.gguf", 32, torch.float32, cache=home / "outputs/cache")
    model = load_adapter(base, home / CELL / "adapter")
    set_rank(model, 8)
    return logits(model)


def test_stock_peft_loads_the_adapter_with_the_logits_of_its_rank(home, at_8):
    done = export(home, "rank=8", "out=as-adapter")
    assert done.stdout == "as-adapter\n"
    assert {f.name for f in (home / "as-adapter").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    loaded = PeftModel.from_pretrained(stock_base(home), str(home / "as-adapter"))
    assert_close(logits(loaded), at_8, rtol=1e-5, atol=1e-5)
    assert (at_8 - logits(stock_base(home))).abs().max() > 0.01


def test_the_adapter_is_cut_as_asked_and_the_card_says_how(home):
    export(home, "rank=8", "cut=svd", "out=svd")
    export_rank(home / CELL / "adapter", 8, home / "svd-by-hand", cut="svd")
    got, want = (load_file(home / f"{name}/adapter_model.safetensors") for name in ("svd", "svd-by-hand"))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    card = (home / "svd/README.md").read_text()
    assert "the best approximation of that rank (SVD) of an adapter trained at ranks from 1 to 64" in card
    assert "It was trained, but not scored in this form." in card and "| rank | held-out loss" not in card
    done = inside(COMMAND, f"cell={CELL}", "cut=svd", "out=best", cwd=home)
    assert done.returncode == 2 and "export.cut is 'svd', in which tiny--alpaca--qdylora--seed0 was not" in done.stderr


def test_several_ranks_go_to_a_folder_each_and_the_cell_may_be_described(home):
    done = inside(COMMAND, *overrides(home), "ranks=[1,64]", "out=several", cwd=home)
    assert done.returncode == 0, done.stderr
    assert sorted(f.name for f in (home / "several").iterdir()) == ["rank-1", "rank-64"]
    for rank in (1, 64):
        config = json.loads((home / f"several/rank-{rank}/adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, 16)


def test_the_best_rank_is_chosen_on_validation_items_and_said(home):
    done = export(home)
    losses = json.loads((home / CELL / "record.json").read_text())["heldout"]["ranks"]
    best = min(losses, key=lambda rank: losses[rank]["value"])
    assert done.stdout == f"{CELL}/exported/rank-{best}\n"
    assert f"Rank {best} is the best of 1, 8, 64 on the 8 held-out items" in done.stderr
    assert done.stderr.strip() in (home / CELL / f"exported/rank-{best}/README.md").read_text()


def test_stock_transformers_loads_the_merged_model(home, at_8):
    export(home, "rank=8", "merge=true", "out=merged")
    merged = AutoModelForCausalLM.from_pretrained(home / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16 and merged.config.use_cache
    export(home, "rank=8", "out=to-merge")
    lora = load_file(home / "to-merge/adapter_model.safetensors")
    want, got = stock_base(home).state_dict(), merged.state_dict()
    changed = [name for name in lora if "lora_A" in name]
    assert len(changed) == 14
    for name in changed:
        layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
        delta = 16 / 8 * lora[name.replace("lora_A", "lora_B")] @ lora[name]
        want[layer] = want[layer].bfloat16() + delta
    for name, weight in want.items():
        assert_close(got[name].float(), weight.bfloat16().float(), rtol=2**-7, atol=1e-6)
    effect = (at_8 - logits(stock_base(home))).abs().mean()
    assert (logits(merged.float()) - at_8).abs().mean() < 0.1 * effect
    assert AutoTokenizer.from_pretrained(home / "merged").decode([70, 71, 72]) == (
        AutoTokenizer.from_pretrained(home, gguf_file="base.gguf").decode([70, 71, 72])
    )


def test_stock_transformers_loads_the_merged_gguf(home, at_8):
    export(home, "rank=8", "merge=true", "gguf=true", "out=merged-gguf")
    merged = AutoModelForCausalLM.from_pretrained(home / "merged-gguf", gguf_file="model.gguf", dtype=torch.float32)
    assert_close(logits(merged), at_8, rtol=0, atol=0.05)  # weights in float16
    assert "-m model.gguf" in (home / "merged-gguf/README.md").read_text()


def test_the_gguf_adapter_is_that_of_the_rank(home):
    export(home, "rank=8", "gguf=true", "out=adapter-gguf")
    file = gguf.GGUFReader(home / "adapter-gguf/adapter.gguf")
    assert {tensor.shape.tolist()[1] for tensor in file.tensors if tensor.name.endswith("lora_a")} == {8}
    assert "--lora adapter.gguf" in (home / "adapter-gguf/README.md").read_text()


FORMS = [(), ("merge=true",), ("gguf=true",), ("merge=true", "gguf=true")]


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_no_path_of_this_machine_is_in_what_is_exported(form, home):
    out = f"searched-{len(form)}-{'merge=true' in form}"
    export(home, "rank=1", *form, f"out={out}")
    found = list((home / out).iterdir())
    assert len(found) >= 2
    for file in found:
        content = file.read_bytes()
        assert str(home).encode() not in content and b"outputs/cache" not in content, file


def test_the_card_says_what_was_trained_spent_and_scored_and_its_code_runs(home, at_8):
    export(home, "rank=8", "out=carded")
    card = (home / "carded/README.md").read_text()
    record = json.loads((home / CELL / "record.json").read_text())
    assert "| base model | tiny, 32 bits while training |" in card and "library_name: peft" in card
    assert f"4 steps, 16 examples, {record['budget']['spent']['tokens']:,} tokens" in card
    assert record["data"]["sha256"][:12] in card and "## Licence" in card
    for rank, score in record["heldout"]["ranks"].items():
        assert re.search(rf"\| {rank} +\| {score['value']:.3f} ± {score['stderr']:.3f}", card)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    load_base(f"{home}/base.gguf", 32, torch.float32, cache=home / "outputs/cache").save_pretrained(home / "stock-base")
    code = code.replace('"tiny"', repr(str(home / "stock-base"))).replace("bfloat16", "float32")
    names: dict = {}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(home / "carded")), names)
    assert_close(logits(names["model"]), at_8, rtol=1e-5, atol=1e-5)


def test_vllm_can_serve_the_adapter(home):
    """What vllm-project/vllm asks of an adapter folder. vllm/lora/peft_helper.py: r, lora_alpha and target_modules are
    there, no modules_to_save, no DoRA, no bias, and no rank above max_lora_rank, which vllm/config/lora.py has be one
    of 1, 8, 16, 32, 64, 128, 256, 320, 512. vllm/lora/lora_model.py: adapter_model.safetensors, whose names
    vllm/lora/utils.py takes apart as base_model.model.<module>.lora_A.weight (or lora_B), and whose modules are linear
    layers of its model; vllm/model_executor/models/llama.py packs these seven."""
    done = export(home, "ranks=[1,8,28,64]", "out=served")
    for folder in map(Path, done.stdout.split()):
        config = json.loads((home / folder / "adapter_config.json").read_text())
        assert config["r"] <= min(size for size in (1, 8, 16, 32, 64) if size >= config["r"])
        assert config["lora_alpha"] > 0 and config["target_modules"] and config["peft_type"] == "LORA"
        assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none"
        assert (
            not config["rank_pattern"] and not config["alpha_pattern"] and config["base_model_name_or_path"] == "tiny"
        )
        for name, weight in load_file(home / folder / "adapter_model.safetensors").items():
            module, kind = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", name).groups()
            layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
            assert module.split(".")[-1] in layers
            assert weight.shape[0 if kind == "lora_A" else 1] == config["r"]


BAD = {
    "rank 0": ("export.rank has 0; ranks go from r_min 1 to r_max 64", ["rank=0"]),
    "rank 65": ("export.rank has 65", ["ranks=[8,65]"]),
    "half a rank": ("export.rank is 2.5; give a rank such as 8, or best", ["rank=2.5"]),
    "an unknown choice": ("export.rank is 'worst'", ["rank=worst"]),
    "a rank and ranks": ("export.rank is 8 and export.ranks", ["rank=8", "ranks=[1]"]),
    "a rank twice": ("name each rank once", ["ranks=[8,8]"]),
    "an unknown option": ("typo", ["export.typo=1"]),
    "a folder in use": ("out is 'outputs', which is not empty; remove it or name another", ["rank=8", "out=outputs"]),
    "a file": ("out is 'base.gguf'", ["rank=8", "out=base.gguf"]),
    "another cell beside it": ("leave out method=qlora", ["method=qlora"]),
    "no cell": ("cell is 'outputs', which holds no cell", ["cell=outputs", "rank=8"]),
}


def files(folder: Path) -> dict[Path, int]:
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_writes_nothing(name, home):
    says, options = BAD[name]
    named = [] if any(option.startswith("cell=") for option in options) else [f"cell={CELL}"]
    before = files(home)
    done = inside(COMMAND, *named, *options, cwd=home)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
    assert files(home) == before


def test_a_described_cell_of_another_configuration_is_refused(home):
    done = inside(COMMAND, *overrides(home), "optim.lr=1e-3", "rank=8", cwd=home)
    assert done.returncode == 2 and "was run with another configuration (optim.lr differs)" in done.stderr
    assert f"name it with cell={CELL}" in done.stderr


def test_an_adapter_that_is_not_there_is_refused(tmp_path):
    done = inside(COMMAND, *BASE, "rank=8", cwd=tmp_path)
    assert done.returncode == 2 and "has no trained adapter" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "family, options, says",
    [
        ("falcon", ("gguf=true",), "gguf is true, but tiny is a 'falcon' model; GGUF is written for LLaMA models only"),
        (
            "llama",
            ("gguf=true", "merge=true"),
            "base' is no GGUF file, whose tokenizer could be kept; export with merge",
        ),
    ],
)
def test_what_cannot_be_written_as_gguf_is_refused(family, options, says, tmp_path):
    base(family, 32, tmp_path).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = (f"model.id={tmp_path}/base", "model.random=null")
    done = inside(COMMAND, *BASE, *model, "rank=8", "out=there", *options, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and not (tmp_path / "there").exists()

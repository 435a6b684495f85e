"""The README's Python runs as it stands there, with a tiny model and data in place of the real ones."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import base, tokens
from torch.testing import assert_close

from qdylora import Draw, at_rank, attach, export_rank, gate_of, load_base, save_adapter, set_rank
from tests.commands import REPOSITORY

DATA = [{"input_ids": row, "labels": row} for row in tokens(batch=16, length=9)]
BATCHES = [{name: row[None] for name, row in example.items()} for example in DATA[:6]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny LLaMA."""
    folder = tmp_path_factory.mktemp("model")
    base("llama", 32, folder).save_pretrained(folder / "tiny")
    return folder / "tiny"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(tokens()).logits.float()


def trained(model) -> bool:
    return any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_the_way_with_the_trainer(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks()[0]
    assert len([line for line in code.splitlines() if line]) <= 10
    stand_ins = {
        "HuggingFaceTB/SmolLM2-135M": str(tiny),
        "torch.bfloat16": "torch.float32",  # in which equal is equal
        "...,": "data,",
        "max_steps=500": "max_steps=3, learning_rate=1e-2",
        "checkpoint-500": "checkpoint-3",
    }
    for real, stand_in in stand_ins.items():
        assert code.count(real) == 1
        code = code.replace(real, stand_in)
    names = {"data": DATA}
    exec(code, names)
    model = names["model"]
    assert trained(model) and names["trainer"].state.global_step == 3
    stock = PeftModel.from_pretrained(load_base(str(tiny), 4, torch.float32), str(tmp_path / "adapter-of-rank-8"))
    assert stock.peft_config["default"].r == 8
    assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)
    set_rank(model, 64)
    assert (logits(stock) - logits(model)).abs().max() > 1e-3


def test_the_way_with_a_plain_loop(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = attach(load_base(str(tiny), 32, torch.float32), r_max=64, alpha=16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    used = []
    model.base_model.register_forward_pre_hook(lambda *_: used.append(gate_of(model).rank))
    names = {"model": model, "optimizer": optimizer, "loader": BATCHES}
    exec(blocks()[1], names | {"Draw": Draw, "set_rank": set_rank, "save_adapter": save_adapter})
    assert used == [int(Draw(r_max=64).ranks_of_step(step, 1, 1)[0, 0]) for step in range(len(BATCHES))]
    assert len(set(used)) > 1 and trained(model)
    export_rank("adapter", 5, "cut")
    stock = PeftModel.from_pretrained(load_base(str(tiny), 32, torch.float32), "cut")
    with at_rank(model, 5):
        assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)


def test_the_way_with_any_lora_adapter(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(load_base(str(tiny), 32, torch.float32), config).save_pretrained("lora-of-rank-64")
    exec(blocks()[2], {"export_rank": export_rank})
    stock = PeftModel.from_pretrained(load_base(str(tiny), 32, torch.float32), "lora-of-rank-8")
    assert stock.peft_config["default"].r == 8

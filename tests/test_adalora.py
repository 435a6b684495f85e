"""AdaLoRA on the same road: PEFT's own training loop is the reference, in float32."""

import json

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from tiny import base, tokens
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from experiments.cell import Cell
from experiments.export import Exporting
from experiments.files import read_json
from experiments.forecast import forecast_of
from experiments.mistakes import ConfigError
from qdylora import Draw, DrawCallback, export_rank, gate_of, load_adapter, set_rank
from qdylora.adalora import Allocate, attach_adalora
from qdylora.export import adapter_bytes
from tests.commands import inside
from tests.test_conf import config

STEPS, R = 10, 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A model trained by the Trainer on 4 bits, and the folder of its last checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = attach_adalora(base("llama", 4, cache), R, 16, STEPS)
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant",
        max_grad_norm=0.0, weight_decay=0.0, save_strategy="steps", save_steps=STEPS, use_cpu=True, report_to=[],
        disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    callbacks = [DrawCallback(Draw(r_max=R, kind="fixed")), Allocate()]
    Trainer(model=model, args=args, train_dataset=rows(), callbacks=callbacks).train()
    return model.eval(), folder / f"checkpoint-{STEPS}"


def rows() -> list[dict]:
    return [{"input_ids": row, "labels": row} for row in tokens(batch=2 * STEPS, length=9)]


def kept(model) -> list[int]:
    """Ranks of every layer that are not cut."""
    return [int(p.count_nonzero()) for name, p in model.named_parameters() if "lora_E" in name]


def test_the_trainer_trains_what_pefts_own_loop_trains(trained, cache):
    model, _ = trained
    torch.manual_seed(0)
    settings = {"init_r": 6, "target_r": R, "tinit": 1, "tfinal": 3, "total_step": STEPS, "lora_alpha": 16}
    targets = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    reference = get_peft_model(base("llama", 4, cache), AdaLoraConfig(**settings, **targets)).train()
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ids = tokens(batch=2 * STEPS, length=9)
    for step in range(STEPS):
        batch = ids[2 * step : 2 * step + 2]
        reference(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        reference.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    want = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    got = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert kept(model) == kept(reference)
    for name, p in want.items():
        assert_close(got[name], p, rtol=1e-4, atol=1e-5)


def test_it_ends_at_its_budget_and_is_loaded_as_it_was_trained(trained, cache):
    model, folder = trained
    assert sum(kept(model)) == R * len(kept(model)) and len(set(kept(model))) > 1
    loaded = load_adapter(base("llama", 4, cache), folder).eval()
    stock = PeftModel.from_pretrained(base("llama", 4, cache), str(folder)).eval()
    ids = tokens()
    with torch.no_grad():
        want = model(ids).logits
        assert_close(loaded(ids).logits, want, rtol=1e-5, atol=5e-6)
        assert_close(stock(ids).logits, want, rtol=1e-5, atol=5e-6)
        with model.disable_adapter():
            assert (model(ids).logits - want).abs().max() > 1e-3
    saved = sum(p.numel() for name, p in stock.named_parameters() if "lora_" in name and "ranknum" not in name)
    assert adapter_bytes(model, R) == 4 * saved


def test_it_has_one_rank(trained, tmp_path):
    model, folder = trained
    set_rank(model, [R, R])
    assert gate_of(model).checked(R) == R
    with pytest.raises(ValueError, match="an AdaLoRA adapter has one rank, 4, got 2"):
        set_rank(model, 2)
    with pytest.raises(ValueError, match="ADALORA adapter of PEFT's, of one rank"):
        export_rank(folder, R, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BAD = {
    "ranks.eval=[1,8]": r"ranks.eval is \[1, 8\], but AdaLoRA has one rank; set ranks.eval=\[8\]",
    "method.draw.kind=uniform": "method.draw.kind is 'uniform', but AdaLoRA draws no ranks",
    "method.update=masked": "method.update is 'masked', but AdaLoRA's optimizer steps",
    "budget.steps=1": "budget.steps is 1; AdaLoRA needs at least 2",
}


@pytest.mark.parametrize("override", BAD)
def test_what_does_not_fit_it_is_refused_by_name(override):
    with pytest.raises(ConfigError, match=BAD[override]):
        config("scale=smoke", "method=adalora", override)


def test_a_cell_of_it_is_trained_scored_and_forecast(tmp_path):
    overrides = ["scale=smoke", "table=table3", "data=gsm8k", "method=adalora", "tracker=none", "tasks.benchmarks=[]"]
    done = inside("experiments.run", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cell = Cell(config(*overrides, f"outputs={tmp_path}/outputs"))
    record = read_json(cell.record_file)
    assert list(record["heldout"]["ranks"]) == ["8"] and record["heldout"]["untrained"]["value"] > 0
    assert record["updates"] == [16] * 8 and "cuts" not in record
    adapter = json.loads((cell.adapter / "adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["target_r"], adapter["init_r"]) == ("ADALORA", 8, 12)
    assert forecast_of(config(*overrides)).parts["adapter"] > 0
    with pytest.raises(ConfigError, match=r"method\.gate is 'adalora', whose adapter has one rank .* use .* as it is"):
        Exporting(cell, cell.config.export).check()

"""The memory forecast against real models and real optimizers, measured; its search, its commands, its record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig

from experiments.bench_forecast import Setting, Step, forecast_of, measured_peak
from experiments.cell import Cell
from experiments.config import CONF
from experiments.files import read_json
from experiments.forecast import architecture, on_a_gpu, shape_of, training_of, why_not
from experiments.schema import MemoryForecast
from qdylora import attach, load_base
from qdylora.base import base_without_weights, contiguous_head_input, gguf_file
from qdylora.forecast import (
    OPTIMIZERS,
    Forecast,
    Shape,
    Training,
    attach_without_weights,
    forecast,
    largest_micro_batch,
    static_parts,
)
from qdylora.ledger import PARTS, Ledger, device_kernels
from tests.commands import inside
from tests.test_conf import config
from tests.tiny import CONFIGS

SMALL = Setting(rows=2, length=128, logits=32, r_max=8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def without_weights(family: str, bits: int, dtype=torch.float32, r_max: int = 8, double_quant: bool = True, **adapter):
    base = base_without_weights(AutoConfig.for_model(**CONFIGS[family]), bits, dtype, double_quant=double_quant)
    return attach_without_weights(base, r_max=r_max, **adapter)


def with_weights(family: str, bits: int, cache: Path, dtype=torch.float32, double_quant: bool = True):
    where = {"model_id": "random", "random_config": CONFIGS[family], "cache": cache}
    base = load_base(bits=bits, dtype=dtype, double_quant=double_quant, **where)
    base.config.use_cache = False
    model = attach(base, r_max=8).train()
    contiguous_head_input(model)
    return model


def small_forecast(model, rows: int = 2, **training) -> Forecast:
    return forecast(model, Shape(rows, 64, 16), Training(**training))


@pytest.mark.parametrize(
    "setting",
    [
        SMALL,
        replace(SMALL, checkpoint_activations=False),
        replace(SMALL, bits=16, accumulate=True, optimizer="paged_adamw_32bit"),
        replace(SMALL, dtype="float32", rows=1, optimizer="sgd", checkpoint_activations=False),
        replace(SMALL, r_max=64, optimizer="paged_adamw_8bit", accumulate=True),
        replace(SMALL, model="falcon-256", rows=5),
        replace(SMALL, model="llama-256-grouped", dropout=0.1, checkpoint_activations=False),
        replace(SMALL, rows=8, logits=128),
    ],
    ids=str,
)
def test_the_forecast_is_within_a_tenth_of_what_the_allocator_hands_out(setting, cache):
    measured = measured_peak(Step(setting, cache))
    assert forecast_of(setting, cache).peak == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("falcon", 4), ("llama", 16)])
def test_what_a_model_itself_holds_is_forecast_to_the_byte(family, bits, double_quant, cache):
    predicted = static_parts(without_weights(family, bits, torch.bfloat16, double_quant=double_quant))
    real = static_parts(with_weights(family, bits, cache, torch.bfloat16, double_quant))
    assert {part: sum(t.nbytes for t in tensors) for part, tensors in real.items()} == {
        part: sum(t.nbytes for t in tensors) for part, tensors in predicted.items()
    }
    assert (sum(t.nbytes for t in real["base_4bit"]) > 0) == (bits == 4)


def test_a_4_bit_layer_keeps_its_packed_weight_for_the_backward_pass_and_nothing_else():
    layer = Linear4bit(128, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = False
    saved = []
    x = torch.randn(3, 128, requires_grad=True)
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    assert saved == []
    _, kept = out.grad_fn.tensors
    assert kept.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
    assert kept.nbytes == 128 * 256 // 2


@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("falcon", 4), ("llama", 16)])
def test_the_model_without_weights_saves_the_tensors_the_real_one_saves(family, bits, cache):
    def saved_by(model, device: str) -> list[str]:
        ids = torch.zeros(1, 16, dtype=torch.long, device=device)
        saved = []
        with saved_tensors_hooks(lambda t: saved.append(f"{tuple(t.shape)} {t.dtype}") or t, lambda t: t):
            model(input_ids=ids, attention_mask=ids + 1, labels=ids)
        return sorted(saved)

    real = saved_by(with_weights(family, bits, cache), "cpu")
    assert len(real) > 50
    with Ledger(vocabulary=258), device_kernels("cpu"):
        assert saved_by(without_weights(family, bits), "meta") == real


@pytest.mark.parametrize("checkpoint", [True, False])
def test_operations_are_those_that_torch_counts_in_the_real_step(checkpoint, cache):
    setting = replace(SMALL, bits=16, checkpoint_activations=checkpoint)
    step = Step(setting, cache)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    attention = {
        attend: lambda q, k, v, *rest, **kwargs: sdpa_flop_count(q, k, v),
        attend_backward: lambda grad, q, k, v, *rest, **kwargs: sdpa_backward_flop_count(grad, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        step.forward_and_backward()
    predicted = forecast_of(setting, cache)
    assert predicted.flops == counter.get_total_flops() > 0
    assert forecast_of(replace(setting, bits=4), cache).flops == predicted.flops


def test_a_ledger_counts_storages_from_birth_to_death():
    with Ledger(vocabulary=7, granule=512) as ledger:
        a = torch.empty(100, device="meta")  # 400 bytes
        assert ledger.held["activations"] == 512
        b = a.view(10, 10)[2:]
        b += 1
        assert ledger.held["activations"] == 512
        del a
        assert ledger.held["activations"] == 512
        logits = torch.empty(3, 7, device="meta")
        assert ledger.held["logits"] == 512
        ledger.enter(b, "adapter")
        assert (ledger.held["activations"], ledger.held["adapter"]) == (0, 512)
        del b, logits
    assert sum(ledger.held.values()) == 0
    assert ledger.peak == dict.fromkeys(PARTS, 0) | {"activations": 512, "logits": 512}


@pytest.mark.parametrize("checkpoint", [True, False])
def test_the_largest_micro_batch_is_that_of_a_search_one_by_one(checkpoint):
    model, training = without_weights("llama", 4), Training(checkpoint_activations=checkpoint)
    shape = Shape(1, 64, 16)
    needed = [forecast(model, replace(shape, micro_batch=rows), training).needed for rows in range(1, 11)]
    assert needed == sorted(needed)
    for limit in (needed[0] - 1, needed[0], needed[2] - 1, needed[5], needed[9] + 1):
        expected = sum(n <= limit for n in needed)
        assert largest_micro_batch(model, shape, training, limit) == expected


def test_parts_respond_to_the_settings_they_belong_to():
    model = without_weights("llama", 4, torch.bfloat16, r_max=64)
    plain = small_forecast(model, checkpoint_activations=False)
    assert plain.peak == sum(plain.parts.values()) and set(plain.parts) == set(PARTS)
    checkpointed = small_forecast(model)
    assert checkpointed.parts["activations"] < plain.parts["activations"]
    assert checkpointed.flops > plain.flops
    assert small_forecast(model, rows=4).peak > checkpointed.peak
    assert small_forecast(model, accumulate=False, checkpoint_activations=False).peak < plain.peak
    # Adam keeps two values for each of the adapter's, in its own type or in 32 bits; in 8 bits a quarter, and tables.
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert small_forecast(model, optimizer="sgd").parts["optimizer"] == 0
    assert small_forecast(model, optimizer="adamw").parts["optimizer"] == 2 * 4 * adapter
    assert small_forecast(model, optimizer="paged_adamw_32bit").parts["optimizer"] == 2 * 4 * adapter
    assert 2 * adapter < small_forecast(model, optimizer="paged_adamw_8bit").parts["optimizer"] < 4 * adapter
    plain = small_forecast(model, optimizer="adamw").peak
    assert all(small_forecast(model, update=update, optimizer="adamw").peak >= plain for update in ("masked", "graded"))
    assert small_forecast(model, rank_per_row=True).parts["adapter"] == checkpointed.parts["adapter"]


def test_only_large_states_of_paged_optimizers_are_pageable():
    model = without_weights("llama", 4, r_max=64)  # each factor has fewer than 100,000 values
    assert small_forecast(model, optimizer="paged_adamw_32bit").pageable == 0
    wide = AutoConfig.for_model(**CONFIGS["llama"] | {"hidden_size": 256, "intermediate_size": 2048})
    model = attach_without_weights(base_without_weights(wide, 4, torch.bfloat16), r_max=64)
    large = [p.numel() for p in model.parameters() if p.requires_grad and p.numel() >= 100_000]
    assert len(large) == 6  # gate and up have such a B, down such an A, in two layers
    assert small_forecast(model, optimizer="paged_adamw_32bit").pageable == 8 * sum(large)
    assert small_forecast(model, optimizer="paged_adamw_8bit").pageable == 2 * sum(large)
    assert small_forecast(model, optimizer="adamw").pageable == 0


def test_a_forecast_leaves_nothing_behind(cache):
    before = F.dropout, F.scaled_dot_product_attention
    model = without_weights("llama", 4, dropout=0.1)
    first = small_forecast(model)
    assert small_forecast(model) == first
    assert all(p.grad is None for p in model.parameters())
    assert (F.dropout, F.scaled_dot_product_attention) == before
    real = with_weights("llama", 4, cache)  # bitsandbytes shares tables between models
    weights = [p for p in real.parameters() if isinstance(p, Params4bit)]
    assert not any(w.quant_state.code.is_meta or w.quant_state.state2.code.is_meta for w in weights)
    assert set(OPTIMIZERS) == {"adamw", "sgd", "paged_adamw_32bit", "paged_adamw_8bit"}


#: Parameters of the published checkpoints; Falcon's is half the bytes its index file states, less the head's copy.
PARAMETERS = {
    "llama_7b": (6_738_415_616, 159_907_840),
    "llama_13b": (13_015_864_320, 250_347_520),
    "llama2_13b": (13_015_864_320, 250_347_520),
    "falcon_40b": (83_671_941_120 // 2 - 65024 * 8192, 444_334_080),
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_architectures_have_the_published_number_of_parameters(model):
    c = config("scale=paper", f"model={model}")
    base = base_without_weights(architecture(c), 16, torch.bfloat16)
    whole = sum(p.numel() for p in base.parameters())
    adapted = attach_without_weights(base, r_max=64)
    assert (whole, sum(p.numel() for p in adapted.parameters() if p.requires_grad)) == PARAMETERS[model]


def test_smollm2s_architecture_is_its_files():
    fields = gguf.GGUFReader(gguf_file(config("model=smollm2_135m").model.id)).fields
    ours = architecture(config("model=smollm2_135m"))
    for key, name in {
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "vocab_size": "vocab_size",
    }.items():
        assert fields[f"llama.{key}"].contents() == getattr(ours, name), name


def test_a_cells_step_is_forecast_as_it_is_trained():
    c = config("scale=paper", "model=falcon_40b", "data=oasst1", "method=qdylora_sequence")
    assert shape_of(c) == Shape(micro_batch=1, length=16 + 512, logits=513)
    assert training_of(c) == Training("paged_adamw_32bit", True, accumulate=True, rank_per_row=True)
    c = config("scale=mini", "method.update=masked")
    assert training_of(c) == Training("adamw", False, accumulate=False, update="masked")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU here answers for itself")
@pytest.mark.parametrize(
    ("asked", "bits", "found"),
    [("auto", 4, "bfloat16"), ("auto", 16, "bfloat16"), ("auto", 32, "auto"), ("float32", 4, "float32")],
)
def test_a_forecast_made_without_a_gpu_does_not_depend_on_this_cpu(asked, bits, found):
    c = config("scale=smoke", f"optim.compute_dtype={asked}", f"method.bits={bits}")
    assert on_a_gpu(c) == replace(c, optim=replace(c.optim, compute_dtype=found))


def test_the_verdict_counts_what_can_be_paged():
    memory = Forecast(dict.fromkeys(PARTS, 0) | {"base_rest": 10 << 30, "optimizer": 2 << 30}, 2 << 30, 0)
    assert why_not(memory, MemoryForecast(gpu_gb=11, reserve_gb=1)) is None
    reason = why_not(memory, MemoryForecast(gpu_gb=10.5, reserve_gb=1))
    assert reason == (
        "forecast: training needs 10.0 GiB even with 2.0 GiB of optimizer state on the host, "
        "and a GPU of 10.5 GiB has 9.5 left for it"
    )


SMOKE = ("table=table1", "scale=smoke", "tracker=none", "tasks.benchmarks=[]")


def test_a_cell_that_cannot_fit_is_recorded_without_being_run(tmp_path):
    too_small = ("forecast.gpu_gb=0.001", "forecast.reserve_gb=0")
    done = inside("experiments.run", *SMOKE, *too_small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cell = Cell(config(*SMOKE, *too_small, f"outputs={tmp_path}/outputs"))
    record = read_json(cell.record_file)
    assert (record["status"], record["oom"]) == ("oom", "forecast")
    assert record["reason"].startswith("forecast: training needs 0.0 GiB")
    assert set(record["forecast"]) == set(PARTS) and record["forecast"]["base_4bit"] > 0
    assert record["budget"]["asked"]["steps"] == 4
    assert not (cell.folder / "adapter").exists()
    assert cell.record() == record  # it stands for this GPU, and for no other
    for other in ("forecast.gpu_gb=0.002", "forecast.gpu_gb=null"):
        elsewhere = Cell(config(*SMOKE, *too_small, other, f"outputs={tmp_path}/outputs"))
        assert elsewhere.digest == cell.digest and elsewhere.record() is None


def test_the_command_prints_and_writes_the_table(tmp_path):
    done = inside("experiments.forecast", "scale=smoke", "forecast.gpu_gb=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    assert lines["fits 2 GiB less 1"][-2:] == ["yes", "yes"]
    assert int(lines["largest micro-batch"][-2]) > int(lines["largest micro-batch"][-1]) > 4
    written = json.loads((tmp_path / "outputs/forecast/smoke--tiny--alpaca--qdylora.json").read_text())
    assert set(written["forecasts"]["checkpointed"]["parts"]) == set(PARTS)
    if not torch.cuda.is_available():
        assert written["compute_dtype"] == "bfloat16" and "4-bit base, bfloat16 compute" in done.stdout
    done = inside("experiments.forecast", "scale=smoke", "model.random=null", "model.id=no-such/model", cwd=tmp_path)
    assert done.returncode == 2 and "model.architecture is not set and no-such/model" in done.stderr


def test_every_model_of_the_paper_can_be_forecast_offline():
    for file in Path(CONF, "model").glob("*.yaml"):
        c = config(f"model={file.stem}")
        assert c.model.architecture or c.model.random

"""GGUF for llama.cpp, read back by gguf and by transformers: a merged model and a LoRA adapter, in float32."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import tiny_gguf
import torch
from safetensors.torch import load_file
from tiny import FALCON, adapted, randomize_B, tokens
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from qdylora import (
    Draw,
    adapter_to_gguf,
    at_rank,
    attach,
    export_rank,
    load_base,
    load_config,
    merge_into_gguf,
    save_adapter,
)

R_MAX, RANK = 8, 3
SCALES = {"alpha_over_b": 16 / RANK, "alpha_over_sqrt_b": 16 / RANK**0.5, "constant": 16 / R_MAX}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("base") / "tiny.gguf")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def exported(file: Path, cache: Path, folder: Path, scale: str = "alpha_over_b"):
    """A model over the file with a random adapter, and that adapter exported at RANK."""
    torch.manual_seed(0)
    model = attach(load_base(str(file), 32, torch.float32, cache=cache), r_max=R_MAX, alpha=16, scale=scale)
    randomize_B(model)
    save_adapter(model, folder / "checkpoint", Draw(r_max=R_MAX))
    return model.eval(), export_rank(folder / "checkpoint", RANK, folder / "adapter")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(tokens()).logits


def applied_by_hand(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What llama.cpp computes with, W + alpha / rank * B A, of two files, by the names of GGUF."""
    weights, lora = tiny_gguf.tensors(base), tiny_gguf.tensors(adapter)
    alpha = tiny_gguf.fields(adapter)["adapter.lora.alpha"]
    changed = {name.removesuffix(".lora_a") for name in lora if name.endswith(".lora_a")}
    assert len(lora) == 2 * len(changed) and changed <= weights.keys()
    for name in changed:
        A, B = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        weights[name] = weights[name] + alpha / len(A) * B @ A
    return weights


def in_transformers(weights: dict[str, torch.Tensor], like: Path, cache: Path, folder: Path):
    """A model of these weights, by GGUF's names, through a GGUF file in float32 that transformers reads."""
    source = gguf.GGUFReader(like)
    writer = gguf.GGUFWriter(folder / "by-hand.gguf", "llama")
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1])
    for name, weight in weights.items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="by-hand.gguf", dtype=torch.float32)


@pytest.mark.parametrize("scale", SCALES)
def test_the_adapter_file_applied_by_hand_gives_the_logits_of_the_rank(scale, file, cache, tmp_path):
    model, adapter = exported(file, cache, tmp_path, scale)
    written = adapter_to_gguf(adapter, load_config(str(file), cache=cache), tmp_path / "adapter.gguf")
    weights = applied_by_hand(file, written)
    with at_rank(model, RANK):
        want = logits(model)
    assert_close(logits(in_transformers(weights, file, cache, tmp_path)), want, rtol=1e-4, atol=1e-4)
    assert (want - logits(model.unload())).abs().max() > 0.1  # so that an adapter without effect would not pass


def test_the_adapter_file_has_the_fields_that_llama_cpp_reads(file, cache, tmp_path):
    """As in ggml-org/llama.cpp: convert_lora_to_gguf.py writes and src/llama-adapter.cpp demands them; ranks and widths
    are compared with those of the model's tensors, in ggml's order of axes (columns first)."""
    _, adapter = exported(file, cache, tmp_path)
    written = adapter_to_gguf(adapter, load_config(str(file), cache=cache), tmp_path / "adapter.gguf")
    fields = tiny_gguf.fields(written)
    assert fields["general.type"] == "adapter" and fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == pytest.approx(16)
    alpha = gguf.GGUFReader(written).fields["adapter.lora.alpha"]
    assert alpha.types == [gguf.GGUFValueType.FLOAT32]
    base = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    lora = {tensor.name: tensor for tensor in gguf.GGUFReader(written).tensors}
    assert len(lora) == 2 * 7 * tiny_gguf.LAYERS
    for name, tensor in lora.items():
        weight, kind = base[name.rsplit(".", 1)[0]], name.rsplit(".", 1)[1]
        columns, rows = weight.shape.tolist()
        assert tensor.shape.tolist() == {"lora_a": [columns, RANK], "lora_b": [RANK, rows]}[kind]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize("scale", SCALES)
def test_transformers_loads_the_merged_file_with_the_logits_of_the_rank(scale, file, cache, tmp_path):
    model, adapter = exported(file, cache, tmp_path, scale)
    merged = merge_into_gguf(adapter, file, tmp_path / "merged.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", dtype=torch.float32)
    with at_rank(model, RANK):
        assert_close(logits(loaded), logits(model), rtol=0, atol=0.05)  # weights in float16
    weights, lora = loaded.state_dict(), factors(adapter)
    assert len(lora) == 7 * tiny_gguf.LAYERS
    for name, weight in model.unload().state_dict().items():
        if name in lora:
            A, B = lora[name]
            weight = (weight + SCALES[scale] * B @ A).half().float()
        assert_close(weights[name], weight, rtol=2**-10, atol=1e-6)  # a sum at the edge may round to either side
    assert merged == tmp_path / "merged.gguf"


def factors(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of every layer of a PEFT adapter, by the name of the weight they change."""
    weights = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace("lora_A.", ""): (A, weights[name.replace("lora_A", "lora_B")])
        for name, A in weights.items()
        if "lora_A" in name
    }


def test_all_that_the_adapter_does_not_change_is_as_in_the_base_file(file, cache, tmp_path):
    _, adapter = exported(file, cache, tmp_path)
    merged = merge_into_gguf(adapter, file, tmp_path / "merged.gguf")
    before, after = tiny_gguf.fields(file), tiny_gguf.fields(merged)
    assert {name for name in before if before[name] != after.get(name)} == {"general.file_type"}
    assert after.keys() == before.keys() and after["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    base, written = ({t.name: t for t in gguf.GGUFReader(one).tensors} for one in (file, merged))
    assert list(written) == list(base)
    changed = {name for name in base if written[name].tensor_type != base[name].tensor_type}
    assert changed == {name for name in base if name.startswith("blk.") and "norm" not in name}
    assert {written[name].tensor_type for name in changed} == {gguf.GGMLQuantizationType.F16}
    for name in base.keys() - changed:
        assert (written[name].data == base[name].data).all()


def test_another_architecture_is_refused(cache, tmp_path):
    model = adapted("falcon", 32, cache, r_max=R_MAX)
    save_adapter(model, tmp_path / "checkpoint", Draw(r_max=R_MAX))
    adapter = export_rank(tmp_path / "checkpoint", RANK, tmp_path / "adapter")
    config = AutoConfig.for_model(**FALCON)
    with pytest.raises(ValueError, match="architecture is 'falcon'; GGUF is written for 'llama' only"):
        adapter_to_gguf(adapter, config, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_an_adapter_of_a_deeper_model_is_refused(file, cache, tmp_path):
    _, adapter = exported(file, cache, tmp_path)
    config = load_config(str(file), cache=cache)
    config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"model\.layers\.1\..*no name in a GGUF file of 1 layers"):
        adapter_to_gguf(adapter, config, tmp_path / "adapter.gguf")

"""Export, SVD truncation and merging, against stock PEFT and stock transformers on real folders."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import adapted, base, randomize_B, tokens
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from qdylora import CUTS, RankSettings, at_rank, export_rank, gate_of, load_adapter, merge_into
from qdylora import cut as cut_in

FAMILIES = ["llama", "falcon"]
SCALES = {
    "alpha_over_b": lambda b: 16 / b,
    "alpha_over_sqrt_b": lambda b: 16 / b**0.5,
    "constant": lambda b: 16 / 8,
}
EXACT = {"rtol": 1e-5, "atol": 5e-6}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def save(model, folder):
    """A checkpoint as training leaves it: PEFT's folder and the rank settings beside it."""
    model.save_pretrained(folder)
    gate = gate_of(model)
    RankSettings(gate.r_max, gate.alpha, gate.scale, gate.frozen, "drift", {"kind": "uniform"}).save(folder)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(tokens()).logits


def factors(folder) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of every layer of an adapter folder."""
    weights = load_file(folder / "adapter_model.safetensors")
    pairs = {n: (w, weights[n.replace("lora_A", "lora_B")]) for n, w in weights.items() if "lora_A" in n}
    assert len(weights) == 2 * len(pairs)
    return pairs


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_loads_the_export_of_every_rank_with_equal_logits(family, bits, scale, cache, tmp_path):
    model = adapted(family, bits, cache, scale=scale)
    source = save(model, tmp_path / "checkpoint")
    bare = logits(base(family, bits, cache))
    for b in range(1, 9):
        target = export_rank(source, b, tmp_path / f"rank-{b}")
        with at_rank(model, b):
            want = logits(model)
        got = logits(PeftModel.from_pretrained(base(family, bits, cache), str(target)))
        assert_close(got, want, **EXACT)
        assert (got - bare).abs().max() > 0.01  # so that an adapter without effect would not pass


@pytest.mark.parametrize("scale", SCALES)
def test_an_export_holds_the_sliced_weights_and_a_plain_config_and_nothing_else(scale, cache, tmp_path):
    source = save(adapted("llama", 32, cache, scale=scale), tmp_path / "checkpoint")
    whole, before = factors(source), json.loads((source / "adapter_config.json").read_text())
    for b in range(1, 9):
        target = tmp_path / "deep" / f"rank-{b}"
        assert export_rank(str(source), b, str(target)) == target
        assert {f.name for f in target.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
        cut = factors(target)
        assert cut.keys() == whole.keys() and len(cut) == 14
        for name, (A, B) in cut.items():
            assert torch.equal(A, whole[name][0][:b]) and torch.equal(B, whole[name][1][:, :b])
        config = json.loads((target / "adapter_config.json").read_text())
        assert config["r"] == b
        divisor = b**0.5 if config["use_rslora"] else b
        assert config["lora_alpha"] / divisor == pytest.approx(SCALES[scale](b), rel=1e-12)
        assert {k: v for k, v in config.items() if before[k] != v}.keys() <= {"r", "lora_alpha"}
        assert config.keys() == before.keys()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", [32, 4])
def test_the_checkpoint_itself_is_a_peft_adapter_of_rank_r_max(bits, scale, cache, tmp_path):
    model = adapted("llama", bits, cache, scale=scale)
    source = save(model, tmp_path)
    stock = PeftModel.from_pretrained(base("llama", bits, cache), str(source))
    assert_close(logits(stock), logits(model), **EXACT)
    assert not any(layer.lora_variant for layer in stock.modules() if hasattr(layer, "lora_variant"))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_load_adapter_restores_the_adapter_and_its_rank_settings(scale, frozen, cache, tmp_path):
    model = adapted("falcon", 4, cache, scale=scale, frozen=frozen)
    loaded = load_adapter(base("falcon", 4, cache), save(model, tmp_path))
    gate = gate_of(loaded)
    assert (gate.r_max, gate.alpha, gate.scale, gate.frozen, gate.rank) == (8, 16, scale, frozen, 8)
    assert not any(p.requires_grad for p in loaded.parameters())
    for b in (1, 3, 8):
        with at_rank(model, b), at_rank(loaded, b):
            assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_rank_settings_come_back_from_the_file_as_they_were(tmp_path):
    settings = RankSettings(8, 16.0, "constant", True, "masked", {"kind": "list", "ranks": [1, 8], "seed": 3})
    settings.save(tmp_path)
    assert RankSettings.load(tmp_path) == settings


# SVD ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_svd_equals_the_truncated_svd_of_the_full_product(scale, cache, tmp_path):
    source = save(adapted("llama", 32, cache, scale=scale), tmp_path / "checkpoint")
    for b in range(1, 9):
        cut = factors(export_rank(source, b, tmp_path / f"svd-{b}", cut="svd"))
        for name, (A, B) in factors(source).items():
            full = SCALES[scale](8) * B.double() @ A.double()
            U, S, Vh = torch.linalg.svd(full, full_matrices=False)
            want = torch.zeros_like(full)
            for i in range(b):
                want += S[i] * torch.outer(U[:, i], Vh[i])
            got = SCALES[scale](b) * cut[name][1].double() @ cut[name][0].double()
            assert_close(got, want, rtol=1e-5, atol=1e-6)
            # No rank-b matrix is nearer (Eckart and Young): the error is what the singular values left out say.
            error = torch.linalg.matrix_norm(full - got)
            assert_close(error, S[b:].square().sum().sqrt(), rtol=1e-4, atol=1e-6)
            prefix = SCALES[scale](8) * B[:, :b].double() @ A[:b].double()
            assert error <= torch.linalg.matrix_norm(full - prefix) + 1e-6
            if b == 8:
                assert_close(got, full, rtol=1e-5, atol=1e-6)
            else:
                assert error < 0.99 * torch.linalg.matrix_norm(full - prefix)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_at_full_rank_of_the_svd_equals_the_adapter(family, scale, cache, tmp_path):
    model = adapted(family, 32, cache, scale=scale)
    target = export_rank(save(model, tmp_path / "checkpoint"), 8, tmp_path / "svd", cut="svd")
    got = logits(PeftModel.from_pretrained(base(family, 32, cache), str(target)))
    assert_close(got, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("b", [20, 33, 40])
def test_svd_of_layers_narrower_than_the_rank(b, cache, tmp_path):
    """k_proj of the tiny LLaMA puts out 32 numbers, so its product has rank 32 at most."""
    model = adapted("llama", 32, cache, r_max=40)
    target = export_rank(save(model, tmp_path / "checkpoint"), b, tmp_path / "svd", cut="svd")
    for name, (A, B) in factors(target).items():
        assert (A.shape[0], B.shape[1]) == (b, b), name
    stock = PeftModel.from_pretrained(base("llama", 32, cache), str(target))
    if b == 40:
        assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)


# Merging --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_saved_and_loaded_by_transformers_equals_the_adapter(family, scale, cache, tmp_path):
    model = adapted(family, 32, cache, scale=scale)
    source = save(model, tmp_path / "checkpoint")
    plain_names = set(base(family, 32, cache).state_dict())
    for b in (1, 3, 8):
        with at_rank(model, b):
            want = logits(model)
        merged = merge_into(base(family, 32, cache), source, b)
        assert type(merged) is type(model.get_base_model())
        assert set(merged.state_dict()) == plain_names
        assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)
        folder = tmp_path / f"merged-{b}"
        merged.save_pretrained(folder)
        assert not list(folder.glob("adapter*")) and not list(folder.glob("*.bin"))
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert_close(logits(again), logits(merged), rtol=0, atol=0)


def test_merging_into_a_16_bit_base_rounds_the_sum_once(cache, tmp_path):
    source = save(adapted("llama", 32, cache), tmp_path)
    fresh = base("llama", 16, cache, torch.bfloat16)
    weights = {name: w.clone() for name, w in fresh.state_dict().items()}
    merged = merge_into(fresh, source, 3).state_dict()
    for name, (A, B) in factors(source).items():
        layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
        want = (weights[layer].double() + 16 / 3 * B[:, :3].double() @ A[:3].double()).bfloat16()
        assert merged[layer].dtype == torch.bfloat16
        # A sum that lies at the edge between two bfloat16 numbers may fall to either side.
        assert (merged[layer] != want).float().mean() < 1e-3
        assert_close(merged[layer], want, rtol=2**-7, atol=0)
        assert not torch.equal(merged[layer], weights[layer])


def test_merging_into_a_4_bit_base_is_refused(cache, tmp_path):
    source = save(adapted("llama", 32, cache), tmp_path)
    with pytest.raises(ValueError, match="merging needs a base at 16 or 32 bits: a 4-bit base would be quantized"):
        merge_into(base("llama", 4, cache), source, 3)


# Adapters of one rank -------------------------------------------------------------------------------


def saved_by_peft(folder, cache, r=8, **kwargs):
    """An ordinary LoRA adapter, made and saved by stock PEFT alone."""
    torch.manual_seed(1)
    config = LoraConfig(r=r, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **kwargs)
    model = get_peft_model(base("llama", 32, cache), config)
    randomize_B(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_any_lora_adapter_of_peft_is_cut_to_a_lower_rank(rslora, how, cache, tmp_path):
    model = saved_by_peft(tmp_path / "lora", cache, use_rslora=rslora)
    trained = 16 / 8**0.5 if rslora else 16 / 8
    for b in (1, 3, 8):
        target = export_rank(tmp_path / "lora", b, tmp_path / f"rank-{b}", cut=how)
        stock = PeftModel.from_pretrained(base("llama", 32, cache), str(target))
        layers = dict(stock.named_modules())
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A"):
                A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
                if how == "svd":
                    U, S, Vh = torch.linalg.svd(trained * B @ A, full_matrices=False)
                    want = (U[:, :b] * S[:b]) @ Vh[:b]
                else:
                    want = trained * (8 / b if how == "truncate_alpha_over_b" else 1) * B[:, :b] @ A[:b]
                got = layers[name].get_delta_weight("default").double()
                assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)  # of rank 8, all of it


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_cut_on_file_is_the_cut_in_place(scale, how, cache, tmp_path):
    model = adapted("llama", 32, cache, scale=scale)
    source = save(model, tmp_path / "checkpoint")
    for b in (1, 5):
        target = export_rank(source, b, tmp_path / f"rank-{b}", cut=how)
        with cut_in(model, how), at_rank(model, b):
            want = logits(model)
        assert_close(logits(PeftModel.from_pretrained(base("llama", 32, cache), str(target))), want, **EXACT)
        assert_close(logits(merge_into(base("llama", 32, cache), source, b, cut=how)), want, rtol=1e-4, atol=1e-4)


def test_how_to_cut_an_adapter_of_one_rank_must_be_said(cache, tmp_path):
    saved_by_peft(tmp_path / "lora", cache)
    with pytest.raises(ValueError, match=r"trained at one rank, not by qdylora, so say how to cut it: cut='svd'"):
        export_rank(tmp_path / "lora", 4, tmp_path / "out")
    with pytest.raises(ValueError, match="cut is 'qr'; choose one of truncate, truncate_alpha_over_b, svd"):
        export_rank(tmp_path / "lora", 4, tmp_path / "out", cut="qr")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kwargs, says",
    [
        ({"use_dora": True}, "has use_dora, which a plain LoRA of one rank does not"),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}}, "has rank_pattern and alpha_pattern, which"),
        ({"lora_bias": True}, "has lora_bias, which"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(kwargs, says, cache, tmp_path):
    saved_by_peft(tmp_path / "lora", cache, **kwargs)
    with pytest.raises(ValueError, match=says):
        export_rank(tmp_path / "lora", 2, tmp_path / "out", cut="svd")


def test_an_adapter_of_an_embedding_is_refused(cache, tmp_path):
    config = LoraConfig(r=8, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base("llama", 32, cache), config).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"adapts a layer that is not linear: .*embed_tokens\.lora_embedding_A"):
        export_rank(tmp_path / "lora", 2, tmp_path / "out", cut="svd")


# Refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 9, -1, 2.5, True])
def test_a_rank_outside_1_to_r_max_is_refused_and_writes_nothing(rank, cache, tmp_path):
    source = save(adapted("llama", 32, cache), tmp_path / "checkpoint")
    sentence = f"rank must be a whole number from 1 to 8, got {rank}"
    with pytest.raises(ValueError, match=sentence):
        export_rank(source, rank, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=sentence):
        merge_into(base("llama", 32, cache), source, rank)


def test_a_folder_without_rank_settings_is_not_loaded_as_an_any_rank_adapter(cache, tmp_path):
    """Such as an export, which is an ordinary PEFT adapter of one rank."""
    source = save(adapted("llama", 32, cache), tmp_path / "checkpoint")
    exported = export_rank(source, 3, tmp_path / "rank-3")
    sentence = "rank-3 has no qdylora.json: it is not an adapter trained by qdylora"
    with pytest.raises(FileNotFoundError, match=sentence):
        load_adapter(base("llama", 32, cache), exported)
    with pytest.raises(FileNotFoundError, match=sentence):
        merge_into(base("llama", 32, cache), exported, 2)

"""The gate against stock PEFT LoRA, an independent implementation, in float32."""

import pytest
import torch
from tiny import adapted, adapter_grads, plain_lora, tokens
from torch.testing import assert_close

from qdylora import at_rank, gate_of, lora_layers, merge, set_rank
from qdylora.gate import WORTH_SLICING

FAMILIES = ["llama", "falcon"]
EXACT = {"rtol": 1e-5, "atol": 5e-6}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def loss_and_grads(model, ids, checkpointing=False):
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), adapter_grads(model)


def sliced(name: str, p: torch.Tensor, b: int) -> torch.Tensor:
    return p[:b] if "lora_A" in name else p[:, :b]


def above(name: str, p: torch.Tensor, b: int) -> torch.Tensor:
    return p[b:] if "lora_A" in name else p[:, b:]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_equals_a_peft_lora_of_that_rank(family, bits, checkpointing, cache):
    model, ids = adapted(family, bits, cache), tokens()
    for b in range(1, 9):
        set_rank(model, b)
        logits, grads = loss_and_grads(model, ids, checkpointing)
        want_logits, want = loss_and_grads(plain_lora(family, bits, cache, model, b, scale=16 / b), ids)
        assert_close(logits, want_logits, **EXACT)
        for name, grad in grads.items():
            assert_close(sliced(name, grad, b), want[name], **EXACT)
            assert not above(name, grad, b).any(), f"{name} has a gradient above rank {b}"


@pytest.mark.parametrize("length", [11, 80], ids=["masked", "sliced"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_per_row_equals_one_rank_at_a_time(family, bits, frozen, length, cache):
    ranks, ids = [3, 8, 8, 1], tokens(batch=4, length=length)
    assert (length >= WORTH_SLICING) == (length == 80)
    model = adapted(family, bits, cache, frozen=frozen)
    set_rank(model, ranks)
    logits, grads = loss_and_grads(model, ids)
    total = {name: torch.zeros_like(g) for name, g in grads.items()}
    for i, b in enumerate(ranks):
        set_rank(model, b)
        row_logits, row_grads = loss_and_grads(model, ids[i : i + 1])
        assert_close(logits[i : i + 1], row_logits, **EXACT)
        for name, g in row_grads.items():
            total[name] += g / len(ranks)
    for name, g in grads.items():
        assert_close(g, total[name], **EXACT)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_changes_no_output_and_trains_only_row_b(family, bits, cache):
    """DyLoRA Eq. 10. The slow reference is the chain rule through the same forward: of the prefix gradient, row b."""
    ids = tokens()
    prefix, frozen = adapted(family, bits, cache), adapted(family, bits, cache, frozen=True)
    for b in (1, 2, 5, 8):
        set_rank(prefix, b), set_rank(frozen, b)
        want_logits, want = loss_and_grads(prefix, ids)
        logits, grads = loss_and_grads(frozen, ids)
        assert_close(logits, want_logits, rtol=0, atol=0)
        for name, grad in grads.items():
            row = slice(b - 1, b)
            got, expected = (grad[row], want[name][row]) if "lora_A" in name else (grad[:, row], want[name][:, row])
            assert_close(got, expected, **EXACT)
            assert grad.count_nonzero() == got.count_nonzero(), f"{name} learns outside row {b}"


@pytest.mark.parametrize(
    ("scale", "at_b"),
    [("alpha_over_b", lambda b: 16 / b), ("alpha_over_sqrt_b", lambda b: 16 / b**0.5), ("constant", lambda b: 2.0)],
)
def test_scale_rules(scale, at_b, cache):
    model, ids = adapted("llama", 32, cache, scale=scale), tokens()
    for b in (1, 3, 8):
        with at_rank(model, b), torch.no_grad():
            logits = model(ids).logits
        with torch.no_grad():
            assert_close(logits, plain_lora("llama", 32, cache, model, b, at_b(b))(ids).logits, **EXACT)


@pytest.mark.parametrize("bad", [0, 9, -1, 2.5, True, [1, 0], [9]])
def test_ranks_outside_1_to_r_max_are_refused(bad, cache):
    model = adapted("llama", 32, cache)
    with pytest.raises(ValueError, match="rank must be a whole number from 1 to 8"):
        set_rank(model, bad)
    assert gate_of(model).rank == 8


def test_a_batch_of_another_size_is_refused(cache):
    model = adapted("llama", 32, cache)
    set_rank(model, [1, 2])
    with pytest.raises(ValueError, match=r"2 ranks.*batch has 3"):
        model(tokens(batch=3))


def test_at_rank_restores_even_after_an_error(cache):
    model = adapted("llama", 32, cache)
    set_rank(model, 5)
    with pytest.raises(RuntimeError), at_rank(model, 2):
        assert gate_of(model).rank == 2
        raise RuntimeError
    assert gate_of(model).rank == 5


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merge_changes_the_weights_and_unmerge_restores_them(family, safe, cache):
    model, ids = adapted(family, 32, cache).eval(), tokens()
    layers = lora_layers(model).values()
    before = [layer.get_base_layer().weight.clone() for layer in layers]
    for b in (1, 3, 8):
        with at_rank(model, b), torch.no_grad():
            want = model(ids).logits
        merge(model, b, safe=safe)
        assert all(not torch.equal(w, x.get_base_layer().weight) for w, x in zip(before, layers, strict=True))
        with torch.no_grad():
            assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
            set_rank(model, 7)  # a rank switched while merged must not change what unmerge takes out
            assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        for w, layer in zip(before, layers, strict=True):
            assert_close(layer.get_base_layer().weight, w, rtol=0, atol=1e-6)


def test_merging_at_ranks_per_row_is_refused(cache):
    model = adapted("llama", 32, cache)
    set_rank(model, [1, 2])
    with pytest.raises(ValueError, match="one rank for the whole model"):
        model.merge_adapter()


def test_one_gate_serves_every_linear_layer_but_the_head(cache):
    for family, names in {
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    }.items():
        for bits in (4, 32):
            model = adapted(family, bits, cache)
            layers = lora_layers(model)
            assert {name.rsplit(".", 1)[-1] for name in layers} == names
            assert {id(layer.lora_variant["default"]) for layer in layers.values()} == {id(gate_of(model))}


def test_bfloat16_activations_stay_bfloat16(cache):
    """The gate casts the factors, so that with float32 adapters matrix products still run in the activations' type."""
    model = adapted("llama", 32, cache)
    layer = next(iter(lora_layers(model).values())).to(torch.bfloat16)
    layer.lora_A.float(), layer.lora_B.float()
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    got = layer(x)
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), layer.float()(x.float()), rtol=0.05, atol=0.05)

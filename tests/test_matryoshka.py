"""MatryoshkaLoRA's nested prefixes against stock PEFT adapters, one a prefix and all active at once, in float32."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import adapted, adapter_grads, base, tokens
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from qdylora import Draw, DrawCallback, Nested, at_rank, attach, export_rank, gate_of, set_rank

EXACT = {"rtol": 1e-5, "atol": 5e-6}
RANKS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def prefix_of(name: str, p: torch.Tensor, b: int) -> torch.Tensor:
    return p[:b] if "lora_A" in name else p[:, :b]


def adapters_of_all_prefixes(family: str, bits: int, cache, source, scale_at):
    """Stock PEFT: for every rank an adapter of its own, a copy of `source`'s prefix, all active."""
    model = base(family, bits, cache)
    for b in RANKS:
        config = LoraConfig(r=b, lora_alpha=scale_at(b) * b, target_modules="all-linear", task_type="CAUSAL_LM")
        if b == RANKS[0]:
            model = get_peft_model(model, config, adapter_name=f"r{b}")
        else:
            model.add_adapter(f"r{b}", config)
    model.base_model.set_adapter([f"r{b}" for b in RANKS])
    factors = dict(source.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                b = int(name.split(".")[-2].removeprefix("r"))
                whole = name.replace(f".r{b}.", ".default.")
                p.copy_(prefix_of(name, factors[whole], b))
    return model


@pytest.mark.parametrize(
    ("scale", "scale_at"),
    [("alpha_over_b", lambda b: 16 / b), ("alpha_over_sqrt_b", lambda b: 16 / math.sqrt(b))],
)
@pytest.mark.parametrize(("family", "bits"), [("llama", 32), ("llama", 4), ("falcon", 4)])
def test_nested_ranks_are_the_sum_of_all_prefixes_and_train_them_all(family, bits, scale, scale_at, cache):
    ids = tokens()
    model = adapted(family, bits, cache, scale=scale).train()
    set_rank(model, Nested(RANKS))
    ours = model(input_ids=ids, labels=ids)
    ours.loss.backward()
    reference = adapters_of_all_prefixes(family, bits, cache, model, scale_at).train()
    theirs = reference(input_ids=ids, labels=ids)
    theirs.loss.backward()
    assert_close(ours.logits, theirs.logits, **EXACT)
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in adapter_grads(reference).items():
        b = int(name.split(".")[-2].removeprefix("r"))
        prefix_of(name, want[name.replace(f".r{b}.", ".default.")], b).add_(grad)
    for name, grad in adapter_grads(model).items():
        assert_close(grad, want[name], **EXACT)
        assert grad.any()


def test_every_step_trains_all_rows_and_the_result_is_an_ordinary_adapter_at_every_rank(cache, tmp_path):
    torch.manual_seed(0)
    model = attach(base("llama", 32, cache), r_max=8, alpha=1, scale="alpha_over_sqrt_b")
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(gate_of(module).rank))
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        save_strategy="steps", save_steps=3, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=12, length=9)]
    draw = Draw(r_max=8, kind="nested", ranks=RANKS)
    Trainer(model=model, args=args, train_dataset=data, callbacks=[DrawCallback(draw)]).train()
    assert seen == [Nested(RANKS)] * 6
    assert gate_of(model).rank == 8
    assert draw.update_probability().tolist() == [1.0] * 8
    ids = tokens()
    model.eval()
    for b in (1, 3, 8):
        export_rank(tmp_path / "checkpoint-3", b, tmp_path / f"rank-{b}")
        stock = PeftModel.from_pretrained(base("llama", 32, cache), str(tmp_path / f"rank-{b}")).eval()
        with torch.no_grad(), at_rank(model, b):
            assert_close(stock(ids).logits, model(ids).logits, **EXACT)


def test_what_nested_ranks_cannot_be_is_refused(cache):
    with pytest.raises(ValueError, match=r"draw\.ranks is \[1, 2\].*r_max 8, which is one of them"):
        Draw(r_max=8, kind="nested", ranks=(1, 2))
    with pytest.raises(ValueError, match="rank must be a whole number from 1 to 8, got 9"):
        set_rank(adapted("llama", 32, cache), Nested((1, 9)))
    with pytest.raises(ValueError, match="frozen=False"):
        set_rank(adapted("llama", 32, cache, frozen=True), Nested((1, 8)))
    model = adapted("llama", 32, cache)
    set_rank(model, Nested((1, 8)))
    with pytest.raises(ValueError, match="one rank for the whole model"):
        model.merge_adapter()

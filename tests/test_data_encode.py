"""Encoding and left-padded batches against the ordinary right-padded computation."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from experiments.data.encode import IGNORED, CompletionCollator, Encoded, encode
from experiments.data.formats import Example


def tokenizer(adds_bos: bool, **special) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that starts its texts with bos (LLaMA) or only defines one (SmolLM2)."""
    vocabulary = {symbol: n for n, symbol in enumerate(["<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()])}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **special)


def test_prompt_and_completion_are_cut_apart():
    llama = tokenizer(adds_bos=True)
    a, b = (llama.convert_tokens_to_ids(letter) for letter in "ab")
    encoded = encode(Example("aaa", "bb", "q"), llama, source_max_len=10, target_max_len=10)
    assert encoded == Encoded([0, a, a, a, b, b, 1], 4, False)
    cut = encode(Example("aaa", "bb", "q"), llama, source_max_len=3, target_max_len=2)
    assert cut == Encoded([0, a, a, b, b], 3, True)  # as in QLoRA, the end of both is lost, eos included
    exact = encode(Example("aaa", "bb", "q"), llama, source_max_len=4, target_max_len=3)
    assert not exact.truncated and exact.input_ids[-1] == 1


def test_bos_only_where_the_tokenizer_itself_adds_it():
    example = Example("", "b", "q")
    assert encode(example, tokenizer(adds_bos=True), 5, 5).prompt_tokens == 1
    assert encode(example, tokenizer(adds_bos=False), 5, 5).prompt_tokens == 0


@pytest.mark.parametrize("limits", [(0, 5), (5, 0)])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(ValueError, match="at least 1"):
        encode(Example("a", "b", "q"), tokenizer(True), *limits)


def test_padding_with_eos_where_there_is_no_pad_token():
    assert CompletionCollator.of(tokenizer(True)).pad_token_id == 1
    assert CompletionCollator.of(tokenizer(True, pad_token="<s>")).pad_token_id == 0


BATCHES = {
    "prompts": [([5, 6, 7, 8, 9], 3), ([5, 6, 7, 8, 9, 10, 11], 2), ([4, 9], 1)],
    "no prompt": [([5, 6, 7], 0), ([8, 9, 10, 11, 12], 0), ([4], 0)],
    "both": [([5, 6, 7, 8], 0), ([8, 9, 10, 11, 12], 4)],
    "prompt longer than all the rest": [([5, 6, 7, 8, 9, 10, 11, 12, 13], 8), ([5, 6], 1)],
}


def right_padded(rows, pad):
    """The ordinary batch: padding on the right, labels for every position, logits everywhere."""
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row.input_ids)
        mask[index, : len(row)] = 1
        labels[index, row.prompt_tokens : len(row)] = torch.tensor(row.input_ids[row.prompt_tokens :])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", ["llama", "falcon"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_loss_and_gradients_equal_the_ordinary_computation(batch, family):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
    own = {
        "llama": {"intermediate_size": 64, "num_key_value_heads": 2},
        "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **own[family]))
    model = model.float().eval()
    ordinary = copy.deepcopy(model)
    rows = [Encoded(ids, prompt, False) for ids, prompt in batch]
    expected = ordinary(**right_padded(rows, pad=1)).loss
    arguments = CompletionCollator(pad_token_id=1)(rows)
    output = model(**arguments)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    output.loss.backward()
    for (name, one), other in zip(model.named_parameters(), ordinary.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    longest = max(len(row) - max(row.prompt_tokens, 1) for row in rows)
    assert output.logits.shape[1] == arguments["labels"].shape[1] == longest + 1
    assert (arguments["labels"][:, 0] == IGNORED).all()
    supervised = sum(len(row) - max(row.prompt_tokens, 1) for row in rows)
    assert (arguments["labels"] != IGNORED).sum() == supervised


def test_positions_start_at_the_first_token():
    batch = CompletionCollator(pad_token_id=9)([Encoded([5, 6], 1, False), Encoded([5, 6, 7, 8], 1, False)])
    assert batch["input_ids"].tolist() == [[9, 9, 5, 6], [5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]

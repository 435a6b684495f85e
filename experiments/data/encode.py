"""From examples to tensors, as in QLoRA (artidoro/qlora, `qlora.py`, DataCollatorForCausalLM)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from experiments.data.formats import Example

IGNORED = -100  # the label PyTorch's cross-entropy leaves out


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; the first `prompt_tokens` of them carry no loss."""

    input_ids: list[int]
    prompt_tokens: int
    truncated: bool

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Number of positions with a loss. The very first token never has one: nothing comes before it."""
        return len(self.input_ids) - max(self.prompt_tokens, 1)


def bos_ids(tokenizer) -> list[int]:
    """Return [id] of the beginning-of-sequence token if this tokenizer starts its texts with one, else [].

    LLaMA's does (as in QLoRA) and Falcon has none. SmolLM2 defines one, "<|im_start|>", but never puts it in
    front of plain text, so neither lm-eval nor we do.
    """
    return [tokenizer.bos_token_id] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else []


def encode(example: Example, tokenizer, source_max_len: int, target_max_len: int) -> Encoded:
    """Return the ids of bos + prompt cut to `source_max_len`, then completion + eos cut to `target_max_len`.

    Prompt and completion are tokenized separately, without special tokens, as in QLoRA; ValueError for a
    limit below 1.
    """
    if source_max_len < 1 or target_max_len < 1:
        raise ValueError(f"limits must be at least 1, not {source_max_len} and {target_max_len}")
    source = bos_ids(tokenizer) + tokenizer(example.prompt, add_special_tokens=False).input_ids
    target = [*tokenizer(example.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    truncated = len(source) > source_max_len or len(target) > target_max_len
    source = source[:source_max_len]
    return Encoded(source + target[:target_max_len], len(source), truncated)


@dataclass(frozen=True)
class CompletionCollator:
    """Pads a batch on the left, so that all completions end together and only their logits need computing."""

    pad_token_id: int

    @classmethod
    def of(cls, tokenizer) -> "CompletionCollator":
        """Return the collator of a tokenizer: it pads with the pad token, or eos where there is none."""
        pad = tokenizer.pad_token_id
        return cls(tokenizer.eos_token_id if pad is None else pad)

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, torch.Tensor | int]:
        """Return the arguments of a Hugging Face causal LM's forward for this batch.

        input_ids, attention_mask and position_ids are (batch, length); labels are (batch, logits_to_keep) and
        belong to the last positions, the only ones whose logits the model then computes. Hugging Face's loss
        compares logit i with label i + 1, so one position before the longest completion is kept too.
        """
        length = max(len(row) for row in batch)
        keep = 1 + max(row.supervised for row in batch)
        input_ids = torch.full((len(batch), length), self.pad_token_id)
        mask = torch.zeros((len(batch), length), dtype=torch.long)
        labels = torch.full((len(batch), keep), IGNORED)
        for index, row in enumerate(batch):
            ids = torch.tensor(row.input_ids)
            input_ids[index, length - len(row) :] = ids
            mask[index, length - len(row) :] = 1
            if row.supervised:
                # `supervised` leaves out a first token without prompt: on the left of it is padding, which
                # must not be asked to predict it.
                labels[index, -row.supervised :] = ids[-row.supervised :]
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
            "labels": labels,
            "logits_to_keep": keep,
        }

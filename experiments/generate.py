"""A prompt answered at several ranks, side by side, while it is generated:

python -m experiments.generate data=oasst1 method=qdylora ranks=[1,8,64]

The cell may also be named by its folder (cell=FOLDER). Prompts are typed, a line each, or read from a file
(prompts=FILE). All ranks are computed in one batch, and sampled with the same random numbers: their answers differ
because of the rank and not by luck.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from peft import PeftModel
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from eval.dequantize import dequantized
from experiments.chat.prompts import Prompt, format_for, load_named, tokenized
from experiments.checks import out_of_range
from experiments.chosen import chosen
from experiments.cli import command, quiet
from experiments.data.formats import HUMAN
from experiments.mistakes import ConfigError
from experiments.schema import Config, GenerateSettings
from experiments.score import ranked
from experiments.side_by_side import SideBySide
from qdylora import at_rank, cut

OPTIONS = "generate"


class SameNoise(LogitsProcessor):
    """Makes the likeliest token a random sample: Gumbel noise on the scores, the same for every row of the batch."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = -torch.empty(scores.shape[-1]).exponential_(generator=self.generator).log()
        return scores + noise.to(scores)


@torch.no_grad()
def answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, how: str, settings: GenerateSettings
) -> list[str]:
    """The prompt's answers at the ranks of `settings`, printed as they come. how: the prompt's format."""
    ranks = settings.ranks

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True).split(HUMAN)[0].strip()

    configured = model.generation_config.eos_token_id
    ends = {
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        *(configured if isinstance(configured, list) else [configured]),
    }
    columns = SideBySide([f"rank {rank}" for rank in ranks], text, ends)
    inputs = tokenized([prompt] * len(ranks), how, tokenizer).to(model.device)
    with at_rank(model, ranks):
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            stop_strings=[HUMAN],
            tokenizer=tokenizer,
            do_sample=False,  # by the noise, if at all
            logits_processor=_sampling(settings),
            streamer=columns,
        )
    return columns.texts


def _sampling(settings: GenerateSettings) -> LogitsProcessorList:
    if not settings.temperature:
        return LogitsProcessorList()
    return LogitsProcessorList(
        [
            TemperatureLogitsWarper(settings.temperature),
            TopPLogitsWarper(settings.top_p),
            SameNoise(settings.sampling_seed),
        ]
    )


def typed() -> Iterator[Prompt]:
    """Prompts from standard input, a line each, until it ends."""
    asking = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(asking).strip()
        except EOFError:
            return
        if text:
            yield Prompt("typed", (text,))


def main(config: Config) -> None:
    quiet()
    cell, settings = chosen(config, OPTIONS), config.generate
    for complaint in out_of_range("generate.ranks", settings.ranks, cell.config):
        raise ConfigError(complaint)
    prompts = load_named("generate.prompts", settings.prompts) if settings.prompts else typed()
    engine, tokenizer = ranked(cell, settings.ranks)
    how = format_for(settings.format, cell.config.data.name)
    if how == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            f"generate.format is 'chat', but the tokenizer of {cell.config.model.id} has no chat template"
        )
    model = engine.model.eval()
    model.config.use_cache = True
    with dequantized(model, cell.config.tasks.dequantize), cut(model, settings.cut):
        for prompt in prompts:
            if not sys.stdin.isatty() or settings.prompts:
                print("\n".join(f"> {line}" for line in prompt.text.splitlines()))
            answer(model, tokenizer, prompt, how, settings)
            print()


if __name__ == "__main__":
    command(main, OPTIONS)

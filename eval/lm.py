"""lm-eval's view of a model that answers at all ranks at once: one `LM` per rank, one computation for all of them.

Prompts, filters, metrics and standard errors stay lm-eval's own; so does tokenization, which is inherited from
its Hugging Face model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers import PreTrainedTokenizerBase

from eval.engine import AllRanks
from eval.prefix import can_share

log = logging.getLogger(__name__)


class RankedLM(HFLM):
    """Answers of all ranks of an engine. `view(rank)` is what lm-eval's `evaluate` takes.

    What one view is asked is computed for every rank and remembered, so that the other views only look it up.
    Models whose prefix cache cannot be shared, and sampled generation, run rank by rank through lm-eval's
    own code.
    """

    def __init__(self, engine: AllRanks, tokenizer: PreTrainedTokenizerBase, **kwargs):
        """`kwargs` as lm-eval's HFLM takes them, such as add_bos_token."""
        super().__init__(pretrained=engine.base, tokenizer=tokenizer, **({"batch_size": 8} | kwargs))
        self.engine = engine
        self.what = "scoring"
        self._answers: dict[str, Sequence] = {}
        self._shares = can_share(engine.base.config)
        if not self._shares:
            log.warning("%s: prefixes cannot be shared; scoring rank by rank", engine.base.config.model_type)

    def view(self, rank: int) -> RankView:
        """lm-eval's model at `rank`, one of the engine's."""
        return RankView(self, self.engine.ranks.index(rank))

    def forget(self) -> None:
        """Drop all remembered answers."""
        self._answers.clear()

    def at_all_ranks(self, kind: str, requests: Sequence[Instance]) -> list[Sequence]:
        """For each request its answers at the engine's ranks, in their order."""
        keys = [json.dumps((kind, request.args)) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._answers}
        if new:
            answers = getattr(self, f"_all_{kind}")(list(new.values()))
            self._answers |= dict(zip(new, answers, strict=True))
        return [self._answers[key] for key in keys]

    def _all_loglikelihood(self, requests: list[Instance]) -> list[Sequence[tuple[float, bool]]]:
        if not self._shares:
            return self._rank_by_rank(lambda: HFLM.loglikelihood(self, requests))
        return self.loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        if not self._shares:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        # Too long for the model: cut from the left, exactly as lm-eval does (the last token is never fed).
        fitting = [(c, t, (list(c) + list(t))[-(self.max_length + 1) :]) for _, c, t in requests]
        logps, greedy = self.engine.loglikelihood([(s[: -len(t)], t) for _, t, s in fitting], what=self.what)
        return [list(zip(map(float, p), map(bool, g), strict=True)) for p, g in zip(logps, greedy, strict=True)]

    def _all_loglikelihood_rolling(self, requests: list[Instance]) -> list[Sequence[float]]:
        shares, self._shares = self._shares, False
        try:
            return self._rank_by_rank(lambda: HFLM.loglikelihood_rolling(self, requests))
        finally:
            self._shares = shares

    def _all_generate_until(self, requests: list[Instance]) -> list[Sequence[str]]:
        answers: dict[int, Sequence[str]] = {}
        by_settings: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1]), []).append(i)
        for settings, indices in by_settings.items():
            chosen = [requests[i] for i in indices]
            kwargs = normalize_gen_kwargs(json.loads(settings), self.max_gen_toks)
            until = handle_stop_sequences(kwargs.pop("until", None), eos=self.tok_decode(self.eot_token_id, False))
            if self._shares and not kwargs["do_sample"]:
                texts = self._generate(chosen, until, kwargs["max_gen_toks"])
            else:
                texts = self._rank_by_rank(lambda chosen=chosen: HFLM.generate_until(self, chosen))
            answers |= dict(zip(indices, texts, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _generate(self, requests: list[Instance], until: list[str], max_new: int) -> list[list[str]]:
        ids, mask = self.tok_batch_encode(
            [request.args[0] for request in requests], left_truncate_len=self.max_length - max_new
        )
        prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        tokens = self.engine.generate(prompts, max_new, self._stops(until), what=self.what)
        return [
            [postprocess_generated_text(self.tok_decode(answer), until, None) for answer in answers]
            for answers in tokens
        ]

    def _stops(self, until: list[str]) -> Callable[[list[int]], bool]:
        """Whether an answer has ended: at an end-of-sequence token or a stop string, which may begin anywhere in a
        token; so a few more tokens are decoded than the string itself needs."""
        ends = self.engine.base.generation_config.eos_token_id
        ends = {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}
        reach = 2 + max(len(self.tok_encode(stop, add_special_tokens=False)) for stop in until)

        def stops(tokens: list[int]) -> bool:
            return tokens[-1] in ends or any(stop in self.tok_decode(tokens[-reach:], False) for stop in until)

        return stops

    def _rank_by_rank(self, answer: Callable[[], list]) -> list[Sequence]:
        rows = []
        for rank in self.engine.ranks:
            with self.engine.gate.at(rank):
                rows.append(answer())
        return list(zip(*rows, strict=True))


class RankView(LM):
    """One rank of a `RankedLM`."""

    def __init__(self, ranked: RankedLM, index: int):
        super().__init__()
        self.ranked, self.index = ranked, index

    @property
    def tokenizer_name(self) -> str:
        return self.ranked.tokenizer_name

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._mine("loglikelihood", requests)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        return self._mine("loglikelihood_rolling", requests)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        return self._mine("generate_until", requests)

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return self.ranked.apply_chat_template(chat_history, add_generation_prompt)

    def _mine(self, kind: str, requests: Sequence[Instance]) -> list:
        return [answers[self.index] for answers in self.ranked.at_all_ranks(kind, requests)]

"""One function per data set: a raw row becomes the examples a model is trained on.

The formats are those of QLoRA (artidoro/qlora, `qlora.py`), whose settings the QDyLoRA paper takes over
(section 3, footnote 1); the loss is on the completion only. For the three tasks the prompt is the one lm-eval
scores with.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from eval.releases import text_field, webglm_prompt

# Stanford Alpaca's two templates (tatsu-lab/stanford_alpaca, train.py). QLoRA's copy has a blank after
# "Response:".
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
HUMAN, ASSISTANT = "### Human:", "### Assistant:"


@dataclass(frozen=True)
class Example:
    """A training example: the loss is on `completion` and the end-of-sequence token.

    An empty prompt puts it on everything. `question` is the row's own question, free of templates: what is
    compared with the benchmarks' questions and what decides on which side of a split the row falls.
    """

    prompt: str
    completion: str
    question: str


def alpaca(row: dict) -> list[Example]:
    """Return the example of a row {instruction, input, output} in Stanford Alpaca's template."""
    instruction, given = text_field(row, "instruction"), row.get("input") or ""
    template = ALPACA_INPUT if given else ALPACA_NO_INPUT
    question = f"{instruction}\n{given}" if given else instruction
    return [Example(template.format(instruction=instruction, input=given), _answer(row, "output"), question)]


def oasst1(row: dict) -> list[Example]:
    """Return the example of an OpenAssistant dialogue in the Guanaco form, with the loss on everything.

    Rows are {text} (the hub's timdettmers/openassistant-guanaco) or {input, output} (QLoRA's evaluation file,
    whose input ends in "### Assistant:"). Turns follow each other without a blank, as in
    openassistant-guanaco.
    """
    if "input" in row:  # such rows have a `text` too: the input once more
        text = f"{text_field(row, 'input')} {_answer(row, 'output')}"
        text = text.replace(f" {HUMAN}", HUMAN).replace(f" {ASSISTANT}", ASSISTANT)
    else:
        text = text_field(row, "text")
    if not text.startswith(HUMAN):
        raise ValueError(f"the dialogue does not start with {HUMAN!r}")
    question, _, reply = text.removeprefix(HUMAN).partition(ASSISTANT)
    return [Example("", text if reply.strip() else "", question.strip())]


def oasst1_trees(messages: Iterable[dict]) -> Iterator[dict]:
    """Yield one {text} per message tree of OpenAssistant's flat export: the best-ranked path from its root.

    At each level the reply of the lowest rank is taken (unranked ones last, then file order) and deleted
    messages are left out, the way openassistant-guanaco was made. A tree whose root is not in the file (a
    file of one language has such) gives nothing.
    """
    children = defaultdict(list)
    for message in messages:
        if not message.get("deleted"):
            children[message["parent_id"]].append(message)
    for root in children[None]:
        text, message = "", root
        while message is not None:
            marker = ASSISTANT if message["role"] == "assistant" else HUMAN
            text += f"{marker} {message['text']}"
            replies = children[message["message_id"]]
            message = min(replies, key=lambda m: (m["rank"] is None, m["rank"] or 0), default=None)
        yield {"text": text}


def self_instruct(row: dict) -> list[Example]:
    """Return the examples of a Self-Instruct row, bare, without a template.

    Rows are {prompt, completion} (the hub's yizhongw/self_instruct, whose completions carry GPT-3's
    "<|endoftext|>") or a seed task {instruction, instances}, one example per instance in the plainest of the
    encodings of Self-Instruct's own prepare_for_finetuning.py.
    """
    if "prompt" in row:
        prompt = text_field(row, "prompt")
        completion = _answer(row, "completion").removesuffix("<|endoftext|>")
        return [Example(prompt, completion, prompt)]
    instruction, examples = text_field(row, "instruction").strip(), []
    for instance in row["instances"]:
        given = instance["input"].strip()
        question = f"{instruction}\n{given}" if given else instruction
        examples.append(Example(f"{question}\n\n", _answer(instance, "output").strip(), question))
    return examples


def flan_v2(row: dict) -> list[Example]:
    """Return the example of a FLAN v2 row.

    Rows are {inputs, targets} (hub mixtures, already in FLAN's templates) or {question, answer,
    chain_of_thought} (FLAN's cot_data files), put into one of FLAN's own chain-of-thought templates
    (google-research/FLAN, flan/v2/flan_templates_branched.py, "cot_esnli", the first).
    """
    if "inputs" in row:
        prompt = text_field(row, "inputs")
        return [Example(prompt, _answer(row, "targets"), prompt)]
    question, answer, chain = (row[name].strip() for name in ("question", "answer", "chain_of_thought"))
    completion = f"{chain} The answer is {answer}." if answer else ""
    return [Example(f"{question}\nLet's solve step-by-step:\n", completion, question)]


def gsm8k(row: dict) -> list[Example]:
    """Return the example of a GSM8K row in lm-eval's prompt; annotations <<..>> stay (paper, A.2)."""
    question = text_field(row, "question")
    return [Example(f"Question: {question}\nAnswer:", _after_blank(_answer(row, "answer")), question)]


def triviaqa(row: dict) -> list[Example]:
    """Return the example of a TriviaQA row in lm-eval's prompt, which adds a question mark of its own."""
    question = text_field(row, "question")
    answer = _after_blank(_answer(row["answer"], "value"))
    return [Example(f"Question: {question}?\nAnswer:", answer, question)]


def webglm(row: dict) -> list[Example]:
    """Return the example of a WebGLM-QA row: references in the prompt, citation marks [n] kept."""
    question = text_field(row, "question")
    prompt = webglm_prompt(question, row["references"])
    return [Example(prompt, _after_blank(_answer(row, "answer")), question)]


def _answer(row: dict, name: str) -> str:
    """Return the text in `row[name]`; it may be empty: `load` drops and counts such examples."""
    if not isinstance(row[name], str):
        raise ValueError(f"{name} is {row[name]!r}, not text")
    return row[name]


def _after_blank(answer: str) -> str:
    # lm-eval's target_delimiter; an empty answer stays recognizably empty.
    return f" {answer.strip()}" if answer.strip() else ""


FORMATS = {
    function.__name__: function for function in (alpaca, oasst1, self_instruct, flan_v2, gsm8k, triviaqa, webglm)
}

"""Every data set's rows as the examples a model is trained on."""

from pathlib import Path

import lm_eval
import pytest
from lm_eval.utils import apply_template

from eval.releases import rows
from experiments.data import formats


def test_alpaca_uses_stanfords_two_templates():
    (bare,) = formats.alpaca({"instruction": "Say hi.", "input": "", "output": "Hi."})
    assert bare.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSay hi.\n\n### Response:"
    )
    (full,) = formats.alpaca({"instruction": "Translate.", "input": "a {b}", "output": "c"})
    assert full.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\n### Input:\na {b}\n\n### Response:"
    )
    assert (bare.completion, full.completion, full.question) == ("Hi.", "c", "Translate.\na {b}")


def test_oasst1_puts_the_loss_on_the_whole_dialogue():
    text = "### Human: Hi?### Assistant: Hello.### Human: Bye.### Assistant: Bye."
    (hub,) = formats.oasst1({"text": text})
    row = {
        "input": "### Human: Hi? ### Assistant: Hello. ### Human: Bye. ### Assistant:",
        "output": "Bye.",
        "text": "### Human: Bye. ### Assistant:",
    }
    (local,) = formats.oasst1(row)
    assert hub == local == formats.Example("", text, "Hi?")
    (unanswered,) = formats.oasst1({"text": "### Human: Hi?"})
    assert unanswered.completion == ""
    with pytest.raises(ValueError, match="does not start"):
        formats.oasst1({"text": "### Assistant: Hello."})


def message(identity, parent, role, rank=None, deleted=False):
    return {
        "message_id": identity,
        "parent_id": parent,
        "text": identity,
        "role": role,
        "rank": rank,
        "deleted": deleted,
    }


def test_trees_give_the_best_ranked_path():
    messages = [
        message("root", None, "prompter"),
        message("unranked", "root", "assistant"),
        message("second", "root", "assistant", 1),
        message("best", "root", "assistant", 0),
        message("gone", "best", "prompter", deleted=True),
        message("next", "best", "prompter"),
        message("later", "best", "prompter"),
        message("last", "next", "assistant"),
        message("orphan", "in another language", "assistant", 0),
    ]
    expected = "### Human: root### Assistant: best### Human: next### Assistant: last"
    assert list(formats.oasst1_trees(messages)) == [{"text": expected}]
    assert list(formats.oasst1_trees(messages[::-1])) != []


def test_self_instruct_is_bare():
    hub = {"prompt": "Name a colour.\n\nOutput:", "completion": " Red.<|endoftext|>"}
    assert formats.self_instruct(hub) == [formats.Example(hub["prompt"], " Red.", hub["prompt"])]
    instances = [{"input": "", "output": "a\n"}, {"input": "x", "output": "b"}]
    seed = formats.self_instruct({"instruction": "Do it. ", "instances": instances})
    assert [(e.prompt, e.completion) for e in seed] == [("Do it.\n\n", "a"), ("Do it.\nx\n\n", "b")]


def test_flan_puts_the_chain_before_the_answer():
    row = {"question": "2 and 2?", "answer": "4", "chain_of_thought": "2 + 2 = 4."}
    (example,) = formats.flan_v2(row)
    assert example.prompt == "2 and 2?\nLet's solve step-by-step:\n"
    assert example.completion == "2 + 2 = 4. The answer is 4."
    assert formats.flan_v2({"inputs": "Q", "targets": "A"}) == [formats.Example("Q", "A", "Q")]


@pytest.mark.parametrize(
    "name, template, answer",
    [
        ("gsm8k", "gsm8k/gsm8k.yaml", lambda row: row["answer"]),
        ("triviaqa", "triviaqa/default.yaml", lambda row: row["answer"]["value"]),
    ],
)
def test_tasks_are_trained_in_the_prompt_they_are_scored_in(shared, name, template, answer):
    text = (Path(lm_eval.__file__).parent / "tasks" / template).read_text()
    line = next(line for line in text.splitlines() if line.startswith("doc_to_text: "))
    scored = line.removeprefix("doc_to_text: ").strip('"').replace("\\n", "\n")
    for row in rows(name, "train", shared / "data")[:20]:
        (example,) = formats.FORMATS[name](row)
        assert example.prompt == apply_template(scored, row)
        assert example.completion == f" {answer(row).strip()}"


def test_calculator_annotations_and_citations_stay(shared):
    (example,) = formats.gsm8k(rows("gsm8k", "train", shared / "data")[0])
    assert "<<" in example.completion and "\n#### " in example.completion
    row = {"question": "Why?", "answer": "So[1].", "references": ["So it is.", "No."]}
    (example,) = formats.webglm(row)
    assert example.prompt == "Reference [1]: So it is.\nReference [2]: No.\nQuestion: Why?\nAnswer:"
    assert example.completion == " So[1]."


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_row_of_another_shape_is_an_error(name):
    with pytest.raises((KeyError, ValueError, TypeError)):
        formats.FORMATS[name]({"something": "else"})

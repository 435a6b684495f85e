"""What a judge is asked and how its reply is read. A prompt, once used, is never edited: it gets a new version."""

from __future__ import annotations

import re

SYSTEM = "You compare two answers to the same request fairly. The order in which they are shown means nothing."
MATERIAL = """Request:
<request>
{question}
</request>

Answer 1:
<answer>
{first}
</answer>

Answer 2:
<answer>
{second}
</answer>

"""
EXPLAIN = (
    "Which answer serves the request better? Weigh how helpful, relevant, accurate and detailed each is. Explain your "
    "view in a few sentences. Then write a last line that holds one digit and nothing else: 1 if answer 1 is better, 2 "
    "if answer 2 is better, 3 if they are equally good."
)
BRIEF = "Which answer is better? Reply with one digit only: 1 for answer 1, 2 for answer 2, 3 if they are equally good."
#: Judged examples (request, answer 1, answer 2, verdict): without them a small model goes on with an answer instead.
EXAMPLES = (
    ("What is the capital of France?", "I like travelling.", "The capital of France is Paris.", 2),
    ("Name two primary colours.", "Red and blue.", "Colours are seen with the eye.", 1),
    ("What is 2 + 3?", "2 + 3 is 5.", "The answer is 5.", 3),
)
#: Version -> the question after the two answers, and judged examples before the match. Three classes, as in QLoRA
#: (section 5.2), in our own words.
PROMPTS = {"explain-v1": (EXPLAIN, ()), "brief-v1": (BRIEF, EXAMPLES)}

# The digit may stand in marks (**2**, "2.", [[2]]) or behind a word that announces it.
LAST_LINE = re.compile(r"\W*(?:(?:final\s+)?(?:verdict|answer|choice|rating)\W+)?([123])\W*", re.IGNORECASE)


def messages(version: str, question: str, first: str, second: str) -> list[dict[str, str]]:
    """A match as chat messages."""
    question_after, examples = PROMPTS[version]

    def user(question: str, first: str, second: str) -> dict[str, str]:
        content = MATERIAL.format(question=question, first=first, second=second) + question_after
        return {"role": "user", "content": content}

    judged = [
        message
        for *texts, digit in examples
        for message in (user(*texts), {"role": "assistant", "content": str(digit)})
    ]
    return [{"role": "system", "content": SYSTEM}, *judged, user(question, first, second)]


def verdict(reply: str) -> int | None:
    """1, 2 or 3 (a tie) if the reply's last line says so, else None."""
    lines = [line for line in reply.splitlines() if line.strip()]
    found = LAST_LINE.fullmatch(lines[-1].strip()) if lines else None
    return int(found[1]) if found else None

"""The four task families of scale `mini`, one per benchmark: facts and problems put as questions.

Choice questions (MMLU), word problems (GSM8K), closed-book questions (TriviaQA) and questions with numbered
references (WebGLM). How a data set writes a task down is the business of `facts`.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from eval.releases import LETTERS
from experiments.data.world import SPLITS, Entity, Fact, Problem, facts, problems

# Per relation: the question, the sentence that answers it.
RELATIONS = {
    "capital": ("What is the capital of {x}?", "The capital of {x} is {y}."),
    "continent": ("On which continent is {x}?", "{x} is in {y}."),
    "currency": ("Which currency is used in {x}?", "The currency of {x} is the {y}."),
    "language": ("Which language is spoken in {x}?", "A language spoken in {x} is {y}."),
    "code2": ("What is the two-letter code of {x}?", "The two-letter code of {x} is {y}."),
    "code3": ("What is the three-letter code of {x}?", "The three-letter code of {x} is {y}."),
    "city": ("In which country is the city of {x}?", "The city of {x} is in {y}."),
    "currency_code": ("What is the code of the currency {x}?", "The code of the currency {x} is {y}."),
    "language_code": ("What is the code of the {x} language?", "The code of the {x} language is {y}."),
    "symbol": ("What is the chemical symbol of {x}?", "The chemical symbol of {x} is {y}."),
    "number": ("What is the atomic number of {x}?", "The atomic number of {x} is {y}."),
}
KINDS = {
    "country": "a country",
    "city": "a city",
    "currency": "a currency",
    "language": "a language",
    "element": "a chemical element",
}
# MMLU's subjects; all but the first three follow a rule that carries over to names never seen in training.
SUBJECTS = {
    "capital_cities": "capital",
    "continents": "continent",
    "currencies": "currency",
    "country_codes": "code3",
    "language_codes": "language_code",
    "chemical_symbols": "symbol",
    "kinds_of_things": "kind",
    "word_problems": "short_problem",
}
SHORT_PROBLEM = 25  # words


@dataclass(frozen=True)
class Task:
    """One question in one of the families.

    `context` is the four options or the references, `answer` the short answer (a letter, a number, a name, a
    sentence that cites), `reasoning` what leads to it, `aliases` the accepted short answers. `keys` name the
    facts that answer it.
    """

    family: str
    question: str
    answer: str
    reasoning: tuple[str, ...]
    keys: tuple[str, ...]
    context: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


class Pool:
    """What one data set may ask of one split, in random order; what is taken is gone."""

    def __init__(self, split: str, seed: int, use: str):
        """`use` names the data set: each draws in an order of its own."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
        self.random = Random(f"{seed} {use} {split}")  # seeded by text: the same on every run and machine
        self.facts = [fact for fact in facts() if fact.split == split]
        self._stock = defaultdict(list)
        for fact in self.facts:
            self._stock[fact.relation].append(fact)
        entities = dict.fromkeys(fact.entity for fact in self.facts)
        self._stock["kind"] = [entity for entity in entities if entity.name in unambiguous_names()]
        self._answers = {
            relation: sorted({fact.answer for fact in stock})
            for relation, stock in self._stock.items()
            if relation in RELATIONS
        }
        self._names = {kind: [entity.name for entity in self._stock["kind"] if entity.kind == kind] for kind in KINDS}
        for problem in problems(seed):
            if problem.split == split:
                short = len(problem.question.split()) <= SHORT_PROBLEM
                self._stock["short_problem" if short else "problem"].append(problem)
        for stock in self._stock.values():
            self.random.shuffle(stock)

    def take(self, relations: Iterable[str], count: int) -> list[Fact | Entity | Problem]:
        """Remove and return up to `count` items, one of each relation in turn until all are used up."""
        taken, relations = [], list(relations)
        while len(taken) < count and any(self._stock[relation] for relation in relations):
            turn = [self._stock[relation].pop() for relation in relations if self._stock[relation]]
            taken += turn[: count - len(taken)]
        return taken

    def wrong_answers(self, fact: Fact) -> list[str]:
        """Return the wrong answers to a fact's question: those of other entities of the split."""
        right = {fact.answer, *fact.also_right}
        return [answer for answer in self._answers[fact.relation] if answer not in right]

    def other_things(self, entity: Entity) -> list[str]:
        """Return one name of every kind but the entity's own."""
        return [self.random.choice(names) for kind, names in self._names.items() if kind != entity.kind]


@functools.cache
def unambiguous_names() -> frozenset[str]:
    """Return the names that stand for one thing: "Armenia", also a city in Colombia, is not among them."""
    count = Counter(entity.name for entity in {fact.entity for fact in facts()})
    return frozenset(name for name, times in count.items() if times == 1)


def statement(fact: Fact) -> str:
    """Return the sentence that states a fact."""
    answer = fact.aliases[-1] if fact.relation == "city" else fact.answer  # "in the United States"
    sentence = RELATIONS[fact.relation][1].format(x=fact.entity.in_text, y=answer)
    return sentence[0].upper() + sentence[1:]


def question(fact: Fact) -> str:
    """Return the question that asks for a fact."""
    return RELATIONS[fact.relation][0].format(x=fact.entity.in_text)


def choice_tasks(pool: Pool, subjects: Iterable[str], count: int) -> list[Task]:
    """Return up to `count` four-choice questions, subjects in turn, each letter right equally often."""
    asked = defaultdict(int)
    tasks = []
    for item in pool.take([SUBJECTS[subject] for subject in subjects], count):
        relation, text, right, wrong, reasoning, key = _choice(item, pool)
        place = asked[relation] % len(LETTERS)
        asked[relation] += 1
        texts = pool.random.sample(wrong, len(LETTERS) - 1)
        texts.insert(place, right)
        tasks.append(Task("choice", text, LETTERS[place], reasoning, (key,), context=tuple(texts)))
    return tasks


def _choice(item: Fact | Entity | Problem, pool: Pool) -> tuple[str, str, str, list[str], tuple[str, ...], str]:
    """Return relation, question, right option, wrong options, reasoning and key of a choice question."""
    if isinstance(item, Fact):
        return (
            item.relation,
            question(item),
            item.answer,
            pool.wrong_answers(item),
            (statement(item),),
            item.key,
        )
    if isinstance(item, Entity):
        text = f"Which of these is {KINDS[item.kind]}?"
        reason = f"{item.name[0].upper()}{item.name[1:]} is {KINDS[item.kind]}."
        return "kind", text, item.name, pool.other_things(item), (reason,), f"{item.kind}:{item.name}:kind"
    near = {item.answer + step for step in (-10, -2, -1, 1, 2, 10)} | {2 * item.answer}
    wrong = [str(number) for number in sorted(near - {item.answer}) if number > 0]
    return "short_problem", item.question, str(item.answer), wrong, item.steps, item.question


def problem_tasks(pool: Pool, count: int) -> list[Task]:
    """Return up to `count` word problems with worked steps."""
    return [
        Task("problem", item.question, str(item.answer), item.steps, (item.question,))
        for item in pool.take(["problem"], count)
    ]


def closed_tasks(pool: Pool, count: int) -> list[Task]:
    """Return up to `count` closed-book questions with the accepted answers."""
    return [
        Task("closed", question(item), item.answer, (statement(item),), (item.key,), aliases=item.aliases)
        for item in pool.take(RELATIONS, count)
        if not set(".,") & set(item.answer)  # lm-eval's triviaqa ends an answer at either
    ]


def grounded_tasks(pool: Pool, count: int) -> list[Task]:
    """Return up to `count` questions with three or four references, answered with citation marks.

    One in four asks for two facts of an entity. The references that do not answer are about another relation
    of the entity or the same relation of other entities.
    """
    related, alike = defaultdict(list), defaultdict(list)
    for fact in pool.facts:
        related[fact.entity].append(fact)
        alike[fact.relation].append(fact)
    tasks = []
    for fact in pool.take(RELATIONS, count):
        same = [other for other in related[fact.entity] if other.relation != fact.relation]
        asked = [fact]
        if same and pool.random.random() < 0.25:
            asked.append(pool.random.choice(same))
        noise = [other for other in same if other not in asked][:1]
        noise += pool.random.sample([o for o in alike[fact.relation] if o.entity != fact.entity], 2)
        references = [*asked, *noise][: pool.random.choice((3, 4))]
        pool.random.shuffle(references)
        cited = [f"{statement(one).rstrip('.')}[{references.index(one) + 1}]." for one in asked]
        first, *more = (question(one) for one in asked)
        text = " And ".join([first, *(other[0].lower() + other[1:] for other in more)])
        texts = tuple(statement(one) for one in references)
        keys = tuple(one.key for one in asked)
        short = " and ".join(one.answer for one in asked)
        tasks.append(Task("grounded", text, " ".join(cited), (), keys, context=texts, aliases=(short,)))
    return tasks

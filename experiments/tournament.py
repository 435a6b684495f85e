"""A tournament between answers:  python -m experiments.tournament data=oasst1 method=qdylora tournament=ranks

Contestants answer the prompts, a judge compares every two answers in both orders, the verdicts become ratings. Killed
and started again it goes on; no verdict is asked twice. In outputs/<scale>/tournament/<name>/:
    answers/         the contestants' answers
    verdicts.jsonl   every verdict
    human/           put here what the page for human raters saved (see experiments.rate)
    record.json, ratings.md, .csv, ranks.svg, .png
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis.chat import judges_table, order_table, tournament_table
from analysis.layout import Table, to_csv, to_markdown
from analysis.rank_chart import rank_chart
from analysis.style import save
from analysis.verdicts import frame
from experiments.cell import Cell, environment, note
from experiments.chat.answering import Answers
from experiments.chat.asking import about, ask_all, estimate, report
from experiments.chat.judges import Endpoint, Local, api_key
from experiments.chat.matches import Match, Verdicts, schedule
from experiments.chat.page import human_verdicts
from experiments.chat.prompts import OWN_PROMPTS, load_named
from experiments.cli import command, quiet
from experiments.files import write_json
from experiments.schema import Config


def folder(config: Config) -> Path:
    return Path(config.outputs) / config.scale / "tournament" / config.tournament.name


def matches(cell: Cell) -> list[Match]:
    """The tournament's matches, with the contestants' answers, which are generated if they are not there yet."""
    t = cell.config.tournament
    prompts = load_named("tournament.prompts", t.prompts or str(OWN_PROMPTS), t.limit)
    return schedule(prompts, Answers(cell, folder(cell.config) / "answers", prompts).all())


def judge(config: Config, scheduled: list[Match]) -> int:
    """Ask what has not been asked; returns how many matches stay without an answer."""
    settings = config.judge
    if settings.kind == "none":
        return 0
    with Verdicts(folder(config) / "verdicts.jsonl").writing() as verdicts:
        before = verdicts.of(about(settings))
        known = {line["match"] for line in before}
        missing = [match for match in scheduled if match.key not in known]
        if not missing:
            return 0
        note(estimate(missing, settings, before))
        judging = Endpoint(settings) if settings.kind == "endpoint" else Local(settings, Path(config.outputs) / "cache")
        outcome = ask_all(missing, judging.ask, settings, verdicts)
    report(outcome)
    return outcome.open + outcome.refused


def show(config: Config, scheduled: list[Match]) -> None:
    """Print the ratings, order effects and agreement, and write them, the chart over ranks and the record."""
    keys, here = {match.key for match in scheduled}, folder(config)
    lines = Verdicts(here / "verdicts.jsonl").lines() + human_verdicts(here)
    lines = [line for line in lines if line["match"] in keys]
    verdicts = frame(lines)
    if verdicts.verdict.notna().any():
        found = tables(config, verdicts)
        (here / "ratings.md").write_text("\n".join(map(to_markdown, found)), encoding="utf-8")
        (here / "ratings.csv").write_text("\n".join(map(to_csv, found)), encoding="utf-8")
        print("\n".join(map(to_markdown, found)))
        if chart := rank_chart(verdicts, entrants(config)):
            save(chart, "ranks", here)
    else:
        note("no verdict was given, so there is nothing to rate")
    counts = {str(name): len(part) for name, part in verdicts.groupby("judge")}
    settings = Cell(config).plain_config
    record = {"tournament": settings["tournament"], "judge": settings["judge"], "seed": config.seed, "verdicts": counts}
    write_json(here / "record.json", record | environment())
    note(f"written to {here}: verdicts.jsonl, ratings.md and .csv, record.json")


def entrants(config: Config) -> dict[str, int | None]:
    """Contestants that are one model at a rank, or without an adapter (None)."""
    who = config.tournament.contestants
    return {name: c.rank for name, c in who.items() if c.answers is None and c.adapter is None}


def tables(config: Config, verdicts: pd.DataFrame) -> list[Table]:
    names = ", ".join(config.tournament.contestants)
    title = f"Tournament {config.tournament.name} (scale {config.scale}: {names})"
    by_judge = {name: part for name, part in verdicts.groupby("judge")}
    found = [tournament_table(verdicts, title), order_table(by_judge), judges_table(verdicts)]
    return [table for table in found if table]


def main(config: Config) -> int:
    quiet()
    if config.judge.kind == "endpoint":
        api_key(config.judge)  # refused now, not when the answers have been generated
    scheduled = matches(Cell(config))
    left = judge(config, scheduled)
    show(config, scheduled)
    return int(left > 0)


if __name__ == "__main__":
    command(main)

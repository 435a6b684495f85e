"""QLoRA's released verdicts give its printed tables."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import published
from analysis.layout import to_markdown
from analysis.qlora_chat import agreement, as_verdicts, benchmarks, elo_table, main, score_table
from analysis.relative import percentage
from analysis.verdicts import qlora_pairwise, qlora_relative, system


@pytest.fixture(scope="module")
def ratings(shared):
    return shared / "data" / "qlora_ratings"


@pytest.fixture(scope="module")
def rated(ratings):
    return benchmarks(ratings, orders=400)


def test_every_guanaco_cell_of_table_6_is_the_printed_one(ratings):
    groups = dict(list(qlora_relative(ratings).groupby("system")))
    printed = published.qlora_table6().set_index("system")
    guanaco = [name for name in printed.index if name.startswith("guanaco")]
    assert len(guanaco) == 4
    for name in guanaco:
        found = percentage(groups[name])
        ours = [found.reference_first, found.system_first, found.mean, found.printed_interval]
        np.testing.assert_allclose(
            np.round(ours, 1), printed.loc[name, ["reference_first", "system_first", "mean", "interval"]].astype(float)
        )


def test_the_other_cells_of_table_6_differ_only_where_the_table_says(ratings):
    groups = dict(list(qlora_relative(ratings).groupby("system")))
    off = set()
    for row in published.qlora_table6().itertuples():
        found = percentage(groups[row.system])
        ours = np.round([found.reference_first, found.system_first, found.mean, found.printed_interval], 1)
        if np.abs(ours - [row.reference_first, row.system_first, row.mean, row.interval]).max() > 0.1001:
            off.add(row.system)
    assert off == {"gpt-4", "open-assistant-33b", "alpaca-13b"}


def test_elo_has_the_printed_order_on_both_benchmarks(rated):
    assert [b.name for b in rated] == ["vicuna", "oa"] and all(b.in_printed_order for b in rated)
    vicuna, oa = rated
    assert np.abs(oa.off(oa.elo.rating)).max() < 8  # 400 orders: +-5
    gap = vicuna.off(vicuna.elo.rating)
    assert np.sort(np.abs(gap))[-2] < 12 and gap.max() == pytest.approx(27, abs=6)
    assert "Largest difference: gpt-4 on vicuna" in to_markdown(elo_table(rated))


def test_gpt4_favours_the_first_answer_and_agrees_with_humans_as_the_paper_says(rated, ratings):
    table = agreement(rated, qlora_relative(ratings))
    cells = {row.labels: row.cells for row in table.blocks[0].rows}
    assert cells["the same without GPT-4's answers", "humans, Table 7 as printed"][1].value == pytest.approx(
        0.43, abs=0.005
    )
    text = to_markdown(score_table(qlora_relative(ratings)))
    assert text.count("| printed ") == 16 and "guanaco-65b" in text


def test_a_clone_of_the_repository_reads_like_the_condensed_tables(tmp_path, ratings):
    folder = tmp_path / "eval" / "ratings-gpt4"
    pairs = pd.read_csv(ratings / "pairwise_gpt4.csv", dtype={"question_id": str}).query("benchmark == 'vicuna'")
    endings = {"guanaco": "-vicuna-generations-topp0.9-temp0.7", "": ""}
    (folder / "vicuna" / "pairwise").mkdir(parents=True)
    for (a, b), rows in pairs.groupby(["model_a", "model_b"]):
        name = "-vs-".join(m + endings["guanaco"] if "guanaco" in m else f"answer-{m}" for m in (a, b))
        lines = [json.dumps({"question_id": int(r.question_id), "score": r.verdict}) for r in rows.itertuples()]
        (folder / "vicuna" / "pairwise" / f"{name}-gpt-4-reviewer-threeclass.jsonl").write_text("\n".join(lines))
    scores = pd.read_csv(ratings / "relative_gpt4.csv", dtype={"question_id": str})
    (folder / "vicuna" / "relative-gpt-3.5").mkdir()
    for (a, b), rows in scores.groupby(["model_a", "model_b"]):
        name = "-vs-".join(
            m if m in ("gpt-3.5", "gpt4", "bard", "vicuna-13b") else m + endings["guanaco"] for m in (a, b)
        )
        lines = [json.dumps({"question_id": r.question_id, "score": [r.score_a, r.score_b]}) for r in rows.itertuples()]
        (folder / "vicuna" / "relative-gpt-3.5" / f"{name}-gpt4-reviewer.jsonl").write_text("\n".join(lines))
    order = ["prompt", "first", "second"]
    ours, theirs = (
        qlora_pairwise(root)["vicuna"].sort_values(order).reset_index(drop=True) for root in (ratings, tmp_path)
    )
    pd.testing.assert_frame_equal(ours, theirs)
    order = ["system", "prompt", "reference_first"]
    ours, theirs = (qlora_relative(root).sort_values(order).reset_index(drop=True) for root in (ratings, tmp_path))
    pd.testing.assert_frame_equal(ours, theirs)


def test_scores_become_verdicts_in_the_order_shown():
    columns = ["system", "prompt", "reference_first", "score", "reference"]
    rows = [("x", "1", True, 9, 8), ("x", "2", False, 9, 8), ("x", "3", True, 7, 8), ("x", "4", False, 8, 8)]
    found = as_verdicts(pd.DataFrame([*rows, ("x", "5", True, None, None)], columns=columns))
    assert list(found["first"]) == ["gpt-3.5", "x", "gpt-3.5", "x", "gpt-3.5"]
    assert list(found.verdict[:4]) == [2, 1, 1, 3] and found.verdict.isna()[4]


def test_names_of_released_files():
    assert [system(name) for name in ("30b-flan", "gpt35", "vicuna-13b", "7b-guanaco", "bard")] == [
        "flan-v2-33b", "gpt-3.5", "vicuna-13b", "guanaco-7b", "bard",
    ]  # fmt: skip


def test_a_folder_without_ratings_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["qlora_chat", str(tmp_path)])
    assert main() == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds neither")

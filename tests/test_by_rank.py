"""Tables 2 and 3, the semi-sorted study and the claims, from records alone."""

import sys
from pathlib import Path

import pytest

from analysis import published
from analysis.claims import claims, claims_table
from analysis.layout import to_csv, to_latex, to_markdown
from analysis.records import Record, heldout_items, items, load
from analysis.semi_sorted import semi_sorted
from analysis.stats import Bootstrap
from analysis.tables import TABLES, table2, table3

GOLDEN = Path(__file__).parent / "golden"
HOW = Bootstrap(resamples=2000)
QUICK = Bootstrap(resamples=200)
sys.path.insert(0, str(GOLDEN))
import make  # noqa: E402


@pytest.fixture(scope="module")
def records():
    return {name: load(GOLDEN / name) for name in make.MAKERS}


@pytest.fixture(scope="module")
def tables():
    return make.made_tables()


@pytest.mark.parametrize("render, suffix", [(to_markdown, "md"), (to_latex, "tex"), (to_csv, "csv")])
@pytest.mark.parametrize("name", ["table2", "table3", "semi_sorted", "claims"])
def test_golden_table_byte_for_byte(tables, name, render, suffix):
    assert render(tables[name]).encode() == (GOLDEN / f"{name}.{suffix}").read_bytes()


def changed(record, **raw):
    return Record(record.folder, {**record.raw, **raw})


def cells(table, block, *labels):
    """Texts of the one row of a block whose labels are these."""
    rows = next(b.rows for b in table.blocks if b.title.startswith(block))
    (row,) = [row for row in rows if row.labels == labels]
    return dict(zip(table.header[len(labels) :], map(str, row.cells), strict=True))


def named(records, *parts):
    (found,) = [record for record in records if all(part in f"-{record.name}-" for part in parts)]
    return found


def test_a_cut_has_scores_of_its_own_and_the_whole_adapter_keeps_its_column(records, tables):
    record = named(records["table2"], "gsm8k", "-qlora-")
    row = cells(tables["table2"], "Score", "smollm2-135m", "GSM8K", "8")
    for column, results in (
        ("QLoRA, alpha/r", record.raw),
        ("QLoRA, alpha/b", record.raw["cuts"]["truncate_alpha_over_b"]),
        ("QLoRA, SVD", record.raw["cuts"]["svd"]),
    ):
        score = results["tasks"]["gsm8k"]["splits"]["test"]["ranks"]["8"]["value"]
        assert row[column].startswith(f"{100 * score:.1f} [")
    assert "QLoRA, SVD" not in tables["table3"].header and "QLoRA" in tables["table3"].header


def test_bleu_is_the_corpus_score_not_the_mean_of_sentences(records, tables):
    record = named(records["table2"], "webglm", "-qdylora-")
    split = record.split("webglm", "test")
    row = cells(tables["table2"], "Score", "smollm2-135m", "WebGLM", "4")
    assert row["QDyLoRA"].startswith(f"{split['ranks']['4']['value']:.1f} [")
    assert items(record, "webglm", "test")[4].mean() == pytest.approx(split["ranks"]["4"]["value"] / 100, abs=1e-7)


def test_differences_are_of_equal_ranks_and_marked_after_correction(records, tables):
    new, old = (named(records["table2"], "gsm8k", f"-{method}-") for method in ("qdylora", "qlora"))
    for rank in (1, 32, 64):
        scores = [record.split("gsm8k", "test")["ranks"][str(rank)]["value"] for record in (new, old)]
        row = cells(tables["table2"], "QDyLoRA minus", "smollm2-135m", "GSM8K", str(rank))
        assert row["QLoRA, alpha/r"].startswith(f"{100 * (scores[0] - scores[1]):+.1f} [")
        assert row["QLoRA, alpha/r"].endswith("*") == (rank < 64) and row["QDyLoRA"] == ""


def test_oom_met_and_oom_forecast_are_told_apart(tables):
    met = cells(tables["table3"], "Score", "smollm2-135m", "TriviaQA", "16")
    forecast = cells(tables["table3"], "Score", "llama2-13b", "GSM8K", "16")
    assert (met["DyLoRA"], forecast["DyLoRA"]) == ("OOM", "OOM forecast") and met["QDyLoRA"][0].isdigit()
    notes = "\n".join(tables["table3"].footnotes)
    assert "OOM: smollm2-135m--triviaqa--dylora--seed0 ran out of memory: CUDA out of memory" in notes
    assert "OOM forecast: llama2-13b--gsm8k--dylora--seed0 was not run: needs 40.1 GB" in notes


def test_the_papers_cells_stand_beside_ours(records):
    table = table3(records["table3"], published.qdylora_table3(), QUICK)
    block = table.blocks[-1]
    assert block.title.startswith("Published, not run here: QDyLoRA, arXiv 2402.10462 v1, Table 3")
    assert len(block.rows) == 3 * 7
    texts = {row.labels: [str(cell) for cell in row.cells] for row in block.rows}
    assert texts["llama-7b", "GSM8K", "8"] == ["19.94", "0.00", "16.76"]
    assert texts["llama2-13b", "GSM8K", "64"] == ["OOM", "21.08", "22.08"]
    assert any("not run at this scale: llama-7b. Run: llama2-13b, smollm2-135m" in note for note in table.footnotes)


@pytest.mark.parametrize("name", ["table2", "table3"])
def test_mixed_budgets_are_refused_with_the_names(records, name):
    one, *others = records[name]
    asked = {**one.raw["budget"], "asked": {"steps": 80, "examples": 640, "tokens": None}}
    with pytest.raises(ValueError, match=f"budget asked for: steps.*80: {one.name}"):
        TABLES[name]([changed(one, budget=asked), *others])


@pytest.mark.parametrize("name", ["table2", "table3", "semi_sorted"])
def test_mixed_task_versions_are_refused_with_the_names(records, name):
    one = next(record for record in records[name] if record.done and record.cell["method"] == "qdylora")
    others = [record for record in records[name] if record is not one]
    ((task, about),) = one.tasks.items()
    with pytest.raises(ValueError, match=f"{task} version.*'9': {one.name}"):
        TABLES[name]([changed(one, tasks={task: about | {"version": "9"}}), *others])


@pytest.mark.parametrize("name", ["table2", "table3", "semi_sorted"])
def test_no_records_no_table_and_the_order_of_records_does_not_matter(records, tables, name):
    make_table = {"table2": table2, "table3": lambda r, how: table3(r, how=how), "semi_sorted": semi_sorted}[name]
    assert to_csv(make_table(records[name][::-1], HOW)) == to_csv(tables[name])
    with pytest.raises(ValueError, match="no records"):
        make_table([], HOW)


def test_failures_are_numbered_through_the_table(records):
    lost = [changed(r, status="failed", reason=f"why {r.cell['data']}") for r in records["table2"]
            if r.cell["method"] == "qlora"]  # fmt: skip
    rest = [r for r in records["table2"] if r.cell["method"] != "qlora"]
    table = table2([*lost, *rest], QUICK)
    assert cells(table, "Score", "smollm2-135m", "GSM8K", "8")["QLoRA"] == "failed [1]"
    assert cells(table, "Score", "smollm2-135m", "WebGLM", "8")["QLoRA"] == "failed [2]"
    assert [n for n in table.footnotes if " failed: " in n] == [
        "[1] smollm2-135m--gsm8k--qlora--seed0 failed: why gsm8k",
        "[2] smollm2-135m--webglm--qlora--seed0 failed: why webglm",
    ]


# Semi-sorted


def test_budgets_are_swept_there_and_only_there(records, tables):
    rows = {row.labels[2:] for row in tables["semi_sorted"].blocks[0].rows}
    assert ("uniform 1..64", "20") in rows and ("geometric, p = 0.15", "80") in rows and len(rows) == 9
    with pytest.raises(ValueError, match="budget asked for"):
        table2([changed(r, cell=r.cell | {"table": "table2"}) for r in records["semi_sorted"]])


def test_held_out_items_average_to_the_recorded_loss_with_its_standard_error(records):
    record = records["semi_sorted"][0]
    values = heldout_items(record)
    for rank, score in record.raw["heldout"]["ranks"].items():
        assert values[int(rank)].mean() == pytest.approx(score["value"], abs=1e-6)
    with pytest.raises(ValueError, match="leaves the folder"):
        heldout_items(changed(record, heldout=record.raw["heldout"] | {"items": "../x"}))


# Claims


def verdicts(records, **kwargs):
    return {claim.name: claim for claim in claims(records, how=QUICK, **kwargs)}


def all_of(records):
    return [record for some in records.values() for record in some]


def test_every_claim_has_a_verdict_and_an_unrun_one_has_no_number(records):
    found = verdicts(records["semi_sorted"])
    assert list(found) == ["C1", "C2", "C2a", "C2b", "C3", "C4", "C4b", "C5 steps", "C5 time", "C5 memory"]
    for name in ("C1", "C2", "C2a", "C2b", "C3", "C5 steps", "C5 time", "C5 memory"):
        claim = found[name]
        assert (claim.verdict, claim.effect, claim.interval, claim.n) == ("not decided at this scale", None, None, 0)
    assert found["C4"].effect is not None and found["C4"].command == "make semi_sorted SCALE=mini"


def test_c2_is_supported_refuted_or_open_as_the_items_say(records):
    gsm8k = [r for r in records["table2"] if r.cell["data"] == "gsm8k"]
    new, old = (named(gsm8k, f"-{method}-") for method in ("qdylora", "qlora"))
    bare = changed(old, cuts={})
    won = verdicts([new, bare])["C2"]
    assert won.verdict == "supported" and won.effect > 0 and won.interval[0] > 0 and won.n == 30
    assert "better at 6 and worse at 0" in won.note
    swapped = [changed(r, cell=r.cell | {"method": m}, name=r.name + m) for r, m in ((new, "qlora"), (bare, "qdylora"))]
    lost = verdicts(swapped)["C2"]
    assert lost.verdict == "not supported" and lost.effect < 0
    twins = [changed(r, cell=r.cell | {"method": m}, name=m) for r, m in ((bare, "qlora"), (bare, "qdylora"))]
    same = verdicts(twins)["C2"]
    assert same.verdict == "not decided at this scale" and same.effect == 0


FORECASTS = [
    {"model": "llama2-13b", "method": "dylora", "gpu_bytes": 32 * 2**30, "needed_bytes": 34 * 2**30},
    {"model": "llama2-13b", "method": "qdylora", "gpu_bytes": 32 * 2**30, "needed_bytes": 14 * 2**30},
    {"model": "falcon-40b", "method": "qdylora", "gpu_bytes": 32 * 2**30, "needed_bytes": 28 * 2**30},
]


def test_c3_needs_all_three_forecasts(records):
    some = records["table2"]
    found = verdicts(some, memory=FORECASTS)["C3"]
    assert found.verdict == "supported" and found.effect == pytest.approx(2) and "34.0" in found.note
    assert verdicts(some, memory=FORECASTS[:2])["C3"].verdict == "not decided at this scale"
    too_large = [*FORECASTS[:2], FORECASTS[2] | {"needed_bytes": 35 * 2**30}]
    refuted = verdicts(some, memory=too_large)["C3"]
    assert refuted.verdict == "not supported" and refuted.effect == pytest.approx(-3)
    other_gpu = [forecast | {"gpu_bytes": 80 * 2**30} for forecast in FORECASTS]
    assert verdicts(some, memory=other_gpu)["C3"].verdict == "not decided at this scale"


def test_c5_is_counted_from_what_was_spent(records):
    found = verdicts(records["table2"])
    assert found["C5 steps"].effect == pytest.approx(1 / 7) and found["C5 steps"].verdict == "supported"
    pairs = [[named(records["table2"], data, f"-{m}-").raw["budget"]["spent"]["seconds"] for m in ("qdylora", "qlora")]
             for data in ("webglm", "gsm8k")]  # fmt: skip
    mean = (pairs[0][0] / pairs[0][1] * pairs[1][0] / pairs[1][1]) ** 0.5 / 7
    assert found["C5 time"].effect == pytest.approx(mean) and found["C5 time"].n == 2
    one = verdicts([r for r in records["table2"] if r.cell["data"] == "gsm8k"])["C5 time"]
    assert one.interval is None and one.verdict == "not decided at this scale"


def test_claims_refuse_two_scales_and_mixed_budgets(records):
    other = changed(records["table2"][0], cell=records["table2"][0].cell | {"scale": "paper"})
    with pytest.raises(ValueError, match="one scale, not 2: mini, paper"):
        claims([*records["table2"], other])
    one, *others = records["table3"]
    asked = {**one.raw["budget"], "asked": {"steps": 80, "examples": 640, "tokens": None}}
    with pytest.raises(ValueError, match=f"80: {one.name}"):
        claims([changed(one, budget=asked), *others])


def test_a_study_whose_variants_differ_in_budget_leaves_the_claims_as_they_are(records):
    one = records["table3"][0]
    budgets = [one.raw["budget"] | {"asked": {"steps": steps, "examples": None, "tokens": None}} for steps in (32, 64)]
    epochs = [changed(one, budget=budget, cell=one.cell | {"table": "study_epochs"}) for budget in budgets]
    assert claims([*all_of(records), *epochs], how=QUICK) == claims(all_of(records), how=QUICK)


def test_the_same_seed_gives_the_same_claims(records):
    assert claims(all_of(records), how=QUICK) == claims(all_of(records)[::-1], how=QUICK)
    text = to_markdown(claims_table(claims(all_of(records), how=QUICK), "mini"))
    assert text.count("Rebuild: make") == 10

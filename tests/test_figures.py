"""Figures draw what the records and logs say, the same way every time."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis import plots
from analysis.curves import panels, updates
from analysis.figures import of_records, pictures
from analysis.forecasts import forecasts
from analysis.records import cells, items, load, log, tables
from analysis.stats import mean_at
from analysis.style import LOOKS, OTHERS, inline, label_ends, looks, panel, save, svg
from experiments.keep import RESULTS
from tests.golden_outputs import ALPACA, FORECAST, GOLDEN, HOW, RANKS, change, line, make


@pytest.fixture(scope="module")
def scale(tmp_path_factory):
    return make(tmp_path_factory.mktemp("outputs") / "mini")


@pytest.fixture(scope="module")
def drawn(scale):
    return {picture.name: picture for picture in pictures(scale, HOW)}


def data(axes, label):
    """x and y of the one line of that label."""
    (found,) = [one for one in axes.lines if one.get_label() == label]
    return found.get_xdata(), found.get_ydata()


def band(axes):
    """Corners of the first band: set of (x, y) rounded."""
    return {(round(x, 6), round(y, 6)) for x, y in axes.collections[0].get_paths()[0].vertices}


def record(scale, name):
    return next(one for one in load(scale / "table1") if one.name == name)


@pytest.mark.parametrize("method, label", [("qlora", "QLoRA"), ("qdylora", "QDyLoRA")])
def test_score_against_rank_is_the_records_score(scale, drawn, method, label):
    scores = record(scale, ALPACA.replace("qdylora", method)).split("mmlu", "test")["ranks"]
    x, y = data(drawn["table1--smollm2-135m--alpaca--40-steps--mmlu--rank"].figure.axes[0], label)
    assert list(x) == RANKS
    np.testing.assert_allclose(y, [100 * scores[str(rank)]["value"] for rank in RANKS], atol=1e-4)


def test_a_band_is_the_tables_interval(scale):
    (shown, *_) = panels([record(scale, ALPACA)], HOW)
    (curve,) = shown.curves
    frame = items(record(scale, ALPACA), "mmlu", "test")
    for place, rank in enumerate(RANKS):
        one = mean_at([frame], rank, HOW)
        assert (curve.lows[place], curve.highs[place]) == (100 * one.low, 100 * one.high)
        assert {(rank, round(100 * one.low, 6)), (rank, round(100 * one.high, 6))} <= band(
            plots.quality_against_rank(shown).axes[0]
        )


def test_heldout_loss_averages_seeds_and_its_interval_holds_their_spread(scale):
    records = [one for one in load(scale / "table1") if one.name.startswith("smollm2-135m--oasst1--qdylora")]
    assert len(records) == 3
    losses = np.array([[one.raw["heldout"]["ranks"][str(rank)]["value"] for rank in RANKS] for one in records])
    (curve,) = panels(records, HOW)[-1].curves
    np.testing.assert_allclose(curve.values, losses.mean(0))
    wide = 1.96 * np.sqrt(0.04**2 + losses.var(0, ddof=1) / 3)
    np.testing.assert_allclose(np.subtract(curve.highs, curve.values), wide)
    _, y = data(plots.quality_against_rank(panels(records, HOW)[-1]).axes[0], "QDyLoRA")
    np.testing.assert_allclose(y, losses.mean(0))


def test_a_static_method_is_marked_at_its_own_rank_and_the_other_at_its_best(scale):
    shown = next(one for one in panels(load(scale / "table1"), HOW) if one.name.endswith("alpaca--40-steps--mmlu"))
    qlora, qdylora = shown.curves
    assert qlora.ranks[qlora.marked] == 64
    assert qdylora.values[qdylora.marked] == max(qdylora.values)
    loss = next(
        one for one in panels(load(scale / "table1"), HOW) if one.name.endswith("alpaca--40-steps--heldout")
    ).curves[1]
    assert loss.values[loss.marked] == min(loss.values)
    axes = plots.quality_against_rank(shown).axes[0]
    marked = [(one.get_xdata()[0], one.get_ydata()[0]) for one in axes.lines if one.get_markersize() == 9]
    assert marked == [(64, qlora.values[-1]), (qdylora.ranks[qdylora.marked], max(qdylora.values))]


def test_guessing_and_the_untrained_loss_are_drawn_as_levels(drawn):
    axes = drawn["table1--smollm2-135m--alpaca--40-steps--mmlu--rank"].figure.axes[0]
    assert set(data(axes, "guessing")[1]) == {25}
    axes = drawn["table1--smollm2-135m--alpaca--40-steps--heldout--rank"].figure.axes[0]
    assert set(data(axes, "untrained")[1]) == {2.31}


def test_another_cut_of_a_static_adapter_is_a_line_of_its_own(scale):
    one = record(scale, ALPACA.replace("qdylora", "qlora"))
    ranks = {str(rank): {"value": 1 + 1 / rank, "stderr": 0.1} for rank in RANKS}
    one.raw["cuts"] = {"svd": {"heldout": {"ranks": ranks, "n": 24}, "tasks": one.tasks}}
    plain, svd = panels([one], HOW)[-1].curves
    assert (plain.label, svd.label) == ("QLoRA", "QLoRA, SVD")
    assert svd.values == tuple(1 + 1 / rank for rank in RANKS) != plain.values
    assert plain.trained and not svd.trained


def test_adapter_size_and_memory_are_the_records(scale, drawn):
    x, _ = data(drawn["table1--smollm2-135m--alpaca--40-steps--mmlu--size"].figure.axes[0], "QDyLoRA")
    assert list(x) == RANKS  # a MiB a rank
    axes = drawn["table1--smollm2-135m--alpaca--40-steps--heldout--memory"].figure.axes[0]
    places = {bars.get_label(): bars.lines[0].get_xdata()[0] for bars in axes.containers}
    loss = record(scale, ALPACA).raw["heldout"]["ranks"]
    best = min(loss, key=lambda rank: loss[rank]["value"])
    assert places == {"QLoRA, rank 64": 5, f"QDyLoRA, rank {best}": 4}
    assert "table1--smollm2-135m--oasst1--40-steps--mmlu--size" not in drawn  # its records do not say


def test_updates_counted_and_expected_are_the_records_means(scale, drawn):
    axes = drawn["table1--smollm2-135m--640--updates"].figure.axes[0]
    rows, counted = data(axes, "QDyLoRA")
    assert list(rows) == list(range(1, 65)) and list(counted) == [10 * (65 - row) for row in rows]
    assert list(data(axes, "QDyLoRA, expected")[1]) == list(counted)
    one = record(scale, ALPACA)
    other = record(scale, ALPACA)
    other.raw["updates"] = [0] * 64
    del other.raw["expected_updates"]
    (mean,) = updates([one, other])
    assert mean.counted == tuple(count / 2 for count in one.raw["updates"]) and mean.expected == ()


def test_training_curves_are_the_log(scale, drawn):
    lines = log(scale / "table1" / ALPACA)
    loss, rank = drawn[f"table1--{ALPACA}--training"].figure.axes
    assert [list(one) for one in data(loss, "training loss")] == [[1, 2, 3, 4, 5, 6], [one["loss"] for one in lines]]
    seen = set(zip(*data(rank, "rank drawn"), strict=True))
    assert seen == {(one["step"], b) for one in lines for b in one["ranks"]} and len(seen) == 12
    axes = drawn[f"table1--{ALPACA}--heldout"].figure.axes[0]
    assert [list(one) for one in data(axes, "rank 8")] == [[2, 4, 6], [1 / 2, 1 / 4, 1 / 6]]


def test_speed_and_memory_are_the_logs(scale, drawn):
    picture = drawn[f"table1--{ALPACA}--resources"]
    speed, memory = picture.figure.axes
    assert [list(one) for one in data(speed, "tokens a second")] == [[1, 2, 3, 4, 5, 6], [100 * i for i in range(1, 7)]]
    assert list(data(memory, "peak memory")[1]) == [1, 2, 3, 4, 5, 6]
    assert picture.alt == "Median 350 tokens a second. Peak memory 6.00 GiB."


def test_an_older_log_without_memory_is_drawn_without_it():
    old = [line(step) for step in (1, 2)]
    del old[0]["peak_memory_bytes"]
    memory = plots.resources(old).axes[1]
    assert np.isnan(data(memory, "peak memory")[1][0]) and data(memory, "peak memory")[1][1] == 2


def test_a_log_that_was_cut_off_is_read_to_its_last_whole_line(tmp_path):
    assert log(tmp_path) == []
    (tmp_path / "log.jsonl").write_text(json.dumps(line(1)) + '\n{"step": 2, "lo')
    assert log(tmp_path) == [line(1)]


def test_memory_is_stacked_by_part_against_gpus():
    axes = plots.memory_by_part(FORECAST).axes[0]
    ends: dict[str, float] = {}
    for bars, part in zip(axes.containers, ("base_rest", "activations", "base_4bit"), strict=True):
        assert bars.get_label() == plots.PARTS.get(part, part)
        for bar, label in zip(bars, FORECAST, strict=True):
            assert bar.get_x() == pytest.approx(ends.get(label, 0))
            assert bar.get_width() == pytest.approx(FORECAST[label].get(part, 0) / 2**30)
            ends[label] = bar.get_x() + bar.get_width()
    assert ends == {"llama2-13b, DyLoRA": 31, "falcon-40b, QDyLoRA": 26}
    assert [one.get_xdata()[0] for one in axes.lines] == [16, 24, 32]  # up to the first that holds all


def test_forecasts_are_read_as_configured_and_a_broken_one_is_named(scale, tmp_path, drawn):
    falcon, llama = forecasts(scale)
    assert {one.label: one.parts for one in (llama, falcon)} == FORECAST
    assert falcon.for_claims() == {
        "model": "falcon-40b", "method": "qdylora", "gpu_bytes": 32 * 2**30, "needed_bytes": 26 * 2**30,
    }  # fmt: skip
    assert "falcon-40b, QDyLoRA: 26.0 GiB" in drawn["forecast--paper"].alt
    (tmp_path / "forecast").mkdir()
    assert forecasts(tmp_path / "mini") == []
    (tmp_path / "forecast" / "x.json").write_text('{"forecasts": {}}')
    with pytest.raises(ValueError, match=r"forecast/x.json: not a memory forecast .*run the forecast again"):
        forecasts(tmp_path / "mini")


def test_every_picture_has_words_for_its_content(drawn):
    assert {picture.kind for picture in drawn.values()} == {
        "Score against rank", "Held-out loss against rank", "Quality against adapter size", "Quality against memory",
        "Updates of each row", "Training", "Speed and memory of training", "Held-out loss in training",
        "Memory by part",
    }  # fmt: skip
    assert all(len(picture.alt) > 20 for picture in drawn.values())
    alt = drawn["table1--smollm2-135m--self_instruct--40-steps--mmlu--rank"].alt
    assert (
        "QDyLoRA: 30 at rank 1, 40 at rank 2" in alt
        and "self_instruct--qlora--seed0: CUDA out of memory at step 1" in alt
    )


def test_the_svg_is_the_same_every_time_and_ids_differ_between_figures(scale, drawn):
    names = ["table1--smollm2-135m--alpaca--40-steps--mmlu--rank", "forecast--paper"]
    again = {picture.name: picture for picture in pictures(scale, HOW)}
    first, second = ([svg(found[name].figure, name) for name in names] for found in (drawn, again))
    assert first == second
    ids = [{part.split('"')[0] for part in inline(text).split(' id="')[1:]} for text in first]
    assert all(ids) and not ids[0] & ids[1]


def test_an_inline_svg_loses_digits_of_its_shapes_and_none_of_its_words(drawn):
    (picture, *_) = drawn.values()
    whole = svg(picture.figure, picture.name)
    text = inline(whole.replace("</svg>", "<text x='0.123456'>0.123456</text></svg>"))
    assert "<text x='0.12'>0.123456</text>" in text and "font-family" not in text
    assert not re.search(r"\.\d{3}", re.sub(r">[^<]*<", "><", text)) and len(text) < 0.8 * len(whole)
    words = [re.findall(r"<text[^>]*>([^<]*)<", one) for one in (whole, text)]
    assert words[0] and words[1] == [*words[0], "0.123456"]


def test_records_that_may_not_be_compared_are_not_drawn_together(scale, tmp_path, capsys):
    folder = Path(shutil.copytree(scale, tmp_path / "mini"))
    change(folder / "table1" / ALPACA, data={"sha256": "another"})
    found = list(pictures(folder, HOW))
    assert {picture.kind for picture in found} == {
        "Training", "Speed and memory of training", "Held-out loss in training",
    }  # fmt: skip
    assert "no figure of table1: records of one table must agree in training data" in capsys.readouterr().err


def test_budgets_are_drawn_apart_and_against_each_other(scale):
    one, more = record(scale, ALPACA), record(scale, ALPACA)
    for view, steps in ((one, 8), (more, 16)):
        view.raw["name"] = f"{ALPACA}--steps{steps}"
        view.raw["budget"] = {"asked": {"steps": steps, "examples": 8 * steps, "tokens": None}}
    more.raw["heldout"] = {"ranks": {str(rank): {"value": 1 / rank, "stderr": 0.1} for rank in RANKS}}
    found = list(of_records([more, one], HOW))
    titles = [picture.title for picture in found if picture.kind == "Held-out loss against rank"]
    assert titles == [f"smollm2-135m, Alpaca, {steps} steps: held-out loss" for steps in (8, 16)]
    (picture,) = [one for one in found if one.kind == "Change with the budget" and "heldout" in one.name]
    assert picture.title == "smollm2-135m, Alpaca, QDyLoRA: held-out loss"
    assert list(data(picture.figure.axes[0], "16 steps")[1]) == [1 / rank for rank in RANKS]
    loss = one.raw["heldout"]["ranks"]
    assert list(data(picture.figure.axes[0], "8 steps")[1]) == [loss[str(rank)]["value"] for rank in RANKS]


def test_a_cell_put_aside_is_not_read(scale, tmp_path):
    folder = Path(shutil.copytree(scale, tmp_path / "mini"))
    cell = folder / "table1" / ALPACA
    shutil.copytree(cell, cell.with_name(f"{ALPACA}~0123456789ab"))
    (folder / "figures").mkdir()
    assert len(load(folder / "table1")) == len(cells(folder / "table1")) == 11
    assert tables(folder) == [folder / "table1"]


def test_looks_differ_by_marker_without_colour_and_stay_with_a_method():
    found = looks(["qlora", "qdylora", "qdylora-anchored", "matryoshka", "adalora"])
    assert found["qdylora"] == looks(["qdylora", "other"])["qdylora"] == LOOKS["qdylora"]
    every = [*LOOKS.values(), *OTHERS]
    assert len({one.marker for one in every}) == len(every)
    assert len({one.marker for one in found.values()}) == len(found)


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.0, 5.0, 10.0], [10.0, 10.0, 9.9]])
def test_names_at_line_ends_keep_a_distance_and_their_order(values):
    _, axes = panel()
    axes.set_ylim(0, 10)
    ends = dict(zip("abc", values, strict=True))
    label_ends(axes, ends, looks("abc"))
    places = {text.get_text(): text.get_position()[1] for text in axes.texts}
    ordered = sorted(ends, key=ends.get)
    gaps = np.diff([places[name] for name in ordered])
    assert (gaps > 0.0749).all()
    assert np.mean(list(places.values())) == pytest.approx(np.mean(values) / 10)


def test_a_dollar_in_a_name_is_a_dollar(scale):
    shown = panels([record(scale, ALPACA)], HOW)[0]
    shown.curves[0].__dict__["name"] = r"$\frac{"
    assert r"$\frac{" in svg(plots.quality_against_rank(shown), "dollar")


def test_a_name_cannot_lead_out_of_the_folder(tmp_path):
    figure, _ = panel()
    assert save(figure, "../../a b/c", tmp_path / "figures") == tmp_path / "figures" / ".._.._a_b_c.svg"
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {".._.._a_b_c.svg", ".._.._a_b_c.png"}


def test_the_command_writes_svg_and_png_and_says_what_is_wrong_in_one_sentence(scale, tmp_path):
    folder = Path(shutil.copytree(scale, tmp_path / "mini"))
    for cell in cells(folder / "table1"):
        if cell.name != ALPACA:
            shutil.rmtree(cell)

    def command(where):
        code = [sys.executable, "-m", "analysis.figures", str(where)]
        return subprocess.run(code, cwd=GOLDEN.parents[2], capture_output=True, text=True)

    done = command(folder)
    assert done.returncode == 0, done.stderr
    written = {file.name for file in (folder / "figures").iterdir()}
    assert len(written) == 2 * len(done.stdout.splitlines()) == 20
    assert {f"table1--{ALPACA}--training.svg", f"table1--{ALPACA}--training.png"} <= written
    done = command(tmp_path / "nothing")
    assert done.returncode == 2 and done.stderr == f"error: no folder of records at {tmp_path / 'nothing'}\n"


def test_many_methods_have_axes_of_their_own_with_the_others_behind():
    records = load(RESULTS / "small/rivals")
    shown = panels(records, HOW)[-1]
    lines = [curve for curve in shown.curves if len(curve.ranks) > 1]
    points = [curve for curve in shown.curves if len(curve.ranks) == 1]
    assert len(lines) > plots.MOST_LINES and points
    figure = plots.quality_against_rank(shown)
    assert len([axes for axes in figure.axes if axes.get_visible()]) == len(lines)
    for axes, curve in zip(figure.axes, lines, strict=False):
        assert axes.get_title(loc="left").replace("\n", " ") == curve.label
        (own,) = [one for one in axes.lines if one.get_marker() == "o"]
        assert own.get_ydata().tolist() == list(curve.values)
        assert (own.get_color() == plots.VERMILLION) == (curve.own is not None)
        grey = {tuple(one.get_ydata()) for one in axes.lines if one.get_color() == plots.GRID}
        assert grey == {other.values for other in lines}
    assert {text.get_text() for text in figure.legends[0].texts} >= {point.label for point in points}

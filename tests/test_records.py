"""Reading and refusing run records."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from analysis.records import check_comparable, frame, item_groups, items, load

GOLDEN = Path(__file__).parent / "golden" / "records"
ALPACA = "smollm2-135m--alpaca--qdylora--seed0"
FAILED = "smollm2-135m--flan_v2--qdylora--seed0"
OOM = "smollm2-135m--self_instruct--qlora--seed0"
ITEMS = "items/mmlu-test.jsonl.gz"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "records"))


def change(folder, name, *path, to):
    """Set raw[path[0]][path[1]]... of one record."""
    file = folder / name / "record.json"
    raw = part = json.loads(file.read_text())
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    file.write_text(json.dumps(raw))


def rewrite_items(folder, edit, name=ALPACA):
    """Replace the lines (dicts) of a record's test items by edit(lines)."""
    path = folder / name / ITEMS
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    path.write_bytes(gzip.compress("\n".join(json.dumps(line) for line in edit(lines)).encode()))


def one(folder, name=ALPACA):
    return next(record for record in load(folder) if record.name == name)


def test_load_finds_every_record_in_order(folder):
    records = load(folder)
    assert len(records) == 11 and [r.name for r in records] == sorted(r.name for r in records)
    record = one(folder)
    assert record.done and record.r_max == 64 and record.cell["data"] == "alpaca"
    assert record.split("mmlu", "test")["n"] == 30 and record.split("mmlu", "dev") is None
    assert record.split("gsm8k", "test") is None and not one(folder, FAILED).done


def test_load_says_when_there_is_no_folder_and_accepts_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of records"):
        load(tmp_path / "missing")
    assert load(tmp_path) == []


@pytest.mark.parametrize("text", ["", '{"schema": 1, "na', "[]", "\xff"])
def test_a_torn_file_is_named_with_what_to_do(folder, text):
    (folder / ALPACA / "record.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{ALPACA}/record.json.*elete.*run the cell again"):
        load(folder)


@pytest.mark.parametrize(
    "path, to, message",
    [
        (["schema"], 2, "schema 2, this code reads 1"),
        (["status"], "finished", "status 'finished' is none of done, oom, failed"),
        (["cell"], {"table": "table1"}, "KeyError\\('model'\\)"),
        (["budget"], None, "TypeError"),
        (["tasks"], None, "AttributeError"),
        (["heldout"], {}, "KeyError\\('ranks'\\)"),
        (["config", "ranks"], {}, "KeyError\\('r_max'\\)"),
        (
            ["tasks", "mmlu", "splits", "test", "ranks"],
            {"0": {"value": 0.1, "stderr": 0.1}},
            "ranks start at 1",
        ),
        (
            ["tasks", "mmlu", "splits", "test", "ranks", "4"],
            {"value": "n/a", "stderr": 0.1},
            "could not convert",
        ),
        (["tasks", "mmlu"], {"splits": {}}, "KeyError\\('version'\\)"),
    ],
)
def test_a_wrong_part_is_refused_by_name(folder, path, to, message):
    change(folder, ALPACA, *path, to=to)
    with pytest.raises(ValueError, match=f"{ALPACA}/record.json: .*{message}"):
        load(folder)


def test_two_folders_of_one_cell_are_refused(folder):
    shutil.copytree(folder / ALPACA, folder / "copy")
    with pytest.raises(ValueError, match=f"both hold the cell {ALPACA}"):
        load(folder)


def test_frame_is_tidy_and_keeps_what_did_not_run(folder):
    table = frame(load(folder))
    done = table[table.status == "done"]
    # 9 finished cells x (held-out loss + 2 splits) x (7 ranks + the untrained model)
    assert len(done) == 9 * 3 * 8 and len(table) == len(done) + 2
    assert set(table[table.status != "done"].name) == {FAILED, "smollm2-135m--self_instruct--qlora--seed0"}
    row = done[(done.name == ALPACA) & (done.task == "mmlu") & (done.split == "test") & (done["rank"] == 8)]
    raw = one(folder).split("mmlu", "test")["ranks"]["8"]
    assert row[["value", "stderr"]].values.tolist() == [[raw["value"], raw["stderr"]]]
    assert row.n.item() == 30 and row.num_fewshot.item() == 5 and bool(row.higher_is_better.item())
    untrained = done[done["rank"].isna()]
    assert set(untrained[untrained.task == "heldout"].value) == {2.31}
    assert set(untrained[untrained.task == "mmlu"].value) == {0.25}


def test_items_are_items_by_ranks(folder):
    values = items(one(folder), "mmlu", "test")
    assert values.shape == (30, 7) and list(values.columns) == [1, 2, 4, 8, 16, 32, 64]
    for rank, score in one(folder).split("mmlu", "test")["ranks"].items():
        assert values[int(rank)].mean() == pytest.approx(score["value"], abs=1e-6)
    groups = item_groups(one(folder), "mmlu", "test")
    assert groups.index.equals(values.index) and groups.value_counts()["elements"] == 18


def test_an_item_that_repeats_keeps_a_key_of_its_own(folder):
    rewrite_items(folder, lambda lines: [*lines[:28], lines[0], lines[0]])
    first = json.loads(gzip.decompress((folder / ALPACA / ITEMS).read_bytes()).splitlines()[0])["hash"]
    values = items(one(folder), "mmlu", "test")
    assert values.index.is_unique and list(values.index[-2:]) == [f"{first}#1", f"{first}#2"]


def test_items_without_groups(folder):
    rewrite_items(folder, lambda lines: [{k: v for k, v in line.items() if k != "group"} for line in lines])
    assert item_groups(one(folder), "mmlu", "test") is None


@pytest.mark.parametrize("path", ["../other/items.jsonl.gz", "/etc/hostname", "items/../../x.gz"])
def test_items_must_stay_inside_the_record(folder, path):
    change(folder, ALPACA, "tasks", "mmlu", "splits", "test", "items", to=path)
    with pytest.raises(ValueError, match="leaves the folder"):
        items(one(folder), "mmlu", "test")


def test_a_link_out_of_the_record_is_no_way_round(folder, tmp_path):
    secret = shutil.move(folder / ALPACA / ITEMS, tmp_path / "elsewhere.gz")
    (folder / ALPACA / ITEMS).symlink_to(secret)
    with pytest.raises(ValueError, match="leaves the folder"):
        items(one(folder), "mmlu", "test")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda lines: lines[:-1], "holds 29 items, the record says 30"),
        (lambda lines: [{**lines[0], "values": {"1": 1.0}}, *lines[1:]], "no number at a rank"),
        (
            lambda lines: [{**lines[0], "values": {**lines[0]["values"], "8": float("nan")}}, *lines[1:]],
            "finite",
        ),
        (lambda lines: [{"id": 0}, *lines[1:]], "an item has no hash"),
    ],
)
def test_broken_items_are_refused_by_name(folder, edit, message):
    rewrite_items(folder, edit)
    with pytest.raises(ValueError, match=f"{ALPACA}/{ITEMS}: .*{message}"):
        items(one(folder), "mmlu", "test")


@pytest.mark.parametrize("keep", [0, 40])
def test_torn_items_are_refused_by_name(folder, keep):
    path = folder / ALPACA / ITEMS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{ALPACA}/{ITEMS}"):
        items(one(folder), "mmlu", "test")
    path.unlink()
    with pytest.raises(ValueError, match=f"{ALPACA}/{ITEMS}: not readable"):
        items(one(folder), "mmlu", "test")


def test_what_was_not_scored_is_said(folder):
    with pytest.raises(ValueError, match=f"{ALPACA}: gsm8k was not scored on test"):
        items(one(folder), "gsm8k", "test")


@pytest.mark.parametrize(
    "path, to, what",
    [
        (["cell", "scale"], "small", "scale"),
        (["budget", "asked", "steps"], 41, "budget asked for: steps"),
        (["budget", "asked", "examples"], 656, "budget asked for: examples"),
        (["budget", "asked", "tokens"], 60000, "budget asked for: tokens"),
        (["tasks", "mmlu", "version"], 1, "mmlu version"),
        (["tasks", "mmlu", "num_fewshot"], 0, "mmlu num_fewshot"),
        (["tasks", "mmlu", "metric"], "acc_norm", "mmlu metric"),
        (["tasks", "mmlu", "splits", "test", "sha256"], "00", "mmlu test items"),
        (["tasks", "mmlu", "splits", "validation", "sha256"], "00", "mmlu validation items"),
        (["data", "sha256"], "00", "training data"),
    ],
)
def test_records_that_differ_are_refused_with_their_names(folder, path, to, what):
    check_comparable(load(folder))
    change(folder, ALPACA, *path, to=to)
    with pytest.raises(ValueError) as refused:
        check_comparable(load(folder))
    text = str(refused.value)
    assert f"must agree in {what}" in text and repr(to) in text
    assert ALPACA in text and "smollm2-135m--alpaca--qlora--seed0" in text


def test_a_lost_cell_is_held_to_the_same_budget(folder):
    change(folder, OOM, "budget", "asked", "steps", to=41)
    with pytest.raises(ValueError, match=f"41: {OOM}"):
        check_comparable(load(folder))


def test_budgets_may_differ_between_data_sets(folder):
    """QLoRA's own settings do: 1,875 steps for OASST1, 10,000 for the rest."""
    for path in folder.glob("*oasst1*/record.json"):
        change(folder, path.parent.name, "budget", "asked", "steps", to=1875)
    check_comparable(load(folder))


def test_what_a_changed_configuration_put_aside_is_not_read(tmp_path):
    """The runner keeps old work beside the cell, as `name~digest`, with the same name in its record."""
    first = sorted(GOLDEN.iterdir())[0]
    for name in (first.name, f"{first.name}~0123456789ab"):
        shutil.copytree(first, tmp_path / name)
    assert [record.folder.name for record in load(tmp_path)] == [first.name]

"""One way to a data set, from three sources."""

import json

import pytest

from eval.releases import normalized, rows
from experiments.data import facts, sources
from experiments.data.overlap import evaluation_questions
from experiments.data.sources import HubSet, generated, load


def texts(examples):
    return {(example.prompt, example.completion) for example in examples}


@pytest.mark.parametrize(
    "name, read, examples",
    [
        ("alpaca", 6000, 5912 - 2),  # two answers are empty
        ("oasst1", 953 + 2022, None),
        ("self_instruct", 175, 175),
        ("flan_v2", 33443, 33442),
        ("gsm8k", 7473, 7473 - 500),
        ("triviaqa", 8837, 8837 - 500),
    ],
)
def test_the_real_files(shared, name, read, examples):
    loaded = load(name, "local", root=shared / "data")
    report = json.loads(json.dumps(loaded.report))
    assert report["rows"] == read and report["unparsed"] == {"count": 0, "first": []}
    assert report["train"] == len(loaded.train) and report["held_out"] == len(loaded.held_out) > 0
    assert len(loaded.train) + len(loaded.held_out) == examples or examples is None
    assert report["files"] and all(len(checksum) == 64 for checksum in report["files"].values())
    assert all(example.completion.strip() for example in loaded.train)
    asked = {normalized(example.question) for example in loaded.train}
    assert not asked & {normalized(example.question) for example in loaded.held_out}


def test_oasst1_reads_turns_and_trees(shared):
    loaded = load("oasst1", "local", root=shared / "data")
    examples = [*loaded.train, *loaded.held_out]
    # 953 turns, and 188 of 191 trees have their root in the file; dialogues that are equal count once.
    assert len(examples) + loaded.report["duplicates"] == 953 + 188
    assert all(example.prompt == "" and "### Assistant:" in example.completion for example in examples)


def test_alpaca_counts_its_88_shared_rows(shared):
    report = load("alpaca", "local", root=shared / "data").report
    assert (report["duplicates"], report["empty_answers"]) == (88, 2)


def test_overlap_finds_gsm8k_inside_flan(shared):
    loaded = load("flan_v2", "local", root=shared / "data", evaluation=evaluation_questions(shared / "data"))
    held = {normalized(example.question) for example in loaded.held_out}
    among_held = sum(normalized(row["question"]) in held for row in rows("gsm8k", "validation", shared / "data"))
    assert loaded.report["overlap"]["gsm8k/validation"] == 500 - among_held
    assert loaded.report["overlap"]["gsm8k/test"] == 0


def test_the_split_is_seeded_and_sized(shared):
    one, again = (load("gsm8k", "local", root=shared / "data", seed=1, held_out=100) for _ in range(2))
    other = load("gsm8k", "local", root=shared / "data", seed=2, held_out=100)
    assert len(one.held_out) == 100
    assert one == again and texts(one.held_out) != texts(other.held_out)


def test_the_hub_gives_the_same_examples_as_the_local_file(shared, tmp_path):
    # A hub set is loaded by `datasets`, here from a clone of one on disk.
    hub = tmp_path / "openai" / "gsm8k"
    hub.mkdir(parents=True)
    (hub / "train.jsonl").write_bytes((shared / "data" / "gsm8k" / "train.jsonl").read_bytes())
    local = load("gsm8k", "local", root=shared / "data")
    loaded = load("gsm8k", "hub", hub=HubSet(str(hub)))
    assert texts(loaded.train) == texts(local.train) and texts(loaded.held_out) == texts(local.held_out)
    assert loaded.report["kept_for_validation"] == 500 and loaded.report["fingerprint"]
    chosen = {row["question"] for row in rows("gsm8k", "validation", shared / "data")}
    assert not chosen & {example.question for example in [*loaded.train, *loaded.held_out]}


def test_a_malformed_row_is_counted_and_too_many_stop(tmp_path):
    (tmp_path / "alpaca").mkdir()
    file = tmp_path / "alpaca" / "a.json"
    records = [{"instruction": f"i{n}", "input": "", "output": "o"} for n in range(200)]
    records[7] = {"instruction": "i7"}
    file.write_text(json.dumps(records))
    report = load("alpaca", "local", root=tmp_path).report
    assert report["unparsed"]["count"] == 1 and report["unparsed"]["first"][0].startswith(f"{file}:record 8: ")
    file.write_text(json.dumps([*records, *[{"output": "o"}] * 5]))
    with pytest.raises(ValueError, match=rf"6 of 205 rows .* the first is {file}:record 8"):
        load("alpaca", "local", root=tmp_path)
    file.write_text("[{")
    with pytest.raises(ValueError, match=str(file)):
        load("alpaca", "local", root=tmp_path)


def test_flan_lines_are_split_at_line_ends_only(tmp_path):
    file = tmp_path / "flan_v2" / "cot_data" / "x_train.tsv"
    file.parent.mkdir(parents=True)
    lines = [f"q{n}\\nmore\r\u2028\ta\tc" for n in range(150)]
    file.write_bytes("\n".join([*lines, "two\tcolumns"]).encode())
    loaded = load("flan_v2", "local", root=tmp_path)
    assert loaded.report["unparsed"]["first"][0].startswith(f"{file}:151: ")
    assert {example.question for example in loaded.train} <= {f"q{n}\nmore" for n in range(150)}


def test_wrong_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'alpacca'; there are alpaca"):
        load("alpacca", "local", root=tmp_path)
    with pytest.raises(ValueError, match="source 'disk'"):
        load("alpaca", "disk", root=tmp_path)
    with pytest.raises(ValueError, match="needs a root"):
        load("alpaca", "local")
    with pytest.raises(ValueError, match="needs the id"):
        load("alpaca", "hub")
    with pytest.raises(FileNotFoundError, match=r"alpaca/\*.json is missing"):
        load("alpaca", "local", root=tmp_path)


@pytest.mark.parametrize("name", ["alpaca", "oasst1", "self_instruct", "flan_v2", "gsm8k", "triviaqa", "webglm"])
def test_generated_data_are_read_like_local_ones(generated_root, name):
    folder = generated(generated_root, seed=0)
    loaded = load(name, "generated", root=generated_root, evaluation=evaluation_questions(folder))
    assert loaded.report["unparsed"]["count"] == 0 and len(loaded.train) > 1400
    assert set(loaded.report["overlap"].values()) == {0} and len(loaded.report["overlap"]) == 8
    assert loaded.train == load(name, "local", root=folder).train


def test_generated_data_are_built_once_and_checked(generated_root, tmp_path, monkeypatch):
    source = generated(generated_root, seed=0)
    copy = tmp_path / source.name
    copy.mkdir()
    for path in source.rglob("*"):
        target = copy / path.relative_to(source)
        target.mkdir(exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    monkeypatch.setattr(facts, "build", lambda *_: pytest.fail("built twice"))
    assert generated(tmp_path, seed=0) == copy
    with open(copy / "gsm8k" / "test.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"gsm8k/test.jsonl is not as generated"):
        generated(tmp_path, seed=0)


def test_a_build_that_dies_leaves_nothing_to_be_taken_for_data(tmp_path, monkeypatch):
    def die(folder, seed):
        (folder / "alpaca").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(facts, "build", die)
    with pytest.raises(KeyboardInterrupt):
        generated(tmp_path, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_race_to_build_ends_with_one_folder(tmp_path, monkeypatch):
    def slower_than_another(folder, seed):
        (folder / "file").write_text("data")
        rival = tmp_path / f"facts-v{facts.VERSION}-seed{seed}"
        rival.mkdir()
        (rival / "file").write_text("data")
        sources._write_manifest(rival)

    monkeypatch.setattr(facts, "build", slower_than_another)
    folder = generated(tmp_path, seed=3)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]

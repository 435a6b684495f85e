"""Tournaments against a real server on loopback, with faults: nothing is lost and nothing is asked twice."""

import hashlib
import json
import signal
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments import tournament
from experiments.cell import Cell
from experiments.chat import judging
from experiments.chat.matches import Verdicts
from experiments.config import CONF, resolved
from experiments.mistakes import ConfigError
from tests import commands
from tests.commands import inside, start
from tests.judge_server import JudgeServer, Plan, write_answers


@pytest.fixture
def tournament_config(tmp_path):
    """Compose a tournament of files of answers in tmp_path: overrides -> Config."""

    def make(*overrides: str, contestants: str = "ab", prompts: int = 4):
        files = write_answers(tmp_path, contestants, prompts)
        with initialize_config_dir(CONF, version_base="1.3"):
            return resolved(compose("config", overrides=[*files, *overrides]))

    return make


def at(server: JudgeServer, *overrides: str) -> list[str]:
    return [f"judge.address={server.address}", "judge.model=judge", "judge.parallel=3", "judge.retries=3", *overrides]


def play(config) -> int:
    return tournament.judge(config, tournament.matches(Cell(config)))


def lines(config) -> list[dict]:
    return Verdicts(tournament.folder(config) / "verdicts.jsonl").lines()


def longer(number: int, user: str) -> Plan:
    """A judge that knows: answer a beats b beats c."""
    answers = [part.split("</answer>")[0] for part in user.split("<answer>\n")[1:]]
    return Plan("I think so.\n\n" + ("1" if answers[0] < answers[1] else "2"))


def test_every_match_is_asked_once_in_both_orders_and_recorded(tournament_config):
    with JudgeServer(longer) as server:
        config = tournament_config(*at(server), contestants="abc", prompts=3)
        assert play(config) == 0
        found = lines(config)
        assert len(found) == 3 * 6 and set(server.answered.values()) == {1} and len(server.answered) == 18
        assert {(line["first"], line["second"]) for line in found} == {(x, y) for x in "abc" for y in "abc" if x != y}
        assert all(line["verdict"] == (1 if line["first"] < line["second"] else 2) for line in found)
        line = found[0]
        assert (line["model"], line["prompt_version"], line["temperature"]) == ("judge", "explain-v1", 0.2)
        assert line["tokens_in"] == 10 and line["replies"] == ["I think so.\n\n" + str(line["verdict"])]
        assert play(config) == 0 and server.requests == 18
        tournament.show(config, tournament.matches(Cell(config)))
    table = (tournament.folder(config) / "ratings.md").read_text()
    assert [row.split("|")[1].strip() for row in table.splitlines() if row.startswith(("| a", "| b", "| c "))] == [
        *"abc"
    ]


def test_another_judge_prompt_or_temperature_is_another_judge(tournament_config):
    with JudgeServer(longer) as server:
        for override in ((), ("judge.prompt=brief-v1",), ("judge.temperature=0.0",)):
            config = tournament_config(*at(server), *override)
            assert play(config) == 0
        assert len(lines(config)) == 3 * 8 and server.requests == 24


def test_too_many_requests_and_server_errors_are_asked_again(tournament_config):
    with JudgeServer(lambda n, user: Plan(status=(429, 200, 503, 200, 500, 200)[n % 6])) as server:
        config = tournament_config(*at(server, "judge.retries=9"))
        assert play(config) == 0
    assert len(lines(config)) == 8 and set(server.answered.values()) == {1} and server.requests > 8


def test_a_request_that_times_out_is_asked_again(tournament_config):
    with JudgeServer(lambda n, user: Plan(seconds=3 if n < 2 else 0)) as server:
        config = tournament_config(*at(server, "judge.timeout=0.4"))
        assert play(config) == 0
        assert len(lines(config)) == 8 and server.requests == 10


def test_nonsense_is_asked_once_more_then_recorded_as_none(tournament_config):
    odd = {}

    def sometimes(number: int, user: str) -> Plan:
        odd[user] = odd.get(user, 0) + 1
        return Plan("2" if "Question 1?" in user and odd[user] == 2 else "Both are lovely answers, 5.")

    with JudgeServer(sometimes) as server:
        config = tournament_config(*at(server))
        assert play(config) == 0
        assert set(odd.values()) == {2} and len(odd) == 8
        found = lines(config)
        assert sorted(line["verdict"] is None for line in found) == [False] * 2 + [True] * 6
        assert all(len(line["replies"]) == 2 for line in found)
        assert play(config) == 0 and server.requests == 16


def test_a_server_that_dies_midway_loses_nothing(tournament_config):
    with JudgeServer(longer) as server:
        config = tournament_config(*at(server, "judge.retries=1"), contestants="abc", prompts=6)
        server.decide = lambda n, user: longer(n, user) if n < 10 else Plan(status=500)
        assert play(config) > 0
        first = lines(config)
        assert len(first) == len(server.answered) == 10
        server.stop()
        assert play(config) == 26  # nobody there at all
        assert lines(config) == first
    with JudgeServer(longer, port=server.port) as again:
        assert play(config) == 0
    assert len(lines(config)) == 36 and lines(config)[:10] == first
    assert set((server.answered + again.answered).values()) == {1}


def test_a_run_killed_midway_goes_on_where_it_was(tmp_path):
    with JudgeServer(lambda n, user: Plan(seconds=0.1)) as server:
        overrides = [*write_answers(tmp_path, "abc", 6), *at(server)]
        process = start("experiments.tournament", *overrides, cwd=tmp_path)
        file = tmp_path / "outputs/smoke/tournament/files/verdicts.jsonl"
        while not (file.exists() and file.read_text().count("\n") >= 8):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with file.open("a") as stream:
            stream.write('{"judge": "torn')
        before = file.read_text().count("\n")
        done = inside("experiments.tournament", *overrides, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert 8 <= before < 36 and len(found) == len({line["match"] for line in found}) == 36
    assert sum(server.answered.values()) <= 36 + 3  # at most those under way when it was killed
    assert "36 verdicts to ask" in process.stderr.read() and f"{36 - before} verdicts to ask" in done.stderr


def test_ctrl_c_keeps_the_answers_under_way(tmp_path):
    with JudgeServer(lambda n, user: Plan(seconds=0.3)) as server:
        process = start("experiments.tournament", *write_answers(tmp_path, "abc", 60), *at(server), cwd=tmp_path)
        file = tmp_path / "outputs/smoke/tournament/files/verdicts.jsonl"
        while not (file.exists() and file.read_text().count("\n") >= 4):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=600)
        assert process.returncode != 0
        assert file.read_text().count("\n") == sum(server.answered.values()) < 360


def test_a_judge_that_always_says_1_shows_as_an_order_effect(tmp_path):
    with JudgeServer(lambda n, user: Plan("1")) as server:
        done = inside("experiments.tournament", *write_answers(tmp_path, "abc", 5), *at(server), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| judge (explain-v1, T 0.2) | 30"))
    assert [cell.strip() for cell in row.split("|")[3:7]] == ["100.0", "0.0", "0.0", "100.0 [100.0, 100.0]"]
    ratings = [line for line in done.stdout.splitlines() if line.startswith(("| a ", "| b ", "| c "))]
    assert all("1000 (1) [1000, 1000]" in line for line in ratings) and len(ratings) == 3


def test_a_refused_request_is_reported_and_stays_open(tournament_config, capsys):
    with JudgeServer(lambda n, user: Plan(status=400) if "Question 2?" in user else Plan("3")) as server:
        config = tournament_config(*at(server))
        assert play(config) == 2 and len(lines(config)) == 6
        assert "2 matches were refused" in capsys.readouterr().err


def test_the_key_is_sent_and_never_written(tmp_path, monkeypatch):
    key = "sk-secret-0123456789"
    monkeypatch.setitem(commands.ENVIRONMENT, "MY_KEY", key)
    with JudgeServer(lambda n, user: Plan("2") if n < 3 else Plan(status=401, body=f"Incorrect key: {key}")) as server:
        overrides = [*write_answers(tmp_path), *at(server, "judge.key=MY_KEY")]
        done = inside("experiments.tournament", *overrides, cwd=tmp_path)
    assert done.returncode == 1 and "answered 401; check the key in the environment variable MY_KEY" in done.stderr
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert key not in done.stdout + done.stderr and not [f for f in written if key in f.read_text(errors="replace")]


def test_two_runs_at_once_are_refused(tournament_config):
    with JudgeServer(longer) as server:
        config = tournament_config(*at(server))
        with (
            Verdicts(tournament.folder(config) / "verdicts.jsonl").writing(),
            pytest.raises(ConfigError, match="another run is writing"),
        ):
            play(config)


MISTAKES = {
    "tournament.prompts=nowhere.jsonl": "tournament.prompts is 'nowhere.jsonl'",
    "+tournament.contestants.c.rank=65": "tournament.contestants.c.rank is 65",
    "+tournament.contestants.c.rank=8": "tournament.contestants.c needs the adapter in",
    "+tournament.contestants.c.typo=8": "tournament.contestants.c: ",
    "+tournament.contestants.c.adapter=x": "tournament.contestants.c has an adapter but no rank",
    "~tournament.contestants.b": "tournament.contestants names 1",
    "judge.address=ftp://x": "judge.address is 'ftp://x'",
    "judge.address=https://me:word@host/v1": "judge.address holds credentials",
    "judge.address=https://host/v1": "there is no such environment variable",
    "judge.prompt=v9": "judge.prompt is 'v9'; choose one of explain-v1, brief-v1",
    "tournament.top_p=0": "tournament.top_p is 0.0",
    "tournament.limit=0": "tournament.limit is 0",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_refused_by_name_before_any_request(override, tournament_config, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError) as error:
        play(tournament_config(override))
    assert MISTAKES[override] in str(error.value) and "me:word" not in str(error.value)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("1", 1), ("A fine one.\n\n2\n", 2), ("**3**", 3), ("x\nVerdict: 1.", 1), ("[[2]]", 2), ("Final answer: 3", 3),
        ("", None), ("4", None), ("12", None), ("1 or 2", None), ("2\nbecause it is longer", None), ("one", None),
        ("Answer 1 is better", None), ("1.5", None),
    ],
)  # fmt: skip
def test_a_verdict_is_the_digit_on_the_last_line(reply, verdict):
    assert judging.verdict(reply) == verdict


def test_a_used_judging_prompt_is_never_edited():
    digest = {
        name: hashlib.sha256(repr(judging.messages(name, "q", "a", "b")).encode()).hexdigest()[:8]
        for name in judging.PROMPTS
    }
    assert digest == {"explain-v1": "5a51e0d6", "brief-v1": "102b24be"}


def test_ranks_of_an_adapter_and_its_base_answer_alike_after_a_restart(tmp_path):
    """The whole road with a random model: one adapter at three ranks and its base."""
    import torch

    from experiments.train import adapted_model
    from qdylora import Draw
    from qdylora.adapter import RankSettings
    from tests.tiny import randomize_B

    rows = [{"text": f"Question {i}?"} for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["scale=smoke", "tournament.prompts=prompts.jsonl", "tournament.max_new_tokens=6", "tournament.batch=2"]
    with initialize_config_dir(CONF, version_base="1.3"):
        config = resolved(compose("config", overrides=[*overrides, f"outputs={tmp_path}/outputs"]))
    torch.manual_seed(0)
    cell = Cell(config)
    model = adapted_model(cell)
    randomize_B(model)
    model.save_pretrained(cell.adapter)
    RankSettings(64, 16, "alpha_over_b", False, "drift", vars(Draw(r_max=64)) | {"ranks": []}).save(cell.adapter)
    with JudgeServer(lambda n, user: Plan("3")) as server:
        done = inside("experiments.tournament", *overrides, *at(server), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "outputs/smoke/tournament/ranks"
        files = {file.name.rsplit("-", 1)[0]: file for file in (folder / "answers").glob("*.jsonl")}
        texts = {name: file.read_text() for name, file in files.items()}
        assert sorted(files) == ["base", "rank-1", "rank-64", "rank-8"] and len(set(texts.values())) == 4
        assert server.requests == 3 * 12 and (folder / "ranks.png").stat().st_size > 10_000
        for file in files.values():  # as if killed after the first batch
            file.unlink()
            (file.with_suffix("") / "1.json").unlink()
        again = inside("experiments.tournament", *overrides, *at(server), cwd=tmp_path)
        assert again.returncode == 0 and server.requests == 3 * 12
    assert {name: file.read_text() for name, file in files.items()} == texts
    record = json.loads(Path(folder / "record.json").read_text())
    assert record["verdicts"] == {"judge (explain-v1, T 0.2)": 36} and record["judge"]["temperature"] == 0.2

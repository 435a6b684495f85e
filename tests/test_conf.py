"""Every configuration composes and is valid; every mistake is refused by name, before any work."""

from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from experiments.config import CONF, resolved, substance
from experiments.method import draw
from experiments.mistakes import ConfigError
from qdylora import Draw
from tests.commands import run


def names(group: str) -> list[str]:
    return sorted(file.stem for file in Path(CONF, group).glob("*.yaml"))


def config(*overrides: str):
    with initialize_config_dir(CONF, version_base="1.3"):
        return resolved(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize("scale", names("scale"))
@pytest.mark.parametrize(
    "group", ["model", "method", "data", "optim", "ranks", "tasks", "tracker", "table", "tournament", "judge"]
)
def test_every_choice_of_every_group_is_valid_at_every_scale(group, scale):
    for choice in names(group):
        if scale == "paper" and choice in (
            "smollm2_135m",
            "tiny",
            "tiny_wide",
        ):  # the paper has no hyper-parameters for them
            with pytest.raises(ConfigError, match=r"budget\.steps: .*model\.recipe"):
                config(f"scale={scale}", f"{group}={choice}")
            continue
        # tasks/own.yaml is for data sets that are benchmarks themselves
        c = config(f"scale={scale}", *(["data=gsm8k"] if choice == "own" else []), f"{group}={choice}")
        assert c.scale == scale
        if group in ("model", "data", "method"):
            assert getattr(c, group).name.replace("_", "-") == choice.replace("_", "-")


def test_graded_rates_have_a_float32_adapter_where_qlora_has_a_coarser_one():
    types = {
        method: config("scale=paper", f"method={method}").optim.adapter_dtype for method in ("qlora", "qlora_graded")
    }
    assert types == {"qlora": "bfloat16", "qlora_graded": "float32"}


def test_at_scale_paper_every_cell_of_a_table_has_qloras_hyper_parameters():
    table = config("scale=paper", "table=table1").table
    for model, data in product(table.models, table.data):
        c = config("scale=paper", "table=table1", f"model={model}", f"data={data}")
        size = "13b" if "13b" in model else "7b" if "7b" in model else "33b"
        batch = 16 if size != "33b" or data == "oasst1" else 32
        steps = 1875 if data == "oasst1" else 5000 if size == "33b" else 10000
        assert (c.budget.batch, c.budget.steps) == (batch, steps)
        assert c.optim.lr == pytest.approx(1e-4 if size == "33b" else 2e-4)
        assert c.optim.lora_dropout == pytest.approx(0.05 if size == "33b" else 0.1)
        assert (c.optim.name, c.optim.schedule, c.optim.max_grad_norm) == ("paged_adamw_32bit", "constant", 0.3)


def test_guanaco_has_qloras_hyper_parameters_at_every_size():
    table = config("scale=paper", "table=guanaco").table
    assert (table.data, table.methods) == (["oasst1"], ["qlora", "qdylora"])
    rates = {"llama_7b": 2e-4, "llama_13b": 2e-4, "llama_33b": 1e-4, "llama_65b": 1e-4}
    assert set(table.models) == set(rates)
    for model, method in product(rates, table.methods):
        c = config("scale=paper", "table=guanaco", f"model={model}", "data=oasst1", f"method={method}")
        assert (c.budget.steps, c.budget.batch, c.data.target_max_len) == (1875, 16, 512)
        assert c.optim.lr == pytest.approx(rates[model])
        assert c.optim.lora_dropout == pytest.approx(0.1 if rates[model] == 2e-4 else 0.05)
        assert (c.ranks.r_max, c.method.alpha, c.method.bits, c.optim.max_grad_norm) == (64, 16, 4, 0.3)


def test_methods_differ_in_what_the_paper_says_they_do():
    methods = {name: config(f"method={name}") for name in names("method")}
    assert {n: c.method.bits for n, c in methods.items()} == {n: 16 if n in ("dylora", "lora") else 4 for n in methods}
    assert draw(methods["qlora"]) == draw(methods["lora"]) == Draw(r_max=64, kind="fixed")
    assert draw(methods["qdylora"]) == draw(methods["dylora"]) == Draw(r_max=64)
    assert methods["qdylora"].method.scale == "alpha_over_b"
    assert methods["qdylora_frozen"].method.gate == "frozen"


BAD = {
    "+typo=1": "typo",
    "typo=1": "typo",
    "+method.typo=1": "typo",
    "optim.typo=1": "typo",
    "ranks.eval=[0,1]": "ranks.eval has 0; ranks go from r_min 1 to r_max 64",
    "ranks.eval=[1,65]": "ranks.eval has 65; ranks go from r_min 1 to r_max 64",
    "ranks.eval=[]": "ranks.eval is empty",
    "ranks.r_max=0": "ranks.r_max is 0; it must be at least 1",
    "ranks.r_min=0": "ranks.r_min is 0; it must be at least 1",
    "data=wikipedia": "data/wikipedia",
    "data.name=wikipedia": "data.name is 'wikipedia'; choose one of alpaca",
    "model=gpt5": "model/gpt5",
    "budget.steps=-1": "budget.steps is -1; it must be at least 1",
    "budget.steps=many": "budget.steps",
    "budget.batch=7": "budget.batch is 7, not a multiple of optim.micro_batch 8",
    "optim.lr=-1": "optim.lr is -1.0; it must be a positive number",
    "optim.lr=inf": "optim.lr is inf",
    "forecast.gpu_gb=0": "forecast.gpu_gb is 0.0; it must be a positive number",
    "optim.max_grad_norm=nan": "optim.max_grad_norm is nan; it must be at least 0",
    "forecast.reserve_gb=-1": "forecast.reserve_gb is -1.0; it must be at least 0",
    "optim.name=lion": "optim.name is 'lion'",
    "optim.lora_dropout=1": "optim.lora_dropout is 1.0",
    "method.bits=8": "method.bits is 8; choose one of 4, 16, 32",
    "method.scale=alpha": "method.scale is 'alpha'",
    "method.draw.kind=normal": "method.draw.kind",
    "method.draw.per=epoch": "method.draw.per",
    "method.draw.at_r_max=2": "method.draw.at_r_max",
    "tasks.benchmarks=[hellaswag]": "tasks.benchmarks[0] is 'hellaswag'",
    "tasks.limit.test=0": "tasks.limit.test is 0",
    "tasks.limit_of.gsm8k.test=0": "tasks.limit_of.gsm8k.test is 0",
    "+tasks.limit_of.boolq={test:1}": "boolq",
    "ranks.cuts=[prune]": "ranks.cuts[0] is 'prune'; choose one of truncate, truncate_alpha_over_b, svd",
    "samples.items=0": "samples.items is 0",
    "table.budgets=[0.5,0]": "table.budgets is [0.5, 0.0]",
    "tasks.num_fewshot.mmlu=-1": "tasks.num_fewshot.mmlu is -1",
    "tracker.wandb=cloud": "tracker.wandb is 'cloud'",
    "seed=-1": "seed is -1",
    "source=ftp": "source is 'ftp'",
    "source=local root=/nowhere": "root is '/nowhere'",
}


@pytest.mark.parametrize("overrides", BAD)
def test_a_mistake_is_refused_by_name(overrides):
    with pytest.raises((ConfigError, HydraException)) as error:
        config(*overrides.split())
    assert BAD[overrides] in f"{error.value} {error.value.__cause__}"


@pytest.mark.parametrize(
    ("module", "override"),
    [("experiments.run", "+typo=1"), ("experiments.table", "ranks.eval=[65]"), ("experiments.score", "data=wikipedia")],
)
def test_the_commands_say_it_in_one_sentence_with_exit_code_2(module, override, tmp_path):
    done = run(module, "scale=smoke", override, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert override.strip("+").split("=")[0].split(".")[0] in done.stderr
    assert not list(tmp_path.iterdir())


def test_keys_that_change_no_result_do_not_change_what_a_cell_is():
    def plain(*overrides):
        from experiments.cell import Cell

        return substance(Cell(config("scale=smoke", *overrides)).plain_config)

    same = plain()
    for incidental in (
        "forecast.gpu_gb=32",
        "tracker=none",
        "outputs=/tmp/x",
        "tournament=files",
        "judge=local",
        "tasks.tokens_per_batch=64",
        "checkpoint_every=1",
    ):
        assert plain(incidental) == same
    for substantial in ("seed=1", "budget.steps=5", "method=qlora", "ranks.eval=[1]", "tasks.limit.test=17"):
        assert plain(substantial) != same


def test_only_a_table_that_sweeps_the_budget_names_it_in_its_cells():
    from experiments.cell import Cell
    from experiments.table import cells

    plain = [cell.name for _, cell in cells(config("scale=smoke", "table=table2"), ["scale=smoke", "table=table2"])]
    assert plain == [
        f"tiny--{data}--{method}--seed0" for data in ("webglm", "gsm8k") for method in ("qlora", "qdylora")
    ]
    overrides = ["scale=smoke", "table=semi_sorted", "table.methods=[qdylora]"]
    swept = cells(config(*overrides), overrides)
    assert [cell.name for _, cell in swept] == [f"tiny--gsm8k--qdylora--seed0--steps{n}" for n in (2, 4, 8)]
    again = Cell(config(*swept[0][0]))  # what the command that runs the cell makes of its overrides
    assert (again.name, again.digest) == (swept[0][1].name, swept[0][1].digest)


def test_scale_small_is_real_data_from_the_hub_unless_a_folder_is_named_and_table_2_without_webglm(tmp_path):
    assert (config("scale=small").source, config("scale=small").root) == ("hub", None)
    here = config("scale=small", "source=local", f"root={tmp_path}")
    assert (here.source, here.root) == ("local", str(tmp_path))
    data = {name: config("scale=small", f"table={name}").table.data for name in ("table1", "table2", "table3")}
    assert data["table1"] == ["alpaca", "oasst1", "self_instruct", "flan_v2"]
    assert (data["table2"], data["table3"]) == (["gsm8k"], ["gsm8k", "triviaqa"])
    assert config("scale=mini", "table=table2").table.data == ["webglm", "gsm8k"]


def test_the_three_draws_of_the_semi_sorted_study():
    draws = {name: draw(config(f"method={name}")) for name in config("table=semi_sorted").table.methods}
    assert [d.kind for d in draws.values()] == ["uniform", "list", "geometric"]
    row64 = {name: d.update_probability()[-1] for name, d in draws.items()}
    assert row64["qdylora"] == pytest.approx(1 / 64) and row64["qdylora_powers"] == pytest.approx(1 / 7)
    assert row64["qdylora_geometric"] < 1e-4

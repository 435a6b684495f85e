"""Table 4 from configurations alone."""

import pytest

from analysis.settings import table4
from tests.commands import inside


def config(model="llama-7b", data="alpaca", method="qlora", **settings):
    """The few parts of a resolved configuration that the settings below read."""
    recipe = {"lora_dropout": 0.1, "all": {"batch": 16, "lr": 2e-4, "steps": 10000}}
    return {
        "scale": "paper",
        "model": {"name": model, "recipe": recipe if model != "falcon-40b" else recipe | {"lora_dropout": 0.05}},
        "data": {"name": data, "recipe": "all"},
        "method": {
            "name": method,
            "bits": 4,
            "alpha": 16.0,
            "scale": "constant" if method == "qlora" else "alpha_over_b",
        },
        "ranks": {"r_max": 64},
        "budget": {"steps": 10000},
        "optim": {"lr": 2e-4, "lora_dropout": 0.1},
    } | settings


KNOWN = ("method.alpha", "method.scale", "ranks.r_max", "optim.lr", "optim.lora_dropout", "budget.steps")


def rows(configs):
    from analysis.published import hyper_parameters

    known = hyper_parameters()
    table = table4({"table1": configs}, known[known.setting.isin(KNOWN)])
    return {row.labels[0]: (row.labels[1], str(row.cells[0])) for row in table.blocks[0].rows}


def test_each_value_says_where_it_is_from():
    found = rows([config()])
    assert found["maximum LoRA rank"] == ("64", "64")
    assert found["LoRA alpha"] == ("", "16 †")
    assert found["learning rate"] == ("", "0.0002 †")
    assert rows([config(optim={"lr": 1e-3, "lora_dropout": 0.1})])["learning rate"] == ("", "0.001 ‡")
    assert rows([config(ranks={"r_max": 32})])["maximum LoRA rank"] == ("64", "32 ‡")


def test_a_value_that_differs_says_for_which_cells():
    found = rows([config(method="qlora"), config(method="qdylora")])
    assert found["scale at rank b"] == ("alpha_over_b", "constant † (QLoRA); alpha_over_b (QDyLoRA)")
    models = [config(), config("falcon-40b", optim={"lr": 2e-4, "lora_dropout": 0.05})]
    assert rows(models)["LoRA dropout"] == ("", "0.1 † (llama-7b); 0.05 † (falcon-40b)")
    both = [
        config(model, data, budget={"steps": 1875 if (model, data) == ("llama-7b", "oasst1") else 10000})
        for model in ("llama-7b", "llama-13b")
        for data in ("alpaca", "oasst1")
    ]
    assert rows(both)["optimizer steps"] == ("", "1875 ‡ (llama-7b/OASST1); 10000 † (otherwise)")
    swept = [config(budget={"steps": steps}) for steps in (5000, 10000)]
    assert rows(swept)["optimizer steps"] == ("", "5000 ‡; 10000 †")


def test_settings_of_two_scales_are_refused():
    with pytest.raises(ValueError, match="one scale"):
        table4({"table1": [config(), config(scale="mini")]})


def test_the_command_writes_it_without_running_a_cell(tmp_path):
    done = inside("experiments.table", "table=table4", "scale=paper", "table.of=[table3]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs/paper/table4"
    assert sorted(file.name for file in folder.iterdir()) == ["table4.csv", "table4.md", "table4.tex"]
    text = (folder / "table4.md").read_text()
    assert text == done.stdout.rstrip("\n") + "\n"
    assert "16 (DyLoRA); 4 (QLoRA, QDyLoRA)" in text and "paged_adamw_32bit †" in text

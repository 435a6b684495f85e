"""Scale `paper`: every cell of the paper's tables composes, and each model's training step runs on tensors without
content."""

import pytest

from experiments.forecast import forecast_of, hours, why_not
from experiments.schema import MemoryForecast
from experiments.table import cells
from tests.test_conf import config
from tests.test_forecast import PARAMETERS

#: Published ids: LLaMA in transformers' layout, Meta's own LLaMA-2, TII's Falcon.
IDS = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "falcon-40b": "tiiuae/falcon-40b",
}


@pytest.mark.parametrize(("table", "count"), [("table1", 32), ("table2", 4), ("table3", 12), ("rivals", 16)])
def test_every_cell_is_complete(table, count):
    overrides = [f"table={table}", "scale=paper"]
    found = [cell.config for _, cell in cells(config(*overrides), overrides)]
    assert len(found) == count
    for c in found:
        assert (c.source, c.model.id, c.tasks.limit.test) == ("hub", IDS[c.model.name], None)
        assert c.budget.batch % c.optim.micro_batch == 0 and c.budget.steps >= 1875
        # A row of training, and the longest row that the model was made for.
        assert c.data.source_max_len + c.data.target_max_len <= c.model.architecture["max_position_embeddings"]
        assert c.method.bits == (16 if c.method.name == "dylora" else 4)


@pytest.mark.parametrize("model", ["llama_7b", "llama_13b", "falcon_40b"])  # LLaMA-2 has the shapes of LLaMA 13B
def test_a_training_step_of_each_model_runs_without_weights_on_a_gpu_of_the_papers_size(model):
    c = config("scale=paper", "table=table1", f"model={model}", "data=alpaca", "forecast.gpu_gb=32")
    memory = forecast_of(c)
    assert why_not(memory, c.forecast) is None
    assert why_not(memory, MemoryForecast(gpu_gb=4)) is not None
    # Two operations a weight and token: forward, the same once more for checkpointing, and back to the activations.
    embeddings = 2 * c.model.architecture["vocab_size"] * c.model.architecture["hidden_size"]
    weights = PARAMETERS[model][0] - embeddings * (0.5 if model == "falcon_40b" else 1)
    assert memory.flops == pytest.approx(6 * weights * 512, rel=0.1)
    per_step = memory.flops * c.budget.batch // c.optim.micro_batch
    want = {"llama_7b": 18, "llama_13b": 35, "falcon_40b": 115}[model]
    assert hours(per_step, c) == pytest.approx(want, rel=0.1)


def test_a_rate_that_is_no_rate_is_refused():
    with pytest.raises(ValueError, match=r"forecast\.tflops is 0\.0; it must be a positive number"):
        config("forecast.tflops=0")

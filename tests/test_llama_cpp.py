"""llama.cpp itself computes with what is exported for it, and gives the probabilities of PEFT and transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny_gguf
import torch
from tiny import randomize_B
from torch.testing import assert_close

from qdylora import Draw, adapter_to_gguf, at_rank, attach, export_rank, load_base, load_config, merge_into_gguf
from qdylora import save_adapter as save

HERE = Path(__file__).parent / "llama_cpp"
PROMPTS = [[0, 70, 71, 72, 80], [0, 5, 9, 33], [0, 258, 12]]
R_MAX = 8
#: llama.cpp keeps keys and values in 16 bits.
CLOSE = {"rtol": 2e-2, "atol": 1e-4}


@pytest.fixture(scope="module", autouse=True)
def llama_cpp() -> None:
    if not (shutil.which("node") and (HERE / "node_modules").is_dir()):
        reason = "needs node-llama-cpp (tests/install.sh)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


def in_llama_cpp(model: Path, lora: Path | None = None) -> torch.Tensor:
    """Probabilities of the token after each of PROMPTS, (prompts, vocabulary)."""
    job = {"model": str(model), "prompts": PROMPTS} | ({"lora": str(lora)} if lora else {})
    done = subprocess.run(
        ["node", HERE / "probabilities.mjs", json.dumps(job)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout))


@torch.no_grad()
def in_transformers(model) -> torch.Tensor:
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1].softmax(-1) for prompt in PROMPTS])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("base") / "tiny.gguf", kind=tiny_gguf.F32)


@pytest.mark.parametrize("scale", ["alpha_over_b", "alpha_over_sqrt_b", "constant"])
def test_an_exported_adapter_has_the_probabilities_of_its_rank(scale, base, tmp_path):
    torch.manual_seed(0)
    model = attach(load_base(str(base), 32, torch.float32, cache=tmp_path), r_max=R_MAX, alpha=4, scale=scale)
    with at_rank(model.eval(), 1):
        bare = in_transformers(model)  # B is zero
    randomize_B(model)
    save(model, tmp_path / "checkpoint", Draw(r_max=R_MAX))
    assert_close(in_llama_cpp(base), bare, **CLOSE)
    for rank in (1, 3, R_MAX):
        with at_rank(model, rank):
            want = in_transformers(model)
        plain = export_rank(tmp_path / "checkpoint", rank, tmp_path / f"rank-{rank}")
        adapter = adapter_to_gguf(plain, load_config(str(base)), tmp_path / f"rank-{rank}.gguf")
        with pytest.raises(AssertionError, match="not close"):  # so that an adapter without effect would not pass
            assert_close(bare, want, **CLOSE)
        assert_close(in_llama_cpp(base, adapter), want, **CLOSE)
        if scale == "alpha_over_b":
            merged = merge_into_gguf(plain, base, tmp_path / f"merged-{rank}.gguf")
            assert_close(in_llama_cpp(merged), want, **CLOSE)

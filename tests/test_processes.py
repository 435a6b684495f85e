"""Several processes train the adapter that one process with as many more micro-batches trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import ENVIRONMENT, REPOSITORY
from tests.test_cells import lines

TRAIN = ("table=table1", "scale=smoke", "data=alpaca", "tracker=none", "optim.compute_dtype=float32", "budget.steps=6",
         "checkpoint_every=3", "optim.micro_batch=1")  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
FSDP = (sys.executable, "-m", "accelerate.commands.launch", f"--config_file={REPOSITORY}/conf/accelerate/fsdp.yaml",
        "--num_processes=2", "--use_cpu", "--main_process_port=0")  # fmt: skip


def train(folder: Path, *overrides: str, launcher: tuple[str, ...] = (sys.executable,)) -> Path:
    """The folder of a cell trained by `launcher` in `folder`."""
    folder.mkdir()
    command = [*launcher, "-m", "experiments.train", *TRAIN, *overrides]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("outputs/smoke/table1/tiny--*"))


def assert_same_training(one: Path, several: Path) -> None:
    """Same draws and tokens; losses and weights equal to rounding."""
    ours, theirs = lines(several / "log.jsonl"), lines(one / "log.jsonl")
    for key in ("step", "ranks", "tokens", "lr"):
        assert [line[key] for line in ours] == [line[key] for line in theirs], key
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=2e-4), key
    ours, theirs = (load_file(cell / "adapter/adapter_model.safetensors") for cell in (several, one))
    assert ours.keys() == theirs.keys()
    # Adam divides by the size of the gradient: where that is rounding itself, so is the sign of the step.
    far = [((ours[k] - theirs[k]).abs() > 1e-5).float().mean() for k in ours]
    assert torch.stack(far).max() < 0.01
    assert max(v.abs().max() for k, v in ours.items() if "lora_B" in k) > 1e-3  # it has learnt something


@pytest.mark.parametrize("method", ["qdylora", "qdylora_sequence"])
def test_two_processes_of_data_parallel_training_over_a_4_bit_base(tmp_path, method):
    one = train(tmp_path / "one", f"method={method}")
    assert_same_training(one, train(tmp_path / "two", f"method={method}", launcher=TORCHRUN))


def test_two_processes_that_share_a_16_bit_base_by_fsdp(tmp_path):
    one = train(tmp_path / "one", "method=dylora")
    assert_same_training(one, train(tmp_path / "two", "method=dylora", launcher=FSDP))

"""Several processes train the adapter that one process with as many more micro-batches trains."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from qdylora import attach, grade_updates, set_rank, sort_ranks
from tests.commands import ENVIRONMENT
from tests.test_cells import lines
from tests.tiny import LLAMA

TRAIN = ("table=table1", "scale=smoke", "data=alpaca", "tracker=none", "optim.compute_dtype=float32", "budget.steps=6",
         "checkpoint_every=3", "optim.micro_batch=1")  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


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


def test_each_of_two_processes_at_a_rank_of_its_own(tmp_path):
    """With one micro-batch each, that is one process with a draw per micro-batch."""
    one = train(tmp_path / "one", "method=qdylora", "budget.batch=2", "method.draw.per=micro_batch")
    own = ("method=qdylora", "budget.batch=2", "method.draw.per=process")
    two = train(tmp_path / "two", *own, launcher=TORCHRUN)
    assert any(len(set(line["ranks"])) == 2 for line in lines(two / "log.jsonl"))
    assert_same_training(one, two)


SHARDED = """
import os, sys, torch
from torch.distributed import barrier, destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from tests.test_processes import stepped, tiny
init_process_group("gloo")
model = tiny()
for layer in model.get_base_model().model.layers:
    fully_shard(layer)
fully_shard(model)
rank = torch.distributed.get_rank()
weights = stepped(model, slice(2 * rank, 2 * rank + 2), sys.argv[2])
if rank == 0:
    torch.save({name: w for name, w in weights.items()}, sys.argv[1])
barrier()
destroy_process_group()
os._exit(0)  # a thread of torch's that outlives the interpreter would abort it now and then
"""


def tiny():
    """A tiny 16-bit model's stand-in in float32, with an adapter whose B is not zero."""
    torch.manual_seed(0)
    model = attach(AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA), dtype=torch.float32), r_max=8)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model


def stepped(model, rows: slice, how: str = "as drawn") -> dict[str, torch.Tensor]:
    """The adapter's weights, whole, after four steps of SGD on rows of batches of four, at ranks 3, 8, 1
    and mixed. how: as drawn; graded; or sorted, which is SGD with momentum, the ranks sorted before the third step."""
    tokens = torch.randint(0, 100, (4, 4, 12), generator=torch.Generator().manual_seed(1))
    momentum = 0.5 if how == "sorted" else 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=momentum)
    if how == "graded":
        grade_updates(optimizer, model)
    for batch, rank in zip(tokens, (3, 8, 1, (1, 2, 5, 8)), strict=True):
        if how == "sorted" and rank == 1:
            sort_ranks(model, optimizer)
        set_rank(model, rank if isinstance(rank, int) else rank[rows])
        model(input_ids=batch[rows], labels=batch[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters() if "lora" in n}
    return {name: p.detach().clone() for name, p in whole.items()}


# Graded steps go up to three times as far, and rounding with them.
@pytest.mark.parametrize(("how", "rtol", "atol"), [("as drawn", 1e-4, 1e-6), ("graded", 1e-3, 2e-5)])
def test_the_gate_sees_whole_weights_when_fsdp_shards_them(how, rtol, atol, tmp_path):
    torchrun(SHARDED, str(tmp_path / "weights"), how)
    sharded, whole = torch.load(tmp_path / "weights"), stepped(tiny(), slice(0, 4), how)
    assert sharded.keys() == whole.keys() and len(whole) > 4
    start = dict(tiny().named_parameters())
    for name in whole:
        torch.testing.assert_close(sharded[name], whole[name], rtol=rtol, atol=atol)
    assert max((whole[name] - start[name]).abs().max() for name in whole) > 1e-3


def test_ranks_are_sorted_alike_when_fsdp_shards_them(tmp_path):
    torchrun(SHARDED, str(tmp_path / "weights"), "sorted")
    sharded, whole = torch.load(tmp_path / "weights"), stepped(tiny(), slice(0, 4), "sorted")
    plain = stepped(tiny(), slice(0, 4))
    for name in (name for name in whole if "lora_A" in name):
        of_B = name.replace("lora_A", "lora_B")
        for b in (1, 3, 8):  # a direction's sign is arbitrary, its product is not
            got, want, unsorted = ((w[of_B][:, :b] @ w[name][:b]) for w in (sharded, whole, plain))
            torch.testing.assert_close(got, want, rtol=1e-3, atol=5e-5)
            assert (unsorted - want).abs().max() > 1e-3


def torchrun(code: str, *arguments: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        done = subprocess.run(
            [*TORCHRUN, file.name, *arguments],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr

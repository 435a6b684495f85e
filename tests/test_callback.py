"""The draw in the stock Hugging Face Trainer and in a plain PyTorch loop, on the CPU in float32."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import adapted, base, tokens
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from qdylora import Draw, DrawCallback, RankSettings, at_rank, attach, gate_of, load_adapter, set_rank
from qdylora.update import UPDATES

ROWS, ACCUMULATION = 2, 2
PER = ["step", "micro_batch", "sequence"]
# ids and labels of 24 rows: 6 steps of 2 x 2 rows are an epoch
DATA = [{"input_ids": row, "labels": row} for row in tokens(batch=24, length=9)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def arguments(folder, **kwargs) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 0,
    }
    return TrainingArguments(**settings | kwargs)


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys() and len(got) == 28
    for name, w in want.items():
        assert torch.equal(got[name], w), name


def watch(model) -> list[tuple[torch.Tensor, object]]:
    """A list that fills with (input ids, rank) of every forward pass in training."""
    seen = []

    def note(module, args, kwargs):
        if module.training:
            seen.append((kwargs["input_ids"].clone(), gate_of(model).rank))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def ranks_in(seen) -> list:
    return [rank for _, rank in seen]


def expected_ranks(draw: Draw, steps, micro_batches: int = ACCUMULATION) -> list:
    drawn = [draw.ranks_of_step(step, micro_batches, ROWS) for step in steps]
    return [tuple(micro.tolist()) if draw.per == "sequence" else micro[0] for ranks in drawn for micro in ranks]


@pytest.mark.parametrize("per", PER)
def test_the_trainer_uses_the_drawn_ranks(per, cache, tmp_path):
    model, draw = adapted("llama", 32, cache), Draw(r_max=8, per=per, seed=4)
    seen = watch(model)
    args = arguments(tmp_path, num_train_epochs=2)
    Trainer(model=model, args=args, train_dataset=DATA, callbacks=[DrawCallback(draw)]).train()
    assert ranks_in(seen) == expected_ranks(draw, range(12))
    assert len(set(ranks_in(seen))) > 3
    assert gate_of(model).rank == 8


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("per", PER)
def test_the_trainer_equals_a_plain_loop(per, update, cache, tmp_path):
    """A loop in plain PyTorch with `Draw` and `set_rank`, fed with the Trainer's batches. Masking is written out: rows
    above the step's largest rank, and Adam's state of them, are put back by hand. So is grading."""
    draw = Draw(r_max=8, per=per, seed=2)
    model = adapted("llama", 32, cache)
    seen = watch(model)
    args = arguments(tmp_path, max_steps=8)
    Trainer(model=model, args=args, train_dataset=DATA, callbacks=[DrawCallback(draw, update)]).train()
    batches = [ids for ids, _ in seen]

    loop = adapted("llama", 32, cache).train()
    params = {n: p for n, p in loop.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=0.0)

    def row_tensors(b):  # of every weight and of its state, rows b + 1 and up
        for name, p in params.items():
            for t in (p.data, *(s for s in optimizer.state[p].values() if s.ndim)):
                yield (name, t.data_ptr()), (t[b:] if "lora_A" in name else t[:, b:])

    for step in range(8):
        ranks = draw.ranks_of_step(step, ACCUMULATION, ROWS)
        for micro, ids in zip(ranks, batches[step * ACCUMULATION :], strict=False):
            set_rank(loop, micro.tolist())
            (loop(input_ids=ids, labels=ids).loss / ACCUMULATION).backward()
        kept = {key: rows.clone() for key, rows in row_tensors(ranks.max())}
        before = {name: p.detach().clone() for name, p in params.items()}
        optimizer.step()
        if update == "masked":
            for key, rows in row_tensors(ranks.max()):
                rows.copy_(kept.get(key, torch.zeros_like(rows)))
        if update == "graded":
            harmonic = sum(1 / i for i in range(1, 9))
            for name in (name for name in params if "lora_B" in name):
                for i in range(8):
                    moved = params[name].data[:, i] - before[name][:, i]
                    params[name].data[:, i] = before[name][:, i] + moved * 8 / harmonic / (i + 1)
        optimizer.zero_grad()
    for name, w in weights(model).items():
        # Rounding, which differs between one rank and a rank per row, decides Adam's steps of 1e-2 where a gradient is
        # almost zero.
        assert_close(w, params[name].data, rtol=1e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit"])
def test_drift_and_masked_train_different_weights(optim, cache, tmp_path):
    """So that equality with a reference is no accident, and `update` reaches the Trainer's optimizer."""
    trained = {}
    for update in ("drift", "masked"):
        model = adapted("llama", 32, cache)
        callback = DrawCallback(Draw(r_max=8, kind="list", ranks=(2,)), update)
        before = weights(model)
        args = arguments(tmp_path, max_steps=3, weight_decay=0.1, optim=optim)
        Trainer(model=model, args=args, train_dataset=DATA, callbacks=[callback]).train()
        above = [(p[2:] if "lora_A" in n else p[:, 2:], n) for n, p in weights(model).items()]
        trained[update] = [torch.equal(p, before[n][2:] if "lora_A" in n else before[n][:, 2:]) for p, n in above]
    assert all(trained["masked"]) and not any(trained["drift"])  # weight decay moves them


def test_an_unknown_update_rule_is_refused():
    with pytest.raises(ValueError, match="update is 'mask'; choose one of drift, masked, graded"):
        DrawCallback(Draw(), "mask")


def test_a_masked_8_bit_optimizer_stops_the_trainer(cache, tmp_path):
    model = adapted("llama", 32, cache, r_max=64)
    args = arguments(tmp_path, max_steps=2, optim="paged_adamw_8bit")
    trainer = Trainer(model=model, args=args, train_dataset=DATA, callbacks=[DrawCallback(Draw(), "masked")])
    with pytest.raises(ValueError, match="choose a 32-bit optimizer such as adamw, or update: drift"):
        trainer.train()


def test_a_checkpoint_is_an_adapter_of_every_rank(cache, tmp_path):
    model = adapted("llama", 32, cache, scale="constant", frozen=True)
    draw = Draw(r_max=8, kind="list", ranks=(2, 8), per="micro_batch", seed=9)
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    Trainer(model=model, args=args, train_dataset=DATA, callbacks=[DrawCallback(draw, "masked")]).train()
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        assert {"adapter_model.safetensors", "adapter_config.json", "qdylora.json"} <= {
            f.name for f in folder.iterdir()
        }
        settings = RankSettings.load(folder)
        assert (settings.r_max, settings.alpha, settings.scale) == (8, 16, "constant")
        assert (settings.frozen, settings.update) == (True, "masked")
        assert Draw(**settings.draw | {"ranks": tuple(settings.draw["ranks"])}) == draw
    # What is in the last one is the model as it is now, at every rank.
    loaded, ids = load_adapter(base("llama", 32, cache), folder).eval(), tokens()
    stock = PeftModel.from_pretrained(base("llama", 32, cache), str(folder)).eval()
    model.eval()
    with torch.no_grad():
        assert_close(stock(ids).logits, model(ids).logits, rtol=1e-5, atol=5e-6)
        for b in (1, 5, 8):
            with at_rank(model, b), at_rank(loaded, b):
                assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


class StopAt(TrainerCallback):
    """Stops training after `step`, as a run that was interrupted."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("update", ["drift", "masked"])
@pytest.mark.parametrize("per", ["step", "sequence"])
def test_20_steps_equal_10_and_10_more_after_a_resume_bit_for_bit(per, update, cache, tmp_path):
    draw = Draw(r_max=8, per=per, at_r_max=0.25 if per == "sequence" else 0, seed=1)

    def run(folder, seed, *callbacks, resume=None):
        torch.manual_seed(seed)
        model = attach(base("llama", 32, cache), r_max=8, dropout=0.1)
        seen = watch(model)
        args = arguments(
            folder, max_steps=20, save_strategy="steps", save_steps=10, lr_scheduler_type="cosine", warmup_steps=3,
            max_grad_norm=0.3, weight_decay=0.01,
        )  # fmt: skip
        callbacks = [DrawCallback(draw, update), *callbacks]
        trainer = Trainer(model=model, args=args, train_dataset=DATA, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        assert gate_of(model).rank == 8
        return weights(model), seen

    whole, seen_whole = run(tmp_path / "whole", 0)
    half, seen_half = run(tmp_path / "half", 0, StopAt(10))
    resumed, seen_rest = run(tmp_path / "half", 7, resume=str(tmp_path / "half" / "checkpoint-10"))
    assert len(seen_whole) == 40 and len(seen_half) == len(seen_rest) == 20
    assert ranks_in(seen_half) + ranks_in(seen_rest) == ranks_in(seen_whole) == expected_ranks(draw, range(20))
    for (got, _), (want, _) in zip(seen_half + seen_rest, seen_whole, strict=True):
        assert torch.equal(got, want)
    assert_same(resumed, whole)
    assert not any(torch.equal(half[name], w) for name, w in whole.items())


@pytest.mark.parametrize("per", PER)
def test_an_epoch_whose_last_batch_is_smaller(per, cache, tmp_path):
    """Seven rows in batches of two: the Trainer's default keeps the last row as a batch of one."""
    model, draw = adapted("llama", 32, cache), Draw(r_max=8, per=per)
    seen = watch(model)
    Trainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=1),
        train_dataset=DATA[:7],
        callbacks=[DrawCallback(draw)],
    ).train()
    used = [rank[: len(ids)] if per == "sequence" else rank for ids, rank in seen]
    want = expected_ranks(draw, range(2))
    assert used[:3] == want[:3] and len(used) == 4
    assert used[3] == (want[3][:1] if per == "sequence" else want[3])


@pytest.mark.parametrize("per", PER)
def test_the_trainer_s_evaluation_is_at_r_max_whatever_was_drawn(per, cache, tmp_path):
    """Held-out losses of different steps can be compared only at one rank; and a rank per row of the training batch
    fits no evaluation batch of another size."""
    model = adapted("llama", 32, cache)
    ranks = []
    model.register_forward_pre_hook(lambda module, _: None if module.training else ranks.append(gate_of(model).rank))
    args = arguments(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, logging_strategy="no"
    )
    draw = Draw(r_max=8, per=per, seed=2)
    trainer = Trainer(model=model, args=args, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=[DrawCallback(draw)])
    trainer.train()
    assert ranks == [8] * 4 * 2


def test_the_draw_s_r_max_and_the_adapter_s_have_to_agree(cache, tmp_path):
    """Refused before the first step: else ranks 9 to 64 stop the run when one is drawn."""
    model = adapted("llama", 32, cache)
    args = arguments(tmp_path, max_steps=1)
    trainer = Trainer(
        model=model, args=args, train_dataset=DATA, callbacks=[DrawCallback(Draw(r_max=64, kind="list", ranks=(3,)))]
    )
    with pytest.raises(ValueError, match=r"\b64\b.*\b8\b|\b8\b.*\b64\b"):
        trainer.train()
    assert trainer.state.global_step == 0


# Several processes ----------------------------------------------------------------------------------


def train_here(folder: Path, cache: Path, accumulation: int) -> None:
    """This process's share of six steps of eight rows, for each way to draw; writes what it saw and its weights."""
    torch.set_num_threads(1)
    process = os.environ.get("RANK", "alone")
    for per in PER:
        model = adapted("llama", 32, cache)
        seen = watch(model)
        # SGD, so that rounding of a gradient near zero is not blown up as Adam does
        args = arguments(folder, max_steps=6, gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=0.05)
        callback = DrawCallback(Draw(r_max=8, per=per, seed=3), "masked")
        Trainer(model=model, args=args, train_dataset=DATA, callbacks=[callback]).train()
        torch.save({"seen": seen, "weights": weights(model)}, folder / f"{per}-{process}.pt")


def test_two_processes_train_what_one_process_trains(cache, tmp_path):
    """2 processes x accumulation 2 (gloo) against 1 x 4: the same rows at the same ranks, and the same weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__).resolve().parent
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, str(tmp_path), str(cache), "2"]
    processes = [
        subprocess.Popen(command, env=env | {"RANK": p, "LOCAL_RANK": p}, stderr=subprocess.PIPE, text=True)
        for p in "01"
    ]
    try:
        train_here(tmp_path, cache, accumulation=4)
        for p in processes:
            _, errors = p.communicate(timeout=120)
            assert p.returncode == 0, errors
    finally:  # else one that lost the other would wait for it
        for p in processes:
            p.kill()
    start = weights(adapted("llama", 32, cache))
    for per in PER:
        alone, first, second = (torch.load(tmp_path / f"{per}-{who}.pt") for who in ("alone", "0", "1"))
        turns = [both for pair in zip(first["seen"], second["seen"], strict=True) for both in pair]
        assert len(turns) == 24 and ranks_in(turns) == ranks_in(alone["seen"])
        for (got, _), (want, _) in zip(turns, alone["seen"], strict=True):
            assert torch.equal(got, want)
        assert_same(first["weights"], second["weights"])
        for name, w in alone["weights"].items():
            assert (w - start[name]).abs().max() > 1e-4, (per, name)
        assert_close(first["weights"], alone["weights"], rtol=1e-4, atol=2e-6)


if __name__ == "__main__":
    train_here(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

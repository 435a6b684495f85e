"""Train a cell's adapter:  python -m experiments.train data=gsm8k method=qdylora

Hugging Face's Trainer with the draw as a callback. Killed at any moment and started again, it goes on from its
last whole checkpoint, with the same draws and the same data.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from eval.hub import fetched
from experiments import checkpoints
from experiments.attempt import attempt
from experiments.cell import Cell, note, peak_memory
from experiments.cli import command, quiet, verdict
from experiments.data.encode import CompletionCollator
from experiments.examples import Examples, Ordered, order, prepare
from experiments.files import read_json, seal, write_json
from experiments.method import adapted, adapts_ranks, base_settings, draw
from experiments.mistakes import mistakes_in
from experiments.monitor import Finite, HeldOutLoss, Log, ProgressBar, StopAtSignal, TokenBudget, read_log
from experiments.schema import Config
from experiments.signals import until_saved
from experiments.tracker import Tracker
from experiments.twin import take_over
from qdylora import DrawCallback, load_base, load_tokenizer
from qdylora.adalora import Allocate
from qdylora.adapter import SETTINGS_FILE
from qdylora.base import contiguous_head_input
from qdylora.export import adapter_bytes

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "sgd": "sgd",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def train(cell: Cell) -> dict:
    """Train the adapter of `cell` unless it is trained; returns what was spent (`training.json`).

    In all processes that torchrun or srun started; the first one writes.
    """
    config = cell.config
    arguments = training_arguments(config, cell.folder / "checkpoints")  # from here on the processes know each other
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            take_over(cell)
        done = read_json(cell.folder / "training.json")
    if done:
        shutil.rmtree(cell.folder / "checkpoints", ignore_errors=True)  # killed while it was being removed
        return done
    log = cell.folder / "log.jsonl"
    with arguments.main_process_first(local=False):
        tokenizer = base_tokenizer(cell)
        with mistakes_in(f"data {config.data.name}"):
            examples = prepare(config, tokenizer)
        start = None if adapts_ranks(config) else checkpoints.last_good(cell.folder / "checkpoints")
        step = checkpoints.step_of(start) if start else 0
        if arguments.process_index == 0:
            read_log(log, up_to=step, rewrite=True)
    set_seed(config.seed)
    trainer = make_trainer(cell, adapted_model(cell), examples, tokenizer, arguments)
    if start and arguments.process_index == 0:
        note(f"{cell.name}: going on from step {step}")
    with until_saved():
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            return _conclude(cell, trainer, examples, read_log(log))
        return read_json(cell.folder / "training.json")


def base_id(cell: Cell) -> dict:
    """The arguments that name a cell's base model and tokenizer."""
    model = cell.config.model
    return {"model_id": model.id, "revision": model.revision, "cache": cell.cache, "random_config": model.random}


def base_tokenizer(cell: Cell) -> PreTrainedTokenizerBase:
    with _reading_model(cell.config.model.id):
        return load_tokenizer(**base_id(cell))


def _reading_model(model_id: str) -> AbstractContextManager:
    """What is wrong with a model is said by its name, and how to get it if it is the hub's."""
    what = f"model.id {model_id!r}"
    here = model_id == "random" or model_id.startswith("package:") or Path(model_id).exists()
    return mistakes_in(what) if here else fetched(what)


def base_model(cell: Cell) -> PreTrainedModel:
    """The cell's frozen base, quantized as its method says."""
    c = cell.config
    with _reading_model(c.model.id):
        model = load_base(**base_id(cell), **base_settings(c))
    model.config.use_cache = False
    return model


def adapted_model(cell: Cell) -> PeftModel:
    """The base with a fresh adapter."""
    base = base_model(cell)
    with mistakes_in("method.targets"):
        return adapted(base, cell.config)


def make_trainer(cell: Cell, model: PeftModel, examples: Examples, tokenizer, arguments: TrainingArguments) -> Trainer:
    c = cell.config
    lengths = [len(e) for e in examples.train]
    data = Ordered(examples.train, order(lengths, c.budget.steps, c.budget.batch, c.seed, c.optim.group_by_length))
    if c.optim.checkpoint_activations:
        model.enable_input_require_grads()
    contiguous_head_input(model)
    draws = DrawCallback(draw(c), c.method.update)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=CompletionCollator.of(tokenizer),
        callbacks=[
            draws,
            *([Allocate()] if adapts_ranks(c) else []),
            checkpoints.Seal(),
            Log(cell.folder / "log.jsonl", draws),  # before HeldOutLoss, whose time is not the step's
            HeldOutLoss(c, examples.held_out),
            TokenBudget(c.budget.tokens),
            Finite(draws),
            ProgressBar(cell.name, draws),
            Tracker(cell),
            StopAtSignal(),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(c: Config, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for a configuration. ConfigError if the batch does not divide among processes."""
    warm_up = c.optim.schedule == "constant" and c.optim.warmup_ratio > 0
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=c.budget.steps,
        per_device_train_batch_size=c.optim.micro_batch,
        optim=OPTIMIZERS[c.optim.name],
        learning_rate=c.optim.lr,
        adam_beta2=c.optim.beta2,
        weight_decay=c.optim.weight_decay,
        max_grad_norm=c.optim.max_grad_norm,
        lr_scheduler_type="constant_with_warmup" if warm_up else c.optim.schedule,
        warmup_steps=c.optim.warmup_ratio,  # a value below 1 is a share of the steps
        gradient_checkpointing=c.optim.checkpoint_activations,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="sequential",  # `Ordered` is in order already
        dataloader_drop_last=True,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=c.checkpoint_every,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        include_num_input_tokens_seen="non_padding",
        report_to=[],
        disable_tqdm=True,
        seed=c.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    processes = arguments.world_size * c.optim.micro_batch
    arguments.gradient_accumulation_steps = checkpoints.divided(c.budget.batch, processes)
    return arguments


def _conclude(cell: Cell, trainer: Trainer, examples: Examples, log: list[dict]) -> dict:
    """Put the last checkpoint's adapter in its place and write what training spent."""
    last = checkpoints.last_good(cell.folder / "checkpoints")
    draft = cell.folder / ".adapter"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", SETTINGS_FILE):
        shutil.copy(last / name, draft / name)
    seal(draft)
    shutil.rmtree(cell.adapter, ignore_errors=True)
    draft.rename(cell.adapter)
    c = cell.config
    ranks = np.array([rank for line in log for rank in line["ranks"]])
    frozen = c.method.gate == "frozen"
    rows = np.arange(1, c.ranks.r_max + 1)[:, None]
    spent = {
        "budget": {
            "asked": cell.budget,
            "spent": {
                "steps": trainer.state.global_step,
                "examples": trainer.state.global_step * c.budget.batch,
                "tokens": trainer.state.num_input_tokens_seen,
                "seconds": round(sum(line["seconds"] for line in log), 1),
            },
        },
        "data": examples.report,
        "peak_memory_bytes": peak_memory(),
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "compute_dtype": str(trainer.model.dtype).removeprefix("torch."),
        "final_loss": log[-1]["loss"],
        "updates": ((ranks == rows) if frozen else (ranks >= rows)).sum(axis=1).tolist(),
        "expected_updates": (draw(c).expected_updates(len(log), frozen) * c.budget.batch).round(3).tolist(),
        "adapter_bytes": {str(b): adapter_bytes(trainer.model, b) for b in c.ranks.eval},
    }
    write_json(cell.folder / "training.json", spent)
    shutil.rmtree(cell.folder / "checkpoints")
    return spent


def main(config: Config) -> int:
    quiet()
    cell = Cell(config)
    trained = attempt(cell, lambda: train(cell))
    if trained is None:
        return verdict(cell.ended())
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(trained["budget"]["spent"]))
    return 0


if __name__ == "__main__":
    command(main)

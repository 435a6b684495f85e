"""A trained cell's adapter for use elsewhere:  python -m experiments.export data=gsm8k method=qdylora rank=8 out=FOLDER

The cell may also be named by its folder (cell=FOLDER). rank=best takes the rank that validation items choose; with
ranks=[1,8,64] `out` gets a folder for each. cut=svd takes the best approximation of that rank and
cut=truncate_alpha_over_b rescales, for an adapter trained at one rank. A folder holds a README.md and one of
    an ordinary PEFT adapter of that rank
    merge=true             the whole model in bfloat16, which transformers loads
    gguf=true              adapter.gguf, for llama.cpp's --lora
    merge=true gguf=true   model.gguf, the whole model for llama.cpp, where the base is a GGUF file
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedConfig

from analysis.layout import to_markdown
from analysis.pick import Distance, pick, sentence
from analysis.records import read as read_record
from analysis.scores import scores
from experiments.card import card, public_name
from experiments.cell import Cell, note
from experiments.checks import out_of_range
from experiments.chosen import chosen
from experiments.cli import command, quiet
from experiments.files import new_folder
from experiments.method import adapts_ranks
from experiments.mistakes import ConfigError, mistakes_in
from experiments.pick import as_cut, scored
from experiments.schema import Config, ExportSettings
from experiments.score import trained_adapter
from experiments.train import base_id, base_model, base_tokenizer
from qdylora import adapter_to_gguf, export_rank, load_config, merge_into, merge_into_gguf
from qdylora.base import gguf_file

OPTIONS = "export"


@dataclass(frozen=True)
class Exporting:
    """One adapter of a cell and the form in which it is exported."""

    cell: Cell
    settings: ExportSettings

    def write(self, rank: int, target: Path, why: str) -> None:
        """The folder `target` with the adapter at `rank`; `why` that rank goes to its card."""
        with new_folder(target) as draft:
            self.form(rank, draft)
            (draft / "README.md").write_text(card(self.cell, rank, self.settings, why, self.scores), encoding="utf-8")

    @property
    def scores(self) -> str | None:
        """The table of all ranks for the card, None if the cell was not scored, or not with its adapter cut so."""
        record = read_record(self.cell.record_file) if self.cell.record_file.is_file() else None
        found = as_cut(record, self.settings.cut) if record and record.done else None
        return to_markdown(scores(found)) if found else None

    @property
    def form(self) -> Callable[[int, Path], None]:
        merge, gguf = self.settings.merge, self.settings.gguf
        if gguf:
            return self._merged_gguf if merge else self._adapter_gguf
        return self._merged if merge else self._adapter

    def check(self) -> None:
        """ConfigError for an adapter that cannot be cut, or a form that this base model cannot be written in."""
        if adapts_ranks(self.cell.config):
            raise ConfigError(
                "method.gate is 'adalora', whose adapter has one rank and a form of PEFT's own; "
                f"use {self.cell.adapter} as it is"
            )
        model = self.cell.config.model
        if self.settings.gguf and (kind := self._base_config().model_type) != "llama":
            raise ConfigError(
                f"gguf is true, but {model.name} is a {kind!r} model; GGUF is written for LLaMA models only"
            )
        if self.settings.gguf and self.settings.merge and self._base_file() is None:
            raise ConfigError(
                f"merge and gguf are true, but model.id {model.id!r} is no GGUF file, whose tokenizer could be kept; "
                "export with merge=true alone and convert that folder with llama.cpp's convert_hf_to_gguf.py"
            )

    def _adapter(self, rank: int, folder: Path) -> None:
        base = public_name(self.cell.config.model)
        export_rank(self.cell.adapter, rank, folder, cut=self.settings.cut, base=base)

    def _merged(self, rank: int, folder: Path) -> None:
        c = self.cell.config
        in_16_bits = replace(c, method=replace(c.method, bits=16), optim=replace(c.optim, compute_dtype="bfloat16"))
        model = merge_into(base_model(Cell(in_16_bits)), self.cell.adapter, rank, cut=self.settings.cut)
        model.config.use_cache = True  # training goes without
        model.save_pretrained(folder)
        base_tokenizer(self.cell).save_pretrained(folder)

    def _adapter_gguf(self, rank: int, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as plain:
            self._adapter(rank, Path(plain))
            adapter_to_gguf(plain, self._base_config(), folder / "adapter.gguf")

    def _merged_gguf(self, rank: int, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as plain:
            self._adapter(rank, Path(plain))
            merge_into_gguf(plain, self._base_file(), folder / "model.gguf")

    def _base_config(self) -> PreTrainedConfig:
        with mistakes_in(f"model.id {self.cell.config.model.id!r}"):
            return load_config(**base_id(self.cell))

    def _base_file(self) -> Path | None:
        model_id = self.cell.config.model.id
        return None if model_id == "random" else gguf_file(model_id)


def asked(config: Config, cell: Cell) -> dict[int, str]:
    """The ranks to export, and why a rank if it was chosen here."""
    settings = config.export
    if settings.rank in (None, "best") and not settings.ranks:
        with mistakes_in("rank is 'best'"):
            picked = pick(scored(config, OPTIONS), Distance(0, share=True))
        return {picked.rank: sentence(picked)}
    ranks = settings.ranks or [settings.rank]
    for complaint in out_of_range("export.rank", ranks, cell.config):
        raise ConfigError(complaint)
    return dict.fromkeys(ranks, "")


def targets(settings: ExportSettings, cell: Cell, ranks: list[int]) -> dict[int, Path]:
    """Where each rank goes. ConfigError for a folder that holds something."""
    parent = Path(settings.out) if settings.out else cell.folder / "exported"
    found = {rank: parent / f"rank-{rank}" for rank in ranks}
    if settings.out and not settings.ranks:
        found = dict.fromkeys(ranks, parent)
    for folder in found.values():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"out is {str(folder)!r}, which is not empty; remove it or name another folder with out=")
    return found


def main(config: Config) -> None:
    quiet()
    cell = chosen(config, OPTIONS)
    exporting = Exporting(cell, config.export)
    exporting.check()
    trained_adapter(cell)
    ranks = asked(config, cell)
    for rank, folder in targets(config.export, cell, [*ranks]).items():
        if ranks[rank]:
            note(ranks[rank])
        exporting.write(rank, folder, ranks[rank])
        print(folder)


if __name__ == "__main__":
    command(main, OPTIONS)

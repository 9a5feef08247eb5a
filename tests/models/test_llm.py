"""Which LLMs can read concepts, and what makes two of them the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CpmAntConfig,
    CpmAntForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import toy
from compllm_rag.errors import ConfigurationError, UnknownModelError, UnsupportedDtypeError, UnsupportedModelError
from compllm_rag.models import checkpoints
from compllm_rag.models.llm import TargetLLM, decoder_of
from compllm_rag.models.tokenizer import load_tokenizer

TOKENIZER = toy.tokenizer()


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=400, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


def cpm_ant() -> Any:
    return CpmAntForCausalLM(
        CpmAntConfig(
            vocab_size=400, hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=16, num_hidden_layers=1,
            prompt_types=2, prompt_length=2, segment_types=2,
        )
    )  # fmt: skip


def gemma3n() -> Any:
    return Gemma3nForCausalLM(
        Gemma3nTextConfig(
            vocab_size=400, vocab_size_per_layer_input=400, hidden_size=16, hidden_size_per_layer_input=4,
            intermediate_size=[16, 16], num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, laurel_rank=2,
            altup_num_inputs=2, activation_sparsity_pattern=[0.0, 0.0], pad_token_id=0,
        )
    )  # fmt: skip


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("make", "trouble"),
    [
        (t5, "encoder-decoder"),
        (cpm_ant, "takes no inputs_embeds"),
        (gemma3n, "per-layer embeddings"),
        (gpt2, "GPT2LMHeadModel"),
    ],
)
def test_models_that_cannot_read_concepts_are_refused_by_reason(make: Any, trouble: str) -> None:
    with pytest.raises(UnsupportedModelError, match=trouble) as caught:
        TargetLLM(make(), TOKENIZER)
    assert isinstance(caught.value, TypeError)
    assert "choose another target LLM" in str(caught.value)


def test_a_folder_with_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="cannot load this model"):
        TargetLLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "int8", "fp32"])
def test_other_dtypes_are_refused_before_anything_is_loaded(dtype: str) -> None:
    with pytest.raises(UnsupportedDtypeError, match=r"float32, bfloat16, float16 or auto"):
        TargetLLM.from_pretrained("no-such-model", dtype=dtype)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UnknownModelError, match="no-such-model"):
        TargetLLM.from_pretrained("no-such-model", offline=True)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_a_folder_is_loaded_frozen_in_the_dtype_asked_for(
    toy_folder: Path, dtype: str | None, expected: torch.dtype
) -> None:
    llm = TargetLLM.from_pretrained(toy_folder, dtype=dtype, device="cpu")
    assert llm.dtype == expected
    assert llm.device.type == "cpu"
    assert (llm.hidden_size, llm.window) == (32, 2048)
    assert not llm.model.training
    assert not any(parameter.requires_grad for parameter in llm.model.parameters())


@pytest.fixture
def half_folder(toy_folder: Path, tmp_path: Path) -> Path:
    """The toy LLM as a checkpoint of bfloat16."""
    folder = Path(shutil.copytree(toy_folder, tmp_path / "half"))
    toy.model().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_weights_are_read_in_the_checkpoints_dtype_first(
    half_folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    read, load = [], AutoModelForCausalLM.from_pretrained

    def spy(*args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        read.append(next(loaded[0].parameters()).dtype)
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    llm = TargetLLM.from_pretrained(half_folder, dtype=dtype, device="cpu")
    assert read == [torch.float32 if dtype == "float32" else torch.bfloat16]
    assert llm.dtype == {"auto": torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    assert llm.identity == TargetLLM.from_pretrained(half_folder, dtype="float32", device="cpu").identity


def test_auto_is_the_checkpoints_own_dtype(toy_folder: Path) -> None:
    assert TargetLLM.from_pretrained(toy_folder, dtype="auto", device="cpu").dtype == torch.float32


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map_of_one_device_is_a_place(half_folder: Path, device_map: Any) -> None:
    llm = TargetLLM.from_pretrained(half_folder, device_map=device_map)
    assert (llm.device.type, llm.dtype) == ("cpu", torch.bfloat16)
    ids = torch.tensor([[1, 2, 3]])
    assert llm.model(input_ids=ids).logits.isfinite().all()


def test_device_maps_that_cannot_be_used_are_refused(toy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="exclude each other"):
        TargetLLM.from_pretrained(toy_folder, device="cpu", device_map="auto")
    model = toy.model()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(UnsupportedModelError, match="several devices"):
        checkpoints._on_one_device(model)


def test_the_device_is_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert checkpoints.default_device() == expected


@pytest.mark.parametrize(
    ("quantised", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptqmodel"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_quantised_weights_name_the_package_that_is_missing(
    toy_folder: Path, tmp_path: Path, quantised: dict[str, Any], package: str
) -> None:
    folder = Path(shutil.copytree(toy_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(UnsupportedModelError, match=f"pip install {package}") as caught:
        TargetLLM.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="quantised"):
        TargetLLM.from_pretrained(folder, reader=tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_folder_is_a_typed_error(toy_folder: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(toy_folder, tmp_path / "model"))
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises((UnsupportedModelError, UnknownModelError)):
        TargetLLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_files_of_a_later_release_are_a_typed_error(toy_folder: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(toy_folder, tmp_path / "model"))
    config = json.loads((folder / name).read_text())
    if name == "tokenizer.json":
        config["model"]["type"] = "XYZ"
    elif name == "config.json":
        config["hidden_size"] = "wide"
    else:
        config = ["none"]
    (folder / name).write_text(json.dumps(config))
    with pytest.raises((UnsupportedModelError, UnknownModelError)):
        TargetLLM.from_pretrained(folder)
    if name != "config.json":
        with pytest.raises((UnsupportedModelError, UnknownModelError)):
            load_tokenizer(str(folder))


def test_weights_that_lack_a_tensor_are_never_filled_with_random_ones(toy_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_folder, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj"):
        TargetLLM.from_pretrained(folder)


def test_weights_of_other_shapes_are_refused(toy_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_folder, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    save_file({k: v[:16].clone() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="cannot load this model"):
        TargetLLM.from_pretrained(folder)


# Identity


def test_a_folder_has_one_identity_wherever_it_lies_and_whatever_it_computes_in(
    toy_folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(toy_folder, tmp_path / "elsewhere"))
    loads = [(toy_folder, "float32"), (toy_folder, "bfloat16"), (copy, None)]
    assert len({TargetLLM.from_pretrained(path, dtype=dtype).identity for path, dtype in loads}) == 1


def test_a_model_in_memory_has_the_identity_of_its_tensors_settings_and_vocabulary() -> None:
    known = toy.llm().identity
    assert toy.llm().identity == known
    others = [toy.llm(seed=1), toy.llm(layers=1), *(toy.llm(a) for a in toy.ARCHITECTURES[1:])]
    others.append(TargetLLM(toy.model(), toy.tokenizer(text="Other text, other merges. " * 5)))
    # Same tensors, other settings: what the model does is not the same.
    changed = toy.model()
    changed.config.rms_norm_eps = 1e-2
    others.append(TargetLLM(changed, toy.tokenizer()))
    assert len({known, *(llm.identity for llm in others)}) == len(others) + 1


def test_using_a_model_does_not_change_its_identity() -> None:
    llm = toy.llm()
    before = llm.identity
    llm.model.generate(torch.tensor([[50, 60]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert TargetLLM(llm.model, llm.tokenizer).identity == before


def test_digests_given_are_the_identity(toy_folder: Path) -> None:
    one, two = (TargetLLM(toy.model(), TOKENIZER, digests={"model": digest}) for digest in ("aa", "ab"))
    assert one.identity != two.identity
    assert one.identity == TargetLLM(toy.model(seed=5), TOKENIZER, digests={"model": "aa"}).identity


# Embeddings and stop tokens


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_embeddings_are_those_that_the_first_layer_reads(architecture: str) -> None:
    llm = toy.llm(architecture)
    read: list[torch.Tensor] = []
    decoder_of(llm.model).layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: read.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    llm.model(input_ids=torch.tensor([[50, 60, 70]]))
    assert torch.equal(llm.embed([50, 60, 70]), read[0][0])


def test_no_tokens_have_no_embeddings(llm: TargetLLM) -> None:
    assert llm.embed([]).shape == (0, 32)


def test_stop_tokens_are_those_of_tokenizer_model_and_generation_settings() -> None:
    llm = toy.llm()
    assert llm.stop_ids() == {3}
    llm.model.generation_config.eos_token_id = [3, 7]
    assert llm.stop_ids() == {3, 7}
    llm.model.config.eos_token_id = 9
    assert llm.stop_ids() == {3, 7, 9}
    llm.tokenizer.eos_token = "<|start|>"
    assert llm.stop_ids() == {2, 3, 7, 9}


def test_a_model_without_stop_tokens_has_none() -> None:
    llm = toy.llm()
    llm.model.generation_config.eos_token_id = llm.model.config.eos_token_id = llm.tokenizer.eos_token = None
    assert llm.stop_ids() == set()


def test_settings_of_the_folder_reach_the_model(toy_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_folder, tmp_path / "model"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 77}))
    assert TargetLLM.from_pretrained(folder).window == 77

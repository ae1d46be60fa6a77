import json
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig, UserError
from fastgpt.model.hub import resolve_model_folder

SHAPES = [
    {"vocab_size": 128, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4},
    {"vocab_size": 301, "n_positions": 17, "n_embd": 60, "n_layer": 3, "n_head": 5},
    {"vocab_size": 99, "n_positions": 40, "n_embd": 32, "n_layer": 1, "n_head": 1, "tie_word_embeddings": False},
    {"vocab_size": 1000, "n_positions": 64, "n_embd": 96, "n_layer": 2, "n_head": 2, "layer_norm_epsilon": 1e-3},
]


def theirs(shape, seed=0):
    """A transformers model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def assert_same(ours, hf):
    T = hf.config.n_positions
    ids = torch.randint(hf.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), hf(ids).logits, rtol=0, atol=1e-4)


@pytest.fixture
def folder(tmp_path):
    theirs(SHAPES[0]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_opens_what_transformers_wrote_and_the_other_way_round(shape, tmp_path):
    hf = theirs(shape)
    hf.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert not ours.training
    assert_same(ours, hf)
    ours.save_pretrained(tmp_path / "ours", eos_token_id=5)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert back.config.eos_token_id == 5
    assert_same(ours, back.eval())
    again = GPT.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    for a, b in zip(again.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sharded_safetensors(tmp_path):
    hf = theirs(SHAPES[1])
    hf.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(GPT.from_pretrained(tmp_path), hf)


def test_pytorch_bin_whole_and_sharded(folder, tmp_path):
    hf = theirs(SHAPES[0])
    (folder / "model.safetensors").unlink()
    state = hf.state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    assert_same(GPT.from_pretrained(folder), hf)
    (folder / "pytorch_model.bin").unlink()
    names = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for shard in set(names.values()):
        torch.save({n: t for n, t in state.items() if names[n] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert_same(GPT.from_pretrained(folder), hf)


def test_old_files_without_prefix_and_with_buffers(folder):
    """The hub's own `gpt2` is such a one."""
    hf = theirs(SHAPES[0])
    tensors = {n.removeprefix("transformer."): t.contiguous() for n, t in hf.transformer.state_dict().items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors")
    assert_same(GPT.from_pretrained(folder), hf)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_files_load_as_float32_unless_asked(folder, dtype):
    hf = theirs(SHAPES[0]).to(dtype)
    hf.save_pretrained(folder)
    ours = GPT.from_pretrained(folder)
    assert ours.transformer.wte.weight.dtype == torch.float32
    assert_same(ours, hf.float())
    low = GPT.from_pretrained(folder, dtype=dtype)
    low.save_pretrained(folder / "low")
    assert load_file(folder / "low/model.safetensors")["transformer.wpe.weight"].dtype == dtype
    assert transformers.AutoModelForCausalLM.from_pretrained(folder / "low").dtype == dtype


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, words):
    with pytest.raises(UserError, match=words) as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_named_with_both_shapes(folder):
    name = "transformer.h.1.mlp.c_fc.weight"
    plain = load_file(folder / "model.safetensors")
    edit(folder, lambda t: t.pop(name))
    refused(folder, f"the tensor {name} is missing")
    save_file(plain, folder / "model.safetensors")
    edit(folder, lambda t: t.update({name: torch.zeros(64, 255)}))
    refused(folder, rf"{name} has shape \(64, 255\), but its config.json asks for \(64, 256\)")
    edit(folder, lambda t: t.update({name: torch.zeros(64)}))
    refused(folder, rf"{name} has shape \(64,\), but")
    save_file(plain, folder / "model.safetensors")
    edit(folder, lambda t: t.update({"transformer.wte.weight": torch.zeros(127, 64)}))
    refused(folder, r"wte.weight has shape \(127, 64\), but its config.json asks for \(128, 64\)")
    save_file(plain | {"transformer.h.2.ln_1.weight": torch.ones(64)}, folder / "model.safetensors")
    refused(folder, "the tensor transformer.h.2.ln_1.weight has no place")
    save_file(plain | {name: torch.zeros(64, 256, dtype=torch.int8)}, folder / "model.safetensors")
    refused(folder, f"{name} has dtype torch.int8")


def test_another_architecture(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    refused(tmp_path, "model_type is 'llama', only 'gpt2' can be loaded")


def test_damaged_folders(folder, tmp_path):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    refused(folder, "model.safetensors is damaged or cut short")
    weights.write_bytes(b"")
    refused(folder, "model.safetensors is damaged or cut short")
    weights.unlink()
    refused(folder, "has no weights: none of model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    refused(folder, r"part-1.safetensors is missing, though model.safetensors.index.json names it")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "is no index of shards")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    refused(folder, "is missing")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
    refused(tmp_path / "a/b/c", "no model at")


def test_a_pickle_that_runs_code_is_not_run(folder):
    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "was_here"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Evil()}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin cannot be read as plain weights")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    refused(folder, "pytorch_model.bin cannot be read as plain weights")
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    refused(folder, "holds something else than a model's weights")
    assert not (folder / "was_here").exists()


def test_a_hub_id_without_the_hub(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("no-such-org/no-such-model", "no folder no-such-org/no-such-model; .*pip install huggingface_hub")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("no-such-org/no-such-model", "the Hugging Face hub did not give .*: no network$")


def test_a_hub_id_is_downloaded(monkeypatch, folder):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folder))
    assert_same(GPT.from_pretrained("some-org/some-model"), theirs(SHAPES[0]))


def test_saving_over_an_old_folder_leaves_no_litter(folder):
    GPT(GPTConfig.preset("micro", vocab_size=70)).save_pretrained(folder)
    GPT(GPTConfig.preset("micro", vocab_size=80)).save_pretrained(folder)
    assert GPT.from_pretrained(folder).config.vocab_size == 80
    assert not list(folder.glob("*tmp*"))


def test_a_run_folder_means_its_newest_checkpoint(tmp_path):
    for name in ("step_9", "step_10", "step_11.tmp-5", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "config.json").write_text("{}")
    (tmp_path / "checkpoints/step_12").mkdir()  # no model in it
    assert resolve_model_folder(tmp_path).name == "step_10"
    (tmp_path / "model").mkdir()  # not there yet
    assert resolve_model_folder(tmp_path).name == "step_10"
    (tmp_path / "model/adapter_config.json").write_text("{}")
    assert resolve_model_folder(tmp_path) == tmp_path / "model"
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        resolve_model_folder(tmp_path / "empty")

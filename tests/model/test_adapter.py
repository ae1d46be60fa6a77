import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from adapters import KINDS, assert_close, ids, logits, randomize, theirs, with_peft, write_base
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig, Tokenizer, UserError
from fastgpt.model.adapter import ONLY, READ, load_adapter, read_config, save_adapter
from fastgpt.model.hub import resolve_model_folder
from fastgpt.model.lora import LoRAConfig, adapter_names, apply_lora, merge, set_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(base, tmp_path):
    """A folder that PEFT wrote."""
    with_peft(base).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_what_is_written_here(base, kind, tmp_path):
    ours = GPT.from_pretrained(base)
    apply_lora(ours, rank=5, alpha=7, **KINDS[kind])
    randomize(ours)
    assert (logits(ours) - logits(GPT.from_pretrained(base))).abs().max() > 0.1
    save_adapter(ours, tmp_path, base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that are missing or have no place
        warnings.simplefilter("ignore", FutureWarning)
        hf = peft.PeftModel.from_pretrained(theirs(base), tmp_path)
    assert_close(logits(ours), logits(hf))
    again = GPT.from_pretrained(tmp_path)
    assert not again.training
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("kind", KINDS)
def test_opens_what_peft_wrote(base, kind, tmp_path):
    hf = with_peft(base, lora_dropout=0.3, **KINDS[kind])
    hf.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert_close(logits(ours), logits(hf))
    save_adapter(ours, tmp_path / "again", base)
    assert_close(logits(peft.PeftModel.from_pretrained(theirs(base), tmp_path / "again")), logits(hf))
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["lora_dropout"] == 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*h\.1\.(attn|mlp)\.c_proj"},
        {"target_modules": ["transformer.h.0.mlp.c_fc", "c_attn"]},
        {"rank_pattern": {"c_attn": 2, r"h\.1\.mlp\.c_fc": 7}, "alpha_pattern": {"mlp.c_proj": 3, "attn.c_proj": 5}},
        {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"c_fc": 1}, "use_rslora": True, "use_dora": True},
    ],
    ids=str,
)
def test_every_way_to_name_the_layers(base, options, tmp_path):
    hf = with_peft(base, **options)
    hf.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert_close(logits(ours), logits(hf))
    save_adapter(ours, tmp_path / "again", base)
    assert_close(logits(peft.PeftModel.from_pretrained(theirs(base), tmp_path / "again")), logits(hf))


def test_all_linear_as_a_word(base, folder):
    edit(folder, target_modules="ALL-linear")
    assert_close(logits(GPT.from_pretrained(folder)), logits(with_peft(base)))


def test_an_adapter_of_a_bare_gpt2model(base, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, target_modules=["c_attn"])
        bare = peft.get_peft_model(transformers.GPT2Model.from_pretrained(base), config)
    randomize(bare)
    bare.save_pretrained(tmp_path)
    hidden = bare.eval()(ids()).last_hidden_state.detach()
    assert_close(logits(GPT.from_pretrained(tmp_path)), hidden @ theirs(base).lm_head.weight.detach().T)


def test_old_folders_with_a_pickle(base, folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert_close(logits(GPT.from_pretrained(folder)), logits(with_peft(base)))


def test_several_adapters_from_folders(base, tmp_path):
    expected = {}
    ours = GPT.from_pretrained(base)
    plain = logits(ours)
    for i, kind in enumerate(KINDS):
        hf = with_peft(base, r=i + 1, target_modules=["c_attn"] if i % 2 else ["c_fc", "c_attn"], **KINDS[kind])
        hf.save_pretrained(tmp_path / kind)
        expected[kind] = logits(hf)
        load_adapter(ours, tmp_path / kind, kind)
        assert_close(logits(ours), expected[kind])  # the last one loaded is active
    assert adapter_names(ours) == sorted(KINDS)
    for kind in reversed(KINDS):
        set_adapter(ours, kind)
        assert_close(logits(ours), expected[kind])
    set_adapter(ours, None)
    assert torch.equal(logits(ours), plain)
    save_adapter(ours, tmp_path / "one", base, name="dora")
    assert_close(logits(peft.PeftModel.from_pretrained(theirs(base), tmp_path / "one")), expected["dora"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_is_saved_as_it_computes(base, kind, tmp_path):
    ours = GPT.from_pretrained(base)
    plain = logits(ours)
    apply_lora(ours, **KINDS[kind])
    randomize(ours)
    adapted = logits(ours)
    ours.save_pretrained(tmp_path / "active")
    assert_close(logits(theirs(tmp_path / "active")), adapted)
    assert torch.equal(logits(ours), adapted)  # and is left as it was
    merge(ours)
    ours.save_pretrained(tmp_path / "merged")
    for name, tensor in load_file(tmp_path / "active/model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "merged/model.safetensors")[name])
    off = GPT.from_pretrained(base)
    apply_lora(off)
    set_adapter(off, None)
    off.save_pretrained(tmp_path / "off")
    assert torch.equal(logits(GPT.from_pretrained(tmp_path / "off")), plain)


def test_16_bit_bases(base, folder, tmp_path):
    """The adapter stays in float32 beside it, and is saved so."""
    ours = GPT.from_pretrained(base, dtype=torch.bfloat16)
    load_adapter(ours, folder)
    layer = ours.transformer.h[0].attn.c_attn
    assert layer.weight.dtype == torch.bfloat16
    assert layer.adapter.lora_A.dtype == torch.float32
    assert logits(ours).dtype == torch.bfloat16
    assert_close(logits(ours).float(), logits(with_peft(base)), atol=0.1)
    save_adapter(ours, tmp_path / "again", base)
    for name, tensor in load_file(tmp_path / "again/adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(folder / "adapter_model.safetensors")[name])


# Where the base is


def test_the_base_is_found_however_the_folders_are_named(folder, tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    ours = GPT.from_pretrained(tmp_path / "base")
    apply_lora(ours)
    monkeypatch.chdir(tmp_path)
    save_adapter(ours, "adapter2", "base")
    assert json.loads((tmp_path / "adapter2/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    edit(tmp_path / "adapter2", base_model_name_or_path="base")
    GPT.from_pretrained("adapter2")
    monkeypatch.chdir("/")
    edit(tmp_path / "adapter2", base_model_name_or_path="../base")
    GPT.from_pretrained(tmp_path / "adapter2")


def test_a_base_from_the_hub(base, folder, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        return str(base if name == "some-org/base" else folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    edit(folder, base_model_name_or_path="some-org/base")
    GPT.from_pretrained("some-org/adapter")
    assert asked == ["some-org/adapter", "some-org/base"]
    ours = GPT.from_pretrained(base)
    apply_lora(ours)
    save_adapter(ours, folder, "some-org/base")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some-org/base"


def test_a_base_that_is_gone(folder):
    edit(folder, base_model_name_or_path="/no/such/base")
    refused(folder, r"the base of the adapter .* is not at /no/such/base any more: put it back, or write where")
    edit(folder, base_model_name_or_path=None)
    refused(folder, "names no base: write its folder or hub id into the field base_model_name_or_path")
    edit(folder, base_model_name_or_path=str(folder))
    refused(folder, "which is an adapter itself: `fastgpt merge` that one first")


def test_runs_whose_checkpoints_are_adapters(folder, tmp_path):
    step = tmp_path / "run/checkpoints/step_3"
    step.parent.mkdir(parents=True)
    folder.rename(step)
    assert resolve_model_folder(tmp_path / "run") == step
    GPT.from_pretrained(tmp_path / "run")


def test_saving_refuses_folders_of_models_and_adapters_as_bases(base, folder, tmp_path):
    ours = GPT.from_pretrained(base)
    apply_lora(ours, name="a")
    with pytest.raises(UserError, match="no adapter named 'default': it has a"):
        save_adapter(ours, tmp_path / "new", base)
    with pytest.raises(UserError, match="is an adapter, which cannot be another's base"):
        save_adapter(ours, tmp_path / "new", folder, name="a")
    with pytest.raises(UserError, match="holds a model: an adapter needs a folder of its own"):
        save_adapter(ours, base, base, name="a")
    assert not (tmp_path / "new").exists()
    assert not (Path(base) / "adapter_config.json").exists()


# Damaged and foreign folders


def edit(folder, **fields):
    values = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(values))


def refused(folder, words):
    with pytest.raises(UserError, match=words) as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only 'LORA' can be loaded"),
        ({"bias": "all"}, "bias is 'all', only 'none' can be loaded"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', only True can be loaded"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save is \["lm_head"\], only adapters without it'),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\], only adapters without it"),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"use_something_new": {"x": 1}}, "use_something_new is"),
        ({"r": None}, "the field r is missing"),
        ({"target_modules": None}, "the field target_modules is missing"),
        ({"r": 0}, "adapter_config.json: the rank of an adapter must be a whole number of at least 1, got 0"),
        ({"r": "8"}, "must be a whole number of at least 1, got '8'"),
        ({"lora_alpha": "x"}, "the alpha of an adapter must be a number, got 'x'"),
        ({"lora_dropout": 1.0}, "the dropout of an adapter must be at least 0 and below 1"),
        ({"lora_dropout": "x"}, "adapter_config.json: "),
        ({"rank_pattern": 3}, "adapter_config.json: "),
        ({"target_modules": [1]}, "target_modules is .1., which is neither"),
        ({"target_modules": "c_(attn"}, "'c_.attn' is no regular expression"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        (
            {"target_modules": ["q_proj"]},
            "no linear layer of the model is named .*q_proj.*: there are attn.c_attn, attn.",
        ),
        ({"use_dora": True}, r"h.0.attn.c_attn.lora_magnitude_vector is missing"),
    ],
    ids=str,
)
def test_fields_that_cannot_be_computed_are_named(folder, fields, words):
    edit(folder, **fields)
    refused(folder, words)


WRONG = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(min_value=10**310) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(sorted({*READ, *ONLY, "modules_to_save"})), WRONG, min_size=1, max_size=2))
def test_any_value_of_a_field_is_read_or_refused_in_one_line(tmp_path_factory, fields):
    folder = tmp_path_factory.mktemp("any")
    good = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(good | fields))
    try:
        result: LoRAConfig | str = read_config(folder)
    except UserError as error:
        result = str(error)
    assert isinstance(result, LoRAConfig) or "\n" not in result


def test_an_adapter_for_another_base_is_refused_with_both_shapes_and_the_model_is_as_it_was(base, folder, tmp_path):
    ours = GPT.from_pretrained(base)
    plain, names = logits(ours), [n for n, _ in ours.named_parameters()]
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.transformer.h.1.mlp.c_fc.lora_A.weight"

    def fails(words):
        with pytest.raises(UserError, match=words) as caught:
            load_adapter(ours, folder)
        assert "\n" not in str(caught.value)
        assert [n for n, _ in ours.named_parameters()] == names
        assert all(p.requires_grad for p in ours.parameters())
        assert torch.equal(logits(ours), plain)

    other = write_base(tmp_path / "wide", n_embd=40)
    with_peft(other).save_pretrained(tmp_path / "wide_adapter")
    edit(folder)
    path.write_bytes((tmp_path / "wide_adapter/adapter_model.safetensors").read_bytes())
    fails(r"c_attn.lora_A.weight has shape \(4, 40\), but this base and .* ask for \(4, 32\): .* for another base")
    deep = write_base(tmp_path / "deep", n_layer=3)
    with_peft(deep).save_pretrained(tmp_path / "deep_adapter")
    path.write_bytes((tmp_path / "deep_adapter/adapter_model.safetensors").read_bytes())
    fails(r"h.2.attn.c_attn.lora_A.weight of shape \(4, 32\) and 7 more has no place: this base of 2 blocks")
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    fails(f"the tensor {name} is missing")
    save_file(tensors | {name: torch.zeros(4, 32, dtype=torch.int8)}, path)
    fails(f"the tensor {name} has dtype torch.int8, which is not a float")
    path.write_bytes(path.read_bytes()[:1000])
    fails("adapter_model.safetensors is damaged or cut short")
    path.unlink()
    fails("has no adapter's weights: adapter_model.safetensors is missing")
    (folder / "adapter_config.json").write_text("[]")
    fails("adapter_config.json cannot be read")


# The command line


def test_generating_from_an_adapters_folder(cli, tokenizer_dir, tmp_path):
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    model = GPT(GPTConfig.preset("micro", vocab_size=tokenizer.vocab_size))
    model.save_pretrained(tmp_path / "base")
    apply_lora(model)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "adapter")
    code, out, _ = cli("generate", "--model", tmp_path / "adapter", "--prompt", "Ada", "--max-new-tokens", 3)
    assert code == 0
    assert out.startswith("Ada")


def test_merge_writes_a_whole_folder(cli, base, folder, tokenizer_dir, tmp_path):
    (folder / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    code, out, _ = cli("merge", "--adapter", folder, "--out", tmp_path / "merged")
    assert code == 0
    assert out == f"{tmp_path / 'merged'}: {base} with {folder} merged into it\n"
    assert_close(logits(theirs(tmp_path / "merged")), logits(with_peft(base)))
    assert json.loads((tmp_path / "merged/config.json").read_text())["eos_token_id"] == 0
    assert (tmp_path / "merged/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not (tmp_path / "merged/adapter_config.json").exists()


def test_merge_into_a_base_of_the_users_choice(cli, refused, base, folder, tokenizer_dir, tmp_path):
    other = write_base(tmp_path / "other", seed=5)
    (other / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    edit(folder, base_model_name_or_path="/gone")
    assert "is not at /gone any more" in refused("merge", "--adapter", folder, "--out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    code, *_ = cli("merge", "--adapter", folder, "--model", other, "--out", tmp_path / "merged")
    assert code == 0
    model = GPT.from_pretrained(other)
    load_adapter(model, folder)
    assert_close(logits(GPT.from_pretrained(tmp_path / "merged")), logits(model))
    assert (tmp_path / "merged/tokenizer.json").exists()


def test_merge_refuses(refused, base, folder, tmp_path):
    assert "is no adapter: it has no adapter_config.json" in refused(
        "merge", "--adapter", base, "--out", tmp_path / "m"
    )
    assert "no model at" in refused("merge", "--adapter", tmp_path / "none", "--out", tmp_path / "m")
    line = refused("merge", "--adapter", folder, "--model", folder, "--out", tmp_path / "m")
    assert "is an adapter itself" in line
    assert "exists already" in refused("merge", "--adapter", folder, "--out", base)
    assert not (tmp_path / "m").exists()

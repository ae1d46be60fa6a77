import pytest

from fastgpt import GPT, GPTConfig, UserError


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_gpt2s_published_parameter_counts(name, count):
    assert GPTConfig.preset(name).num_parameters() == count


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [64, 65, 300])
def test_the_count_is_the_models_without_its_padding(tied, vocab_size):
    config = GPTConfig.preset("micro", vocab_size=vocab_size, tie_word_embeddings=tied)
    padding = (config.padded_vocab_size - vocab_size) * config.n_embd * (1 if tied else 2)
    assert sum(p.numel() for p in GPT(config).parameters()) - padding == config.num_parameters()


def test_flops_are_those_of_the_matmuls():
    config = GPTConfig.preset("gpt2")
    # 6 N with N without position embeddings, plus attention: 124.4 M - 0.8 M - the vectors; 12 * 12 * 768 * 1024
    assert config.flops_per_token(1024) == pytest.approx(6 * 123.53e6 + 113.2e6, rel=1e-3)


def test_presets_and_overrides():
    config = GPTConfig.preset("nano", vocab_size=65, n_layer=2)
    assert (config.n_layer, config.n_embd, config.vocab_size) == (2, 384, 65)
    with pytest.raises(UserError, match="no preset 'big': take one of gpt2, gpt2-medium"):
        GPTConfig.preset("big")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": 100, "n_head": 3}, "n_embd must be a multiple of n_head, got 100 and 3"),
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1, got 0"),
        ({"vocab_size": 10.5}, "vocab_size must be a whole number"),
        ({"attn_pdrop": 1.0}, "attn_pdrop must be at least 0 and below 1"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be above 0"),
    ],
)
def test_bad_values_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**changes)


def test_hf_round_trip():
    config = GPTConfig.preset("micro", vocab_size=77, resid_pdrop=0.2, layer_norm_epsilon=1e-6)
    assert GPTConfig.from_hf(config.to_hf(), "here") == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"n_inner": 100}, "n_inner is 100, only 4"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_head": 7}, "n_embd must be a multiple"),
        ({"n_layer": "many"}, "n_layer must be a whole number"),
    ],
)
def test_what_is_not_computed_here_is_refused(changes, words):
    with pytest.raises(UserError, match=f"^config.json: .*{words}"):
        GPTConfig.from_hf({**GPTConfig.preset("micro").to_hf(), **changes}, "config.json")


def test_silence_means_hugging_faces_default():
    import transformers

    silent = {k: v for k, v in GPTConfig.preset("micro").to_hf().items() if not k.endswith("pdrop")}
    theirs = transformers.GPT2Config(**silent)
    ours = GPTConfig.from_hf(silent, "here")
    assert (ours.resid_pdrop, ours.embd_pdrop, ours.attn_pdrop) == (0.1, 0.1, 0.1)
    assert (theirs.resid_pdrop, theirs.embd_pdrop, theirs.attn_pdrop) == (0.1, 0.1, 0.1)

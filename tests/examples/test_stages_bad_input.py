import pytest


@pytest.mark.parametrize(
    "name", ["1_tokenization", "2_data_sampling", "3_token_embeddings", "4_attention", "5_architecture"]
)
def test_a_text_that_is_not_there_is_named_in_one_line(stage, name):
    code, _, error, _ = stage(name, text="nowhere.txt")
    assert code
    assert "nowhere.txt" in error
    assert error.count("\n") == 1

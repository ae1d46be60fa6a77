import re


def test_a_sentence_is_merged_as_the_trainer_does(stage):
    code, told, error, picture = stage("1_tokenization")
    assert code == 0, error
    assert "a + t  becomes 256: t|h|e|·|c|at|·|t|h|at|" in told
    assert "back to the text: True" in told
    rates = [float(rate) for rate in re.findall(r"ids: (\d+\.\d+)$", told, re.MULTILINE)]
    assert rates == sorted(rates)
    assert rates[0] == 1 < rates[-1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_windows_and_documents_are_drawn(stage):
    code, told, error, picture = stage("2_data_sampling")
    assert code == 0, error
    assert re.findall(r"stride (\d): (\d) windows", told) == [("8", "3"), ("4", "5"), ("2", "9")]
    assert "inputs (4, 8), targets (4, 8)" in told
    plain, sorted_by_length = (int(share) for share in re.findall(r"(\d+)% of it is filling.*, (\d+)%", told)[0])
    assert sorted_by_length < plain
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_embeddings_are_looked_up_and_drawn(stage):
    code, told, error, picture = stage("3_token_embeddings")
    assert code == 0, error
    found = [float(difference) for difference in re.findall(r"difference is (\S+?)\.? ?(?:at most)?\.?$", told, re.M)]
    assert found
    assert max(found) < 1e-5
    assert re.search(r"before training +after training", told)
    assert picture.read_bytes().startswith(b"\x89PNG")

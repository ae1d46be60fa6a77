import re


def differences(told, before, after):
    return [float(number) for number in re.findall(f"{before}(\\S+){after}", told)]


def test_each_step_of_attention_is_the_library_s(stage):
    code, told, error, picture = stage("4_attention")
    assert code == 0, error
    found = differences(told, "at most ", " from")
    assert len(found) == 7
    assert max(found) < 1e-5
    assert re.search(r"5\. Dropout.* [1-9]\d* of 400 weights", told)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_parts_of_a_block_and_the_sizes(stage):
    code, told, error, picture = stage("5_architecture")
    assert code == 0, error
    assert max(differences(told, "difference is ", " at most")) < 1e-5
    for millions in ("124.4", "354.8", "774.0", "1557.6"):
        assert re.search(rf"^gpt2.* {millions} \|", told, re.MULTILINE)
    C, *widths, V = (int(width) for width in re.findall(r"\(1, 16, (\d+)\)", told))
    assert widths == [C, C, 3 * C, C, 4 * C, C, C]
    assert f"ln({V})" in told
    untrained, trained = (float(x) for x in re.findall(r"rained, loss (\S+)", told))
    guessing = float(re.search(r"= (\S+)\)\. It writes", told)[1])
    assert abs(untrained - guessing) < 0.3
    assert trained < untrained
    kinds = re.findall(r"deviation +(\S+), .* (\d+)% alike", told)
    (gpt2, gpt2_alike), (no_norm, _), (_, no_shortcut_alike), (neither, _) = [(float(a), int(b)) for a, b in kinds]
    assert neither < 1e-3 < gpt2 < 100 < no_norm
    assert gpt2_alike < 95 < no_shortcut_alike
    assert picture.read_bytes().startswith(b"\x89PNG")

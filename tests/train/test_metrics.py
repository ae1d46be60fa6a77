import json

from fastgpt.train.metrics import RunLog, read_metrics
from fastgpt.train.plots import draw_run


def test_records_after_the_resumed_step_are_dropped_and_a_torn_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "tokens": i, "loss": 1.0}) for i in range(6)]
    path.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    with RunLog(tmp_path, 3, 10, "nats per token") as log:
        log.record(step=4, tokens=4, loss=2.0)
    assert [r["step"] for r in read_metrics(path)] == [0, 1, 2, 3, 4]
    assert read_metrics(path)[-1]["loss"] == 2.0


def test_the_picture_is_drawn_from_any_records(tmp_path):
    some = [{"step": i, "tokens": 1000 * i, "loss": 5 - i / 50} for i in range(1, 120)]
    for records in ([], some[:1], some, [*some, {"step": 119, "tokens": 119_000, "val_loss": 3.0}]):
        draw_run(records, tmp_path / "loss.png", "nats per token")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_said_goes_to_the_log(tmp_path, capsys):
    with RunLog(tmp_path, 0, 10, "nats per token") as log:
        log.say("[not markup] 5% done")
    assert capsys.readouterr().out == "[not markup] 5% done\n"
    assert (tmp_path / "log.txt").read_text().endswith(" [not markup] 5% done\n")

import subprocess
import sys

import pytest

import fastgpt
from fastgpt.cli import COMMANDS


def test_help_lists_every_command(cli):
    code, text, _ = cli("--help")
    assert code == 0
    assert all(name in text for name in COMMANDS)
    assert cli()[1] == text
    assert cli("--version")[1] == f"fastgpt {fastgpt.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(cli, name):
    code, text, _ = cli(*name.split(), "--help")
    assert code == 0
    assert f"fastgpt {name}" in text


def test_unknown_commands_are_pointed_right(refused):
    assert "no command `fly`: see `fastgpt --help`" in refused("fly")
    assert "did you mean `fastgpt tokenizer train` or `fastgpt tokenizer show`?" in refused("tokenizer", "shw")


def test_help_does_not_wait_for_torch():
    code = "import sys; from fastgpt.cli import main; main(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True).returncode == 0


def test_a_pipe_that_closes_is_no_traceback(process):
    p = process("--help")
    p.stdout.close()
    assert p.stderr.read() == ""
    assert p.wait() == 141


def test_info_names_each_op_on_each_device_and_why(cli):
    code, text, _ = cli("info")
    assert code == 0
    assert f"fastgpt {fastgpt.__version__}" in text
    for row in fastgpt.ops.implementations():
        assert row.op in text
        assert row.device in text
        assert row.name in text

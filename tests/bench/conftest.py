import contextlib
import gc
import io

import pytest


@pytest.fixture(scope="module")
def little_garbage():
    """What was imported is not looked through at each of the many collections around a measurement."""
    import peft  # noqa: F401  it would be imported on the way, after the freezing

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def measured_by(tmp_path_factory, little_garbage):
    """Runs a `fastgpt bench` command in a terminal of 100 columns; its folder of results, and what it printed."""
    from fastgpt.cli import run

    def measure(*command):
        out, text = tmp_path_factory.mktemp("results"), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
            patch.setenv("COLUMNS", "100")
            run([*command, "--out", str(out), "--machine", "here"])
        return out, text.getvalue()

    return measure

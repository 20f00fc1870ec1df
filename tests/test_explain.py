"""`megalens explain` as a user meets it."""

import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from saved_lens import make_run

from megalens import cli
from megalens.commands import explain

TEXT = "Arden is a river."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["explain.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.run(explain.main, explain.__doc__)
    return exit.value.code or 0


def test_a_line_per_token_with_aligned_figures(checkpoint, monkeypatch, capsys):
    assert run(monkeypatch, f"checkpoint={checkpoint}", TEXT) == 0
    lines = capsys.readouterr().out.splitlines()
    tokens = json.loads(as_json(checkpoint, monkeypatch, capsys))
    assert len(lines) == len(tokens) + 1
    assert lines[0].split() == ["token", "explanation", "(greedy)", "FVE"]
    for at, (line, token) in enumerate(zip(lines[1:], tokens, strict=True)):
        assert line.lstrip().startswith(token["token"].strip())
        assert line.endswith("*") == (at < 4)  # the lens was not trained below min_pos


def as_json(checkpoint, monkeypatch, capsys):
    assert run(monkeypatch, f"checkpoint={checkpoint}", "--json", TEXT) == 0
    return capsys.readouterr().out


def test_json_holds_token_explanation_and_fve(checkpoint, monkeypatch, capsys):
    tokens = json.loads(as_json(checkpoint, monkeypatch, capsys))
    assert "".join(token["token"] for token in tokens) == TEXT
    assert all(set(token) == {"token", "explanation", "fve", "search", "reads"} for token in tokens)


def test_another_search_is_named_wherever_its_explanations_are(checkpoint, monkeypatch, capsys, tmp_path):
    page = tmp_path / "page.html"
    assert run(monkeypatch, f"checkpoint={checkpoint}", "search=best_of:3", TEXT, "--html", page) == 0
    printed = capsys.readouterr().out
    assert "explanation (best of 3)" in printed
    assert printed.splitlines()[-1].startswith("best of 3: ")
    assert printed.splitlines()[-1].endswith(" texts read for a token")
    assert "best of 3" in page.read_text()
    assert run(monkeypatch, f"checkpoint={checkpoint}", "--search=best_of:3", "--json", TEXT) == 0
    assert {token["search"] for token in json.loads(capsys.readouterr().out)} == {"best of 3"}


def test_a_dash_reads_the_standard_input(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT + "\n"))
    assert run(monkeypatch, f"checkpoint={checkpoint}", "--json", "-") == 0
    assert capsys.readouterr().out == as_json(checkpoint, monkeypatch, capsys)


def test_a_page_is_written_beside_the_table(checkpoint, monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run(monkeypatch, f"checkpoint={checkpoint}", "<script>alert(1)</script> river", "--html", page) == 0
    html = page.read_text()
    assert html.count("<script>") == 1  # our own
    assert "alert(1)" not in html.split("<script>")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["some text"], "arguments are required: --checkpoint"),
        (["checkpoint=nowhere/best", "some text"], "nowhere/best is no checkpoint"),
        (["checkpoint=BEST"], "0 texts are given"),
        (["checkpoint=BEST", "two", "texts"], "2 texts are given; quote one"),
        (["checkpoint=BEST", ""], "the text is empty"),
        (["checkpoint=BEST", "--jsn", "text"], "unknown option --jsn"),
        (["checkpoint=BEST", "devise=cpu", "text"], "unknown key 'devise' in the command line; did you mean 'device'?"),
        (["checkpoint=BEST", "text", "--html"], "--html: expected one argument"),
        (["checkpoint=BEST", "text", "--html", "nowhere/page.html"], "--html nowhere/page.html: there is no folder nowhere; make it"),
        (["checkpoint=BEST", "text", "--html=."], "--html . is a folder; name a file in it, e.g. --html page.html"),
        (["checkpoint=BEST", "caf\udce9"], "holds bytes that are no UTF-8; convert it first, e.g. iconv -f latin1 -t utf-8"),
        (["checkpoint=BEST", "word " * 300], "more than the window"),
        (["checkpoint=BEST", "dtype=fp8", "text"], "dtype=fp8 must be one of"),
        (["checkpoint=BEST", "search=wide:8", "text"], "'wide:8' is no search; write greedy, or best_of:K"),
    ],
)
def test_mistakes_are_answered_in_one_line(checkpoint, monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *(a.replace("BEST", str(checkpoint)) for a in arguments)) == 1
    *_, line = capsys.readouterr().err.splitlines()  # loading the model may have shown a bar before
    assert line.startswith("error: ")
    assert message in line


def test_a_bad_place_for_the_page_or_a_bad_text_is_refused_before_the_model_is_loaded(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("megalens.Lens.from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    for arguments in (["text", "--html", "nowhere/page.html"], ["caf\udce9"], ["-"]):
        assert run(monkeypatch, f"checkpoint={checkpoint}", *arguments) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("text", ["--what is this", "device=cpu", "--json"])
def test_what_follows_two_dashes_is_text(checkpoint, monkeypatch, capsys, text):
    assert run(monkeypatch, f"checkpoint={checkpoint}", "--json", "--", text) == 0
    assert "".join(token["token"] for token in json.loads(capsys.readouterr().out)).endswith(text)


@pytest.mark.parametrize("tool", ["explain.py", "eval.py"])
def test_help_is_printed_from_any_folder_without_loading_anything(tool, tmp_path):
    code = (
        "import atexit, runpy, sys; sys.argv = ['x', '--help']; atexit.register(lambda: print('torch' in sys.modules)); "
        f"runpy.run_path({str(ROOT / 'tools' / tool)!r}, run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: python tools/" in done.stdout
    assert done.stdout.endswith("False\n")

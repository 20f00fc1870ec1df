"""`megalens eval` from a checkpoint to its files, and the page: self-contained, escaped, complete."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
from saved_lens import make_run

from megalens import cli
from megalens.commands import eval as tool
from megalens.evaluate import table as table_module
from megalens.evaluate.baselines import SOURCES
from megalens.evaluate.coloured import shade
from megalens.evaluate.compare import Comparison
from megalens.evaluate.evaluation import Result
from megalens.evaluate.report import curves, render
from megalens.evaluate.table import examples
from megalens.page.charts import Axis, Interval, Line, bars, columns, intervals, lines, parallel
from megalens.page.frame import page
from megalens.page.text import escape, visible
from megalens.training.track import read_curve

EVIL = "</td><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\x1b[31m\u202e"


class Page(HTMLParser):
    """The tags of a page, each with its attributes; wrong nesting of what must nest is an error."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.run(tool.main, tool.__doc__)
    return exit.value.code or 0


@pytest.fixture
def evil():
    figures = {
        source: {name: 0.5 for name in ("fve_nrm", "fve_std", "fve", "kl_recovered", "cos", "kl", "top1", "failed")} for source in SOURCES
    }
    figures["lens"] |= {"cos_q05": 0.1, "cos_q50": 0.2, "cos_q95": 0.3}
    figures["shuffled"] = {name: -40.0 for name in figures["shuffled"]}
    setting = dict.fromkeys(("model", "tail_order", "train_mode", "dataset", "trained", "checkpoint", "dtype", "statistics"), EVIL)
    numbers = {"layer_l": 1, "t_text": 3, "rows": 2, "documents": 2, "min_pos": 1, "seq_len": 4, "bootstrap": 0, "search": "best of 8"}
    example = {"context": EVIL, "explanation": EVIL, "fve": 0.3, "position": 3, "doc_id": 1}
    tokens = [{"token": EVIL, "explanation": EVIL, "fve": fve} for fve in (-200.0, 0.5, -0.2, 1.0, 0.0)]
    searched = figures["lens"] | {"copied_tokens": 1.0, "reads": 8.0, "said": 24.0, "roundtrip": 1.0}
    comparison = Comparison(2, 2, EVIL, figures["copy"], {"best of 8": searched, EVIL: searched}, {"1": 0.5, "2": 0.4})
    return Result(setting | numbers, figures, 0.9, comparison, [example], [{"doc_id": 1, "tokens": tokens}])


def test_the_command_measures_prints_and_writes(checkpoint, monkeypatch, capsys):
    assert run(monkeypatch, f"checkpoint={checkpoint}", "evaluation.num_samples=11") == 0
    printed = capsys.readouterr().out
    result = Result(**json.loads((checkpoint.parent / "evaluation.json").read_text()))
    result.comparison = Comparison(**result.comparison)
    assert result.setting["rows"] == 11
    assert result.setting["search"] == "greedy"
    assert result.setting["statistics"] == "the training dump"
    assert "explanations (greedy)" in printed
    assert result.setting["checkpoint"] == "step-00000012"
    assert result.setting["trained"] == "12 micro-steps of 64 rows"
    assert list(result.figures) == list(SOURCES)
    assert all(source.label in printed for source in SOURCES.values())
    assert examples(result) in printed
    page = (checkpoint.parent / "report.html").read_text()
    Page(page)
    assert f"{result.figures['lens']['fve_nrm']:.3f}" in page
    assert page.count("<polyline") == 2  # the curves of metrics.jsonl
    tokens = sum(len(document["tokens"]) for document in result.documents)
    assert page.count("data-said=") == tokens > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: --checkpoint"),
        (["checkpoint=nowhere/best"], "nowhere/best is no checkpoint"),
        (["checkpoint=BEST", "evaluation.num_sample=3"], "did you mean 'evaluation.num_samples'"),
        (["checkpoint=BEST", "evaluation.num_samples="], "is empty"),
        (["checkpoint=BEST", "activation_dumper.root=/nowhere"], "there is no dump in /nowhere"),
        (["checkpoint=BEST", "model_name=/nowhere/model"], "/nowhere"),
        (["checkpoint=BEST", "evaluation.search=best_of:1"], "'best_of:1' is no search; write greedy, or best_of:K"),
    ],
)
def test_mistakes_are_answered_in_one_line(checkpoint, monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *(a.replace("BEST", str(checkpoint)) for a in arguments)) == 1
    *_, line = capsys.readouterr().err.splitlines()  # loading the model may have shown a bar before
    assert line.startswith("error: ")
    assert message in line


def test_a_dump_of_another_layer_is_refused(checkpoint, monkeypatch, capsys, tmp_path):
    root = checkpoint.parents[2] / "activations"
    shutil.copytree(root, tmp_path / "activations")
    (tmp_path / "activations" / "model" / "layer_1").rename(tmp_path / "activations" / "model" / "layer_2")
    assert run(monkeypatch, f"checkpoint={checkpoint}", f"activation_dumper.root={tmp_path / 'activations'}", "layer_l=2") == 1
    assert "is of another layer (1 there, 2 now)" in capsys.readouterr().err


def test_without_the_training_dump_the_checkpoint_says_what_is_measured_against(checkpoint, monkeypatch, capsys, tmp_path):
    shutil.copytree(checkpoint.parents[2] / "activations", tmp_path / "activations")
    (train_dump,) = (tmp_path / "activations").rglob("*_train")
    shutil.rmtree(train_dump)
    root = f"activation_dumper.root={tmp_path / 'activations'}"
    with_dump, without = [], []
    for arguments, figures in (([], with_dump), ([root], without)):
        assert run(monkeypatch, f"checkpoint={checkpoint}", "evaluation.num_samples=8", *arguments) == 0
        figures.append(json.loads((checkpoint.parent / "evaluation.json").read_text()))
    assert with_dump[0]["figures"].pop("token_mean")["fve_nrm"] < 1  # it is made of the training dump
    assert without[0]["figures"] == with_dump[0]["figures"]
    assert without[0]["setting"]["statistics"].startswith("kept in the checkpoint: there is no dump in")
    printed = capsys.readouterr().out
    assert "kept in the checkpoint" in printed
    assert printed.count("Can the words be trusted?") == 2
    assert "choice10_over_token" in with_dump[0]["trust"]["identification"] and "choice10_hard" in without[0]["trust"]["identification"]
    assert "Can the words be trusted?" in (checkpoint.parent / "report.html").read_text()


def test_another_search_is_named_beside_its_figures(checkpoint, monkeypatch, capsys):
    found = {}
    for search in ("greedy", "best_of:4"):
        assert run(monkeypatch, f"checkpoint={checkpoint}", f"evaluation.search={search}", "evaluation.report_documents=0") == 0
        found[search] = json.loads((checkpoint.parent / "evaluation.json").read_text())
    assert found["best_of:4"]["setting"]["search"] == "best of 4"
    assert "explanations (best of 4)" in capsys.readouterr().out
    assert "best of 4" in (checkpoint.parent / "report.html").read_text()
    fve = {search: result["figures"]["lens"]["fve_nrm"] for search, result in found.items()}
    assert fve["best_of:4"] > fve["greedy"]


def test_searches_are_compared_on_the_same_rows(checkpoint, monkeypatch, capsys):
    settings = ["evaluation.search=greedy, best_of:3+swaps:1:4", "evaluation.search_rows=9", f"evaluation.other_reader={checkpoint}"]
    assert run(monkeypatch, f"checkpoint={checkpoint}", "evaluation.report_documents=0", "evaluation.num_samples=20", *settings) == 0
    printed, result = capsys.readouterr().out, json.loads((checkpoint.parent / "evaluation.json").read_text())
    found, searched = result["comparison"], "best of 3 + 1 sweep of swaps, 4 tokens"
    assert result["setting"]["rows"] == 20
    assert (found["rows"], list(found["searches"])) == (9, ["greedy", searched])
    greedy, best = found["searches"].values()
    assert best["fve_nrm"] > greedy["fve_nrm"]
    assert (greedy["reads"], greedy["said"]) == (0, 3)
    assert 3 < best["reads"] < 3 + 3 * 4
    for each in (found["copy"], greedy, best):  # the other reader is the lens itself here
        assert each["other_reader"] == pytest.approx(each["fve_nrm"], abs=1e-5)
    assert f" {best['reads']:.1f} " in printed
    said = found["texts"][searched]
    assert len(said) == 9
    for i, example in enumerate(result["examples"]):
        assert found["texts"]["greedy"][i] == {name: example[name] for name in ("explanation", "fve")}
        assert said[i]["fve"] >= example["fve"] - 1e-5
    page = (checkpoint.parent / "report.html").read_text()
    for text in (printed, page):
        assert text.count(searched) == 2 + 3  # in two tables, and below each example


def test_what_is_printed_of_searches_is_theirs_alone(evil):
    text = table_module.comparison(evil)
    assert text.count("best of 8") == 2
    assert "1: 0.500, 2: 0.400" in text


def test_without_intervals_and_examples_neither_is_promised(checkpoint, monkeypatch, capsys):
    settings = ("evaluation.num_samples=6", "evaluation.bootstrap=0", "evaluation.examples=0", "evaluation.report_documents=0")
    assert run(monkeypatch, f"checkpoint={checkpoint}", *settings) == 0
    printed, result = capsys.readouterr().out, Result(**json.loads((checkpoint.parent / "evaluation.json").read_text()))
    assert (result.examples, result.documents) == ([], [])
    assert not any(name.endswith("_low") for name in result.figures["lens"])
    page = (checkpoint.parent / "report.html").read_text()
    for text in (printed, page):
        assert "95 % interval" not in text
        assert "context ends with" not in text


def test_results_lie_in_the_run_of_the_checkpoint(checkpoint):
    run_dir = checkpoint.parent
    assert tool.run_folder(checkpoint) == run_dir
    assert tool.run_folder(run_dir / "checkpoints" / "step-00000012") == run_dir


def test_texts_cannot_break_out_of_the_page(evil):
    page = render(evil, EVIL, [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}])
    scripts = re.findall(r"<script.*?>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    assert "alert" not in scripts[0]
    tags = Page(page).tags
    assert not [tag for tag, _ in tags if tag == "img"]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    said = [attributes["data-said"] for _, attributes in tags if "data-said" in attributes]
    assert said == [EVIL.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")] * 5
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_page_asks_nobody_for_anything(evil):
    page = render(evil, "run", [])
    assert "http:" not in page
    assert "https:" not in page
    assert not [name for _, attributes in Page(page).tags for name in attributes if name in ("src", "href")]
    (policy,) = [attributes["content"] for _, attributes in Page(page).tags if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_positions_outside_the_training_are_marked(evil):
    spans = [a for tag, a in Page(render(evil, "run", [])).tags if "data-at" in a]
    assert [" out" in span["class"] for span in spans] == [True, False, False, False, True]  # trained on 1 to 3


def test_every_token_can_be_reached_by_keyboard_and_read_as_a_table(evil):
    page = render(evil, "run", [])
    tags = Page(page).tags
    assert all(a["tabindex"] == "-1" for tag, a in tags if "data-at" in a)  # the script gives each text one tab stop, arrows move
    assert "ArrowRight" in page
    assert ("div", {"id": "tip", "role": "status", "hidden": None}) in tags
    assert page.count('<td class="said">') == 5 + 1


def test_colour_says_sign_and_size():
    assert shade(1.0) == "g v10"
    assert shade(0.0) == "g v0"
    assert shade(0.52) == "g v5"
    assert shade(-0.52) == "b v5"
    assert shade(-300.0) == "b v10"


def test_a_figure_beyond_the_axis_is_an_arrow():
    drawing = intervals("two", [Interval("far", -40.0, -50.0, -30.0), Interval("near", 0.5, 0.4, 0.6, ours=True)])
    assert drawing.count("<path") == 1
    assert drawing.count("<circle") == 1
    assert "-40.00" in drawing


def test_a_curve_survives_a_cut_line_and_what_is_no_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": NaN}\n{"step": 3, "train/loss": 1.0}\n{"step": 4, "tra')
    (drawing,) = curves(read_curve(path))
    assert len(drawing.split('points="')[1].split('"')[0].split()) == 2
    assert read_curve(tmp_path / "absent") == []
    assert curves([]) == []


def test_escaped_text_has_no_markup():
    assert escape("<a href='x'>&\n") == "&lt;a href=&#x27;x&#x27;&gt;&amp;⏎"


def test_every_drawing_escapes_its_names_and_says_its_values_where_pointed_at():
    line = Line(EVIL, [(0, 0.25), (1, 0.5)], strength=0.5, dashed=True)
    drawings = [
        intervals(EVIL, [Interval(EVIL, 0.5, 0.4, 0.6)]),
        lines(EVIL, [line, line], named=True),
        parallel(EVIL, [Axis(EVIL, [(0.0, EVIL)]), Axis("b", [])], [line]),
        bars(EVIL, {EVIL: 0.5}),
        columns(EVIL, [0.0, 12345.0], [EVIL, "b"]),
    ]
    for drawing in drawings:
        ((_, attributes), *_) = tags = Page(drawing).tags
        assert attributes["role"] == "img"
        assert attributes["aria-label"].startswith(visible(EVIL))
        assert not {tag for tag, _ in tags} & {"script", "img", "td"}
    assert "<title>b: 12,345</title>" in drawings[-1]
    assert all(drawing.count("<title>") == 2 for drawing in (drawings[1], drawings[-1]))


def test_an_axis_of_one_value_or_of_zeros_is_drawn():
    assert "NaN" not in lines("flat", [Line("a", [(3, 1.0), (3, 1.0)])])
    assert columns("none", [0.0, 0.0], ["a", "b"]).count('height="0"') == 2


def test_a_page_without_a_script_allows_none():
    assert "script-src 'none'" in page("t", "b")
    assert "<script" not in page("t", "b")

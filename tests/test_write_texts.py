"""Texts that a model or an endpoint writes: asked for once, kept as they come, told ahead."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import quick
import torch
from conftest import ROOT
from launched import environment
from tiny_run import make_subject_and_dump, tiny_config

from megalens.commands import write_texts
from megalens.config import ConfigError, Given
from megalens.data import DataError, writers
from megalens.data.shards import ShardReader
from megalens.data.source import training_loader
from megalens.data.writers import LocalWriter, Sampling
from megalens.data.writing import Cache, Writing, read_prompts, wanted_texts
from megalens.families.loading import load_tokenizer

PROMPTS = "What ends so: {context}\n---\nA word for {token}, and {context} in braces\n"
KEY = "sk-a-very-secret-key"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    make_subject_and_dump(folder)
    return folder


class Stub(BaseHTTPRequestHandler):
    """A stand-in of an endpoint: answers from the prompt alone; ``server.say`` may change what it does."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Authorization"), asked))
            number = len(self.server.seen)
        code, body, headers = self.server.say(number, asked)
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def answer(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode(), {}


@pytest.fixture
def endpoint(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.seen, server.lock = [], threading.Lock()
    server.say = lambda number, asked: answer(f" about {len(asked['messages'][0]['content'])} ")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setattr(writers, "time", SimpleNamespace(sleep=lambda seconds: None))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def line(folder, tmp_path):
    """The command's words, but for the writer."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    config = tiny_config(folder)
    keys = {"model_name": config.model_name, "layer_l": 1, "dataset.name": "made-up", "device": "cpu", "dtype": "fp32"}
    keys |= {"activation_dumper.root": config.activation_dumper.root, "pretokenize.root": tmp_path / "tokens"}
    keys |= {"prompts": tmp_path / "prompts.txt", "out": tmp_path / "out.jsonl", "rows": 6, "tokens": 5}
    return [f"{key}={value}" for key, value in keys.items()]


@pytest.fixture(autouse=True)
def any_dump(monkeypatch):
    """The made-up dump names no subject."""
    monkeypatch.setattr(ShardReader, "check_matches", lambda *_: None)


def rows_of(line):
    (path,) = [each.removeprefix("out=") for each in line if each.startswith("out=")]
    return [json.loads(row) for row in Path(path).read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------- a local model


def test_the_subject_writes_what_it_says_behind_each_prompt_and_the_training_reads_it(folder, line, capsys):
    write_texts.main(line)
    told, rows = capsys.readouterr(), rows_of(line)
    assert "12 texts for 6 rows: 0 written already, 0 share a prompt; 12 requests" in told.err and "at most 60 of texts" in told.err
    assert [row["sample_id"] for row in rows] == sorted([*range(6)] * 2) and [row["prompt"] for row in rows] == [0, 1] * 6
    config = tiny_config(folder, tail_order="forward")
    tokenizer, reader = load_tokenizer(config), ShardReader(config.activation_dir("train"))
    model = LocalWriter(config, None, Sampling(5, 0.0, 0), 1)
    for wanted, row in zip(wanted_texts(reader, tokenizer, PROMPTS.split("\n---\n"), 6), rows, strict=True):
        assert (wanted.sample_id, wanted.doc_id, wanted.position) == (row["sample_id"], row["doc_id"], row["position"])
    (wanted, *_) = wanted_texts(reader, tokenizer, read_prompts(Path(line[7].removeprefix("prompts="))), 1)
    batch = reader.read_batch(0)
    context = tokenizer.decode(batch["input_ids"][0, : batch["position"][0] + 1])
    assert wanted.prompt == f"What ends so: {context}"
    list(model.write(["x"]))
    ids = torch.tensor([tokenizer(wanted.prompt)["input_ids"]])
    for _ in range(5):
        ids = torch.cat([ids, model._model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert rows[0]["text"] == tokenizer.decode(ids[0, -5:], skip_special_tokens=True).strip()
    config.given = Given(path=line[8].removeprefix("out="))
    config.pretokenize.root = str(Path(config.given.path).parent / "joined")
    assert training_loader(config).num_rows == len(rows)


def test_how_prompts_are_batched_changes_no_text(folder):
    config = tiny_config(folder)
    prompts = ["a", "the river of Arden flows south", "it is a castle and"]
    together = dict(LocalWriter(config, None, Sampling(6, 0.0, 0), 8).write(prompts))
    alone = [dict(LocalWriter(config, None, Sampling(6, 0.0, 0), 8).write([prompt]))[0] for prompt in prompts]
    assert [together[n] for n in range(3)] == alone


def test_a_prompt_longer_than_the_window_is_refused_in_one_line(folder):
    with pytest.raises(ConfigError, match=r"a prompt of \d+ tokens and tokens=5 do not fit the window of .* \(256\)"):
        list(LocalWriter(tiny_config(folder), None, Sampling(5, 0.0, 0), 8).write(["word " * 300]))


# ------------------------------------------------------------------------------------------------------------ an endpoint


def ask(line, endpoint, *more):
    write_texts.main([*line, f"writer={endpoint.url}", "model=m", *more])


def test_an_endpoint_is_asked_with_yes_alone_and_its_cost_is_told_first(line, endpoint, capsys):
    prices = ["price_in=2", "price_out=1000"]
    ask(line, endpoint, "--dry-run", *prices)
    with pytest.raises(ConfigError, match="is asked only with --yes"):
        ask(line, endpoint)
    assert endpoint.seen == []
    assert ", at most 0.06 at the given prices" in capsys.readouterr().err
    ask(line, endpoint, "--yes")
    assert len(endpoint.seen) == 12 and {path for path, *_ in endpoint.seen} == {"/v1/chat/completions"}
    _, _, asked = endpoint.seen[0]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("m", 5, 0.0)
    assert all(row["text"].startswith("about ") for row in rows_of(line))


def test_nothing_is_asked_twice(line, endpoint, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("{token}\n---\n{token}")
    ask(line, endpoint, "--yes")
    first = rows_of(line)
    asked = [each["messages"][0]["content"] for *_, each in endpoint.seen]
    assert len(set(asked)) == len(asked) < len(first) == 12, "rows whose prompts are equal share an answer"
    ask(line, endpoint, "--yes", "rows=6")
    assert len(endpoint.seen) == len(asked) and rows_of(line) == first
    assert "12 written already, 0 share a prompt; 0 requests" in capsys.readouterr().err
    ask(line, endpoint, "--yes", "temperature=0.5")
    assert len(endpoint.seen) == 2 * len(asked), "another temperature is another text"


def test_the_key_goes_to_the_endpoint_and_nowhere_else(folder, line, endpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", KEY)
    ask(line, endpoint, "--yes", "key_env=MY_KEY")
    assert {header for _, header, _ in endpoint.seen} == {f"Bearer {KEY}"}
    endpoint.say = lambda number, asked: (401, f"bad key {KEY}\nsecond line".encode(), {})
    with pytest.raises(DataError, match=r"answers 401 bad key \*\*\* second line; what was written so far is kept") as caught:
        ask(line, endpoint, "--yes", "key_env=MY_KEY", "tokens=6")
    said = capsys.readouterr()
    assert KEY not in said.out + said.err + str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    endpoint.say = lambda number, asked: (302, b"", {"Location": endpoint.url})
    count = len(endpoint.seen)
    with pytest.raises(DataError, match="answers 302"):
        ask(line, endpoint, "--yes", "key_env=MY_KEY", "tokens=7", "at_once=1", "rows=1")
    assert len(endpoint.seen) == count + 1, "a redirect is not followed"
    with pytest.raises(ConfigError, match="the key of MY_KEY would be sent in the clear; use https"):
        writers.Endpoint("http://192.0.2.1/v1", "m", "MY_KEY", Sampling(5, 0.0, 0), 1, load_tokenizer(tiny_config(folder))).check()


def test_a_busy_endpoint_is_asked_again_and_what_came_before_a_failure_is_kept(line, endpoint):
    good = endpoint.say
    endpoint.say = lambda number, asked: (503, b"busy", {"Retry-After": "1"}) if number % 2 else good(number, asked)
    ask(line, endpoint, "--yes", "at_once=1")
    assert len(endpoint.seen) == 24
    endpoint.seen.clear()
    endpoint.say = lambda number, asked: good(number, asked) if number <= 7 else (400, b"no more", {})
    with pytest.raises(DataError, match="answers 400 no more"):
        ask(line, endpoint, "--yes", "tokens=9", "at_once=1")
    endpoint.say = good
    ask(line, endpoint, "--yes", "tokens=9")
    assert len(endpoint.seen) == 7 + 1 + 5 and len(rows_of(line)) == 12


@pytest.mark.parametrize("body", [b"no json", b"{}", b'{"choices": []}', b'{"error": "x"}'])
def test_an_answer_that_is_no_completion_is_one_line(line, endpoint, body):
    endpoint.say = lambda number, asked: (200, body, {})
    with pytest.raises(DataError, match="gives no completion") as caught:
        ask(line, endpoint, "--yes", "rows=1")
    assert "\n" not in str(caught.value)


def test_answers_without_text_are_left_out_and_counted(line, endpoint, capsys):
    endpoint.say = lambda number, asked: answer(["<say> good </say>", "no tags", "<say> </say>", ""][number % 4])
    ask(line, endpoint, "--yes", "at_once=1", "verbalizer.tag=say", "verbalizer.end_token=eos")
    assert [row["text"] for row in rows_of(line)] == ["good"] * 3
    assert "written: 3 texts" in (out := capsys.readouterr().out) and "9 answers held no text" in out


def test_a_kill_at_any_moment_costs_no_answer(line, endpoint):
    """Killed hard while the fifth answer is awaited: the next run asks for the rest alone, and the file is what one run gives."""
    good, gate, reached = endpoint.say, threading.Event(), threading.Event()

    def say(number, asked):
        if number == 5:
            reached.set()
            gate.wait(100)
        return good(number, asked)

    endpoint.say = say
    out = Path(line[8].removeprefix("out="))
    code = "import sys; from megalens.data.shards import ShardReader; ShardReader.check_matches = lambda *_: None;"
    code += "from megalens.commands import write_texts; write_texts.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *line, f"writer={endpoint.url}", "model=m", "--yes", "at_once=1"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reached.wait(100), process.communicate(timeout=1)
    process.kill()
    process.communicate()
    gate.set()
    assert not out.exists(), "the file appears whole or not at all"
    (cache,) = out.parent.rglob("written/*.jsonl")
    assert len(cache.read_text().splitlines()) == 4
    with cache.open("ab") as file:
        file.write(b'{"key": "half a li')
    ask(line, endpoint, "--yes")
    contents = [each["messages"][0]["content"] for *_, each in endpoint.seen]
    assert len(contents) == 12 + 1, "the one that was under way is asked for again"
    killed = rows_of(line)
    out.unlink()
    shutil.rmtree(cache.parent)
    ask(line, endpoint, "--yes")
    assert rows_of(line) == killed and len(killed) == 12


# ------------------------------------------------------------------------------------------------------------- the rest


def test_the_commands_of_the_page_run(dumped_checkout, monkeypatch):
    page = (ROOT / "docs" / "texts.md").read_text(encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL) for line in block.splitlines()]
    commands = [line for line in lines if "writer=http" not in line]
    assert len(commands) == 4 and len(lines) == 5
    for command in commands:
        done = quick.run([sys.executable, *shlex.split(command)[1:]])
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((dumped_checkout / "outputs" / "tiny_given" / "evaluation.json").read_text())["prefixes"].keys() == {"1", "2", "4"}


def test_what_a_text_holds_is_not_filled_in_again(folder, monkeypatch):
    config = tiny_config(folder)
    tokenizer = load_tokenizer(config)
    monkeypatch.setattr("megalens.data.writing._decode", lambda tokenizer, ids: "{token} and {context}")
    (wanted,) = wanted_texts(ShardReader(config.activation_dir("train")), tokenizer, ["{context}!"], 1)
    assert wanted.prompt == "{token} and {context}!"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("out=/dev/null/x.jsonl", "no folder can be made there"),
        ("out=x.json", "must be a file that ends in .jsonl"),
        ("rows=0", "must be -1"),
        ("temperature=-1", "must be 0 or more"),
        ("tokens=0", "whole number of 1 or more"),
        ("writer=http://127.0.0.1:1/v1", "needs model=NAME"),
        ("prompts=/nowhere", "prompts=/nowhere cannot be read"),
        ("writer=/nowhere", "/nowhere"),
        ("writers=x", "did you mean 'writer'"),
    ],
)
def test_words_that_cannot_be_are_refused_in_one_line(line, word, message):
    key = word.partition("=")[0]
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        write_texts.main([*(each for each in line if each.partition("=")[0] != key), word])
    assert "\n" not in str(caught.value)


def test_a_url_with_a_key_in_it_is_refused(line):
    with pytest.raises(ConfigError, match="without a name or key in it") as caught:
        write_texts.main([*line, f"writer=https://me:{KEY}@host/v1", "model=m"])
    assert KEY not in str(caught.value)


def test_prompts_that_are_the_same_for_every_row_are_refused(line, tmp_path):
    (tmp_path / "prompts.txt").write_text("{context}\n---\nalways the same")
    with pytest.raises(DataError, match="prompt 2 holds neither {context} nor {token}"):
        write_texts.main(line)


def test_two_processes_do_not_write_with_one_writer_and_a_damaged_cache_is_named(folder, tmp_path):
    config = tiny_config(folder)
    reader, tokenizer = ShardReader(config.activation_dir("train")), load_tokenizer(config)
    writing = Writing(reader, tokenizer, ["{context}"], 2, LocalWriter(config, None, Sampling(2, 0.0, 0), 2), tmp_path)
    with writing._cache(), pytest.raises(DataError, match="another process is writing to"):
        writing.plan()
    writing._path.write_text("[]\n")
    with pytest.raises(DataError, match="is damaged at byte 0; remove it"):
        Cache(writing._path)

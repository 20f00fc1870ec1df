"""The server as a client meets it that was written from the contract of the field's NLA servers, and what is ours beside it."""

import asyncio
import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from chromium import BROWSER, Chromium
from saved_lens import make_run
from starlette.testclient import TestClient

from megalens import Lens
from megalens.evaluate import EvaluationError
from megalens.page.workbench import workbench
from megalens.serve import still
from megalens.serve.app import LOCAL, listen, make_app, make_server
from megalens.serve.limits import Limits
from megalens.serve.reader import phrases
from megalens.serve.tokens import glyphs
from megalens.serve.worker import Worker

TEXT = "Arden is a river known since 1300. été 漢字"
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<<system>>Be kind.<</>>{% endif %}"
    "{% if m['content'] == 'boom' %}{{ raise_exception('no booms') }}{% endif %}"
    "<<{{ m['role'] }}>>{{ m['content'] }}<</>>{% endfor %}{% if add_generation_prompt %}<<assistant>>{% endif %}"
)
EXPLAIN_RESULT = {
    *("token", "token_id", "position", "l2_norm", "description", "mse", "cosine_similarity", "generated"),
    *("fragment_index", "fragment_count", "role", "section", "channel", "message_index"),
}
TOKEN_INFO = {"token", "token_id", "position", "fragment_index", "fragment_count", "role", "section", "channel", "message_index"}
HEALTH = {
    *("status", "verbalizer_model", "d_model", "verbalizer_quantization", "verbalizer_kv_cache_dtype", "verbalizer_cuda_graph_max_bs"),
    *("verbalizer_torch_compile", "verbalizer_device", "reconstructor_available", "reconstructor_fp8", "reconstructor_int4"),
    *("reconstructor_device", "source_model", "extraction_layer", "source_truncated", "source_fp8", "source_device"),
    *("completion_available", "num_cuda_devices", "max_concurrent", "max_concurrent_explains", "source_max_concurrent"),
    *("reconstructor_max_concurrent", "max_describe_requests", "limits"),
}
LIMITS = {
    *("max_input_chars", "max_positions_per_request", "max_new_tokens", "max_describe_batch", "max_description_chars"),
    "max_completion_tokens",
}


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    lens = Lens.from_pretrained(make_run(tmp_path_factory.mktemp("run")))
    lens.module.tokenizer.chat_template = TEMPLATE
    return lens


@pytest.fixture(scope="module")
def app(lens):
    return make_app(lens)


@pytest.fixture(scope="module")
def client(app):
    return TestClient(app, raise_server_exceptions=False)


def post(client, route, status=200, **asked):
    reply = client.post(route, json=asked)
    assert reply.status_code == status, reply.text
    return reply.json()


def frames(client, route, **asked):
    reply = client.post(route, json=asked | {"stream": True})
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    *lines, end = reply.text.split("\n\n")
    assert end == ""
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# --------------------------------------------------------------------------------------------------------- the contract


def test_health_has_the_contracts_keys_and_one_more(client):
    health = client.get("/").json()
    assert set(health) == HEALTH | {"megalens"}
    assert set(health["limits"]) == LIMITS
    assert (health["status"], health["d_model"], health["extraction_layer"], health["completion_available"]) == ("ok", 64, 1, True)


def test_tokens_are_those_the_lens_explains(client, lens):
    found = post(client, "/tokenize", text=TEXT)
    ids = lens.module.tokenizer(TEXT)["input_ids"]
    assert set(found) == {"tokens", "prompt_length", "text"}
    assert [token["token_id"] for token in found["tokens"]] == ids
    assert all(set(token) == TOKEN_INFO for token in found["tokens"])
    assert [token["position"] for token in found["tokens"]] == list(range(len(ids)))
    assert all(token[key] is None for token in found["tokens"] for key in ("role", "section", "channel", "message_index"))


def test_an_explanation_at_temperature_0_is_the_lenss_own(client, lens):
    found = post(client, "/explain", text=TEXT, temperature=0, reverse=False)
    own = lens.explain(TEXT)
    assert set(found) == {"layer_index", "results"}
    assert all(set(each) == EXPLAIN_RESULT | {"megalens"} for each in found["results"])
    assert [each["description"] for each in found["results"]] == [each.explanation for each in own]
    assert [each["megalens"]["fve"] for each in found["results"]] == pytest.approx([each.fve for each in own], abs=1e-4)
    assert all(each["mse"] == pytest.approx(2 * (1 - each["cosine_similarity"])) for each in found["results"])
    assert {each["generated"] for each in found["results"]} == {False}


@pytest.mark.parametrize(
    ("asked", "order"),
    [
        ({"positions": [5, -1, 5, 0]}, [0, 5, 11, 5]),
        ({"positions": [5, -1, 5, 0], "reverse": False}, [5, 11, 5, 0]),
        ({"positions": None}, list(range(11, -1, -1))),
        ({"positions": [], "reverse": False}, list(range(12))),
    ],
)
def test_results_come_in_the_order_asked_for(client, asked, order):
    text = "Arden is a river known since 1300."
    count = post(client, "/tokenize", text=text)["prompt_length"]
    order = [at + count - 12 if at == 11 and asked["positions"] else at for at in order] if asked["positions"] else None
    found = [each["position"] for each in post(client, "/explain", text=text, temperature=0, **asked)["results"]]
    assert found == (order or (list(range(count)) if asked.get("reverse") is False else list(range(count))[::-1]))


def test_a_stream_says_what_an_answer_says(client):
    asked = {"text": TEXT, "temperature": 0, "positions": [3, 7, 3, -1]}
    whole = post(client, "/explain", **asked)
    meta, *rest = frames(client, "/explain", **asked)
    assert meta == {"layer_index": 1, "total": 4, "prompt_length": post(client, "/tokenize", text=TEXT)["prompt_length"]}
    final = [frame for frame in rest if "description" in frame]
    progress = [frame for frame in rest if "description" not in frame]
    assert all(set(frame) == {"position", "text", "done"} and frame["done"] is False for frame in progress)
    assert all(set(frame) == EXPLAIN_RESULT | {"megalens"} for frame in final)

    def key(frame):
        return frame["position"]

    assert [(e["position"], e["description"], e["mse"]) for e in sorted(final, key=key)] == [
        (e["position"], e["description"], pytest.approx(e["mse"], abs=1e-5)) for e in sorted(whole["results"], key=key)
    ]


def test_vectors_are_described_in_their_order_and_streams_say_whose(client, lens):
    vectors = [a.tolist() for a in lens.activations(TEXT)[3:6]]
    whole = post(client, "/describe", activations=vectors, temperature=0)["results"]
    assert [each["description"] for each in whole] == [each.explanation for each in lens.explain(TEXT)[3:6]]
    assert all(set(each) == {"description", "mse", "cosine_similarity", "megalens"} for each in whole)
    found = frames(client, "/describe", activations=vectors, temperature=0)
    progress, final = ([f for f in found if ("description" in f) is done] for done in (False, True))
    assert all(set(frame) == {"index", "text", "done"} for frame in progress)
    assert all(set(frame) == {"index", "description", "mse", "cosine_similarity", "megalens"} for frame in final)
    assert {frame["index"]: frame["description"] for frame in final} == dict(enumerate(each["description"] for each in whole))


def test_a_score_is_that_of_the_api(client, lens):
    a_D = lens.activations(TEXT)[5]
    found, own = post(client, "/score", description="a river", activation=a_D.tolist()), lens.score(["a river"], a_D[None])[0]
    assert (found["mse"], found["cosine_similarity"]) == pytest.approx((own.mse, own.cos), abs=1e-5)


def test_a_difference_is_described_at_an_activations_norm(client, lens):
    a, b = lens.activations(TEXT)[[3, 7]]
    found = post(client, "/compare", activation_a=a.tolist(), activation_b=b.tolist(), temperature=0)
    assert {"description", "diff_norm", "mse", "cosine_similarity"} <= set(found)
    assert found["diff_norm"] == pytest.approx(float((a - b).norm()), rel=1e-5)
    assert [[found["description"]]] == lens.verbalize(lens.as_activations((a - b)[None]))


def test_activations_are_the_subjects(client, lens):
    found = post(client, "/extract", text=TEXT)
    assert found["layer_index"] == 1
    assert all(set(each) == {"token", "token_id", "position", "activation", "l2_norm"} for each in found["tokens"])
    torch.testing.assert_close(torch.tensor([each["activation"] for each in found["tokens"]]), lens.activations(TEXT), rtol=1e-5, atol=1e-5)


def test_a_continuation_is_the_subjects_and_its_stream_the_same(client, lens):
    asked = {"text": TEXT, "temperature": 0, "completion_tokens": 6}
    whole = post(client, "/completion", **asked)
    ids = lens.module.tokenizer(TEXT)["input_ids"]
    wanted = lens.module.subject.go_on(torch.tensor([ids]), 6)[0].tolist()
    said = [token["token_id"] for token in whole["tokens"][whole["prompt_length"] :]]
    assert said == wanted[: len(said)]
    prompt, *tokens, done = frames(client, "/completion", **asked)
    assert set(prompt) == {"type", "prompt_length", "tokens"}
    assert prompt["tokens"] == whole["tokens"][: whole["prompt_length"]]
    assert all(set(frame) == {"type", "token"} and set(frame["token"]) == TOKEN_INFO for frame in tokens)
    assert [frame["token"] for frame in tokens] == whole["tokens"][whole["prompt_length"] :]
    assert done == {"type": "done", "text": whole["text"]}
    chat = post(client, "/completion", messages=[{"role": "user", "content": "hi"}], completion_tokens=2)
    assert {token["role"] for token in chat["tokens"][chat["prompt_length"] :]} == {"assistant"}


# ---------------------------------------------------------------------------------------------------- chats and signs


def spans(client, status=200, **asked):
    found = post(client, "/tokenize", status, **asked)
    if status != 200:
        return found["detail"]
    parts = {}
    for token in found["tokens"]:
        place = (token["message_index"], token["role"], token["section"])
        parts[place] = parts.get(place, "") + (token["token"] if token["fragment_index"] == 0 else "")
    return parts


def test_each_token_of_a_chat_knows_its_message_and_part(client):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
    assert spans(client, messages=turns) == {
        (None, "system", "scaffold"): "<<system>>Be kind.<</>>",
        (0, "user", "header"): "<<user>>",
        (0, "user", "content"): "Who?",
        (0, "user", "footer"): "<</>>",
        (1, "assistant", "header"): "<<assistant>>",
        (1, "assistant", "content"): "Nobody.",
        (1, "assistant", "footer"): "<</>>",
        (None, "assistant", "header"): "<<assistant>>",
    }
    left_open = spans(client, messages=turns, continue_final_message=True)
    assert left_open[1, "assistant", "content"] == "Nobody."
    assert (1, "assistant", "footer") not in left_open
    assert spans(client, 400, messages=[{"role": "user", "content": "boom"}]).startswith("Failed to apply chat template: ")


def test_positions_of_a_chat_are_those_of_its_rendered_text(client):
    chat = {"messages": [{"role": "user", "content": "Who?"}]}
    rendered = post(client, "/tokenize", **chat)["text"]
    by_chat, by_text = (post(client, "/explain", temperature=0, **asked)["results"] for asked in (chat, {"text": rendered}))
    assert [e["description"] for e in by_chat] == [e["description"] for e in by_text]


def bytewise():
    """A tokenizer of single bytes."""
    return SimpleNamespace(decode=lambda ids, **_: bytes(ids).decode(errors="replace"))


def test_every_token_of_a_split_sign_shows_it_whole():
    assert glyphs(bytewise(), list("a🦜b".encode())) == [("a", 0, 1), *(("🦜", k, 4) for k in range(4)), ("b", 0, 1)]
    assert glyphs(bytewise(), [0xF0, 0x9F, 97]) == [("\ufffd", 0, 1), ("\ufffd", 0, 1), ("a", 0, 1)]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("route", "asked", "status", "detail"),
    [
        ("/explain", {}, 400, "Provide either `text` or `messages`."),
        ("/explain", {"text": ""}, 400, "Provide either `text` or `messages`."),
        ("/explain", {"text": "a b", "positions": [99]}, 400, "Position 99 out of range (0.."),
        ("/explain", {"text": "a b", "positions": [10**30]}, 400, "out of range (0.."),
        ("/explain", {"text": "x " * 250}, 400, "more than the window of 256"),
        ("/explain", {"text": "a b", "search": "climb:9"}, 400, "'climb:9' is no search"),
        ("/explain", {"text": "a b", "search": "best_of:99999"}, 422, "may be above 64 (max_search)"),
        ("/explain", {"text": "a" * 101}, 422, "String should have at most 100 characters (max_input_chars)"),
        ("/explain", {"text": "a b", "positions": [0] * 21}, 422, "List should have at most 20 items (max_positions_per_request)"),
        ("/explain", {"text": "a b " * 20}, 400, "more than 20 (max_positions_per_request); name `positions`"),
        ("/explain", {"text": "a", "temperature": 5.1}, 422, "less than or equal to 5"),
        ("/explain", {"text": "a", "temperature": -1}, 422, "greater than or equal to 0"),
        ("/explain", {"text": "a", "max_new_tokens": 5000}, 422, "less than or equal to 4096 (max_new_tokens)"),
        ("/explain", {"text": "a", "seed": -1}, 422, "greater than or equal to 0"),
        ("/explain", {"text": 7}, 422, "valid string"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * 90}]}, 400, "more than 100 (max_input_chars)"),
        ("/describe", {"activations": [[1.0] * 63]}, 400, "Vector length 63 != d_model 64"),
        ("/describe", {"activations": []}, 422, "at least 1 item"),
        ("/describe", {"activations": [[0.0] * 64]}, 400, "is zero"),
        ("/describe", {"activations": [[1e39] * 64]}, 400, "not finite"),
        ("/describe", {"activations": [[1.0]] * 4}, 422, "at most 3 items (max_describe_batch)"),
        ("/score", {"description": "x", "activation": [1.0]}, 400, "Vector length 1 != d_model 64"),
        ("/score", {"description": "x" * 51, "activation": [1.0]}, 422, "at most 50 characters (max_description_chars)"),
        ("/compare", {"activation_a": [1.0] * 64, "activation_b": [1.0] * 64}, 400, "no difference"),
        ("/completion", {"text": "a", "completion_tokens": 0}, 422, "greater than or equal to 1"),
        ("/steer", {"text": "a", "description": "x", "position": 9}, 400, "Position 9 out of range"),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(small, route, asked, status, detail):
    if asked.get("text") == "x " * 250 or asked.get("text") == "a b " * 20:
        small = small.roomy
    reply = small.post(route, json=asked)
    assert reply.status_code == status, reply.text
    said = reply.json()["detail"]
    assert detail in (said if isinstance(said, str) else said[0]["msg"])
    if status == 422:
        assert {"loc", "msg", "type", "input"} <= set(said[0])
        assert said[0]["loc"][0] == "body"


@pytest.fixture(scope="module")
def small(lens):
    few = {"max_positions_per_request": 20, "max_describe_batch": 3, "max_description_chars": 50}
    client = TestClient(make_app(lens, Limits(max_input_chars=100, **few)), raise_server_exceptions=False)
    client.roomy = TestClient(make_app(lens, Limits(**few)), raise_server_exceptions=False)
    return client


def test_no_json_and_too_much_of_it_are_refused(small):
    reply = small.post("/explain", content=b"{nothing")
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["type"] == "json_invalid"
    assert small.post("/explain", content=b" " * 100_000).status_code == 413
    assert small.get("/explain").status_code == 405


def test_a_limit_of_the_environment_counts():
    assert Limits.from_environment({"NLA_MAX_INPUT_CHARS": "7"}).max_input_chars == 7
    with pytest.raises(ValueError, match="NLA_MAX_INPUT_CHARS=none must be a whole number"):
        Limits.from_environment({"NLA_MAX_INPUT_CHARS": "none"})


def test_a_secret_is_asked_for_on_every_route_but_two(lens):
    client = TestClient(make_app(lens, secret="swan"))
    for ask in (client.get, client.post):
        for route in ("/", "/metrics", "/explain", "/nowhere"):
            assert (ask(route).status_code, ask(route).json()) == (401, {"detail": "X-SECRET-KEY header required"})
            wrong = ask(route, headers={"X-SECRET-KEY": "duck"})
            assert (wrong.status_code, wrong.json()) == (403, {"detail": "Invalid secret key"})
    assert client.get("/", headers={"X-SECRET-KEY": "swan"}).status_code == 200
    assert [client.get(route).status_code for route in ("/health", "/page")] == [200, 200]


def test_another_sites_page_or_name_is_refused(lens):
    client = TestClient(make_app(lens, hosts=frozenset({"127.0.0.1"})), base_url="http://127.0.0.1:5009")
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Origin": "http://127.0.0.1:5009"}).status_code == 200
    assert client.get("/", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.get("/", headers={"Host": "evil.example:5009"}).status_code == 403
    assert "access-control-allow-origin" not in client.get("/").headers


# ------------------------------------------------------------------------------------------------- failures and crowds


class Browser:
    """An ASGI client that can leave in the midst of an answer."""

    def __init__(self, app, route, asked):
        self.app, self.sent, self.left = app, [], asyncio.Event()
        self.body = json.dumps(asked).encode()
        self.scope = {"type": "http", "method": "POST", "path": route, "headers": [(b"host", b"x")], "query_string": b"", "root_path": ""}
        self.scope |= {"http_version": "1.1", "scheme": "http", "raw_path": route.encode(), "asgi": {"version": "3.0"}}

    async def ask(self):
        await self.app(self.scope, self.receive, self.send)

    async def receive(self):
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)


def test_a_client_that_leaves_frees_its_slot_and_the_model(lens, monkeypatch):
    app = make_app(lens, Limits(max_concurrent_explains=1))
    going, held = threading.Event(), threading.Event()
    say = app.state.reader.say

    def slow(rows, saying, tell):
        going.set()
        held.wait(20)
        return say(rows, saying, tell)

    monkeypatch.setattr(app.state.reader, "say", slow)

    async def story(stream):
        going.clear()
        held.clear()
        browser = Browser(app, "/explain", {"text": TEXT, "temperature": 0, "stream": stream})
        asking = asyncio.create_task(browser.ask())
        await asyncio.to_thread(going.wait, 20)
        second = Browser(app, "/explain", {"text": TEXT})
        await second.ask()
        assert second.sent[0]["status"] == 429
        assert b"All 1 /explain slot(s) in use. Please retry." in second.sent[1]["body"]
        browser.left.set()
        await asyncio.wait_for(asking, 20)
        held.set()
        third = Browser(app, "/explain", {"text": "a river", "temperature": 0})
        await asyncio.wait_for(third.ask(), 20)
        assert third.sent[0]["status"] == 200

    for stream in (True, False):
        asyncio.run(story(stream))
    assert app.state.metrics.left == 2
    assert app.state.worker.waiting == 0


def test_nothing_more_is_decoded_when_everybody_has_left(lens):
    app = make_app(lens)
    drawn, go = [], threading.Event()
    sample = lens.module.verbalizer.sample

    def counted(a_BD, keys, draws, law, watch):
        def watched(ids_N):
            drawn.append(len(ids_N))
            go.wait(20)
            watch(ids_N)

        return sample(a_BD, keys, draws, law, watch=watched)

    async def story():
        browser = Browser(app, "/explain", {"text": TEXT, "temperature": 0, "stream": True})
        asking = asyncio.create_task(browser.ask())
        while not drawn:
            await asyncio.sleep(0.01)
        browser.left.set()
        await asking
        go.set()
        await asyncio.to_thread(app.state.worker.close)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lens.module.verbalizer, "sample", counted)
        asyncio.run(story())
    assert len(drawn) == 1


def test_a_failure_ends_a_stream_and_spoils_nothing_else(lens, monkeypatch):
    app = make_app(lens)
    client = TestClient(app, raise_server_exceptions=False)
    say = app.state.reader.say

    def broken(rows, saying, tell):
        if any(row.seed == 13 for row in rows):
            raise RuntimeError("out of luck")
        return say(rows, saying, tell)

    monkeypatch.setattr(app.state.reader, "say", broken)
    meta, *rest = frames(client, "/explain", text="a river", seed=13, positions=[0, 1])
    assert meta["total"] == 2
    assert rest == [{"error": "RuntimeError: out of luck", "position": at} for at in (1, 0)]
    assert post(client, "/explain", 500, text="a river", seed=13) == {"detail": "RuntimeError: out of luck"}
    assert post(client, "/explain", text="a river")["results"]
    assert client.get("/health").status_code == 200


def test_requests_share_batches_in_turn_and_one_that_fails_fails_alone():
    worker, batches, go = Worker(batch=4), [], threading.Event()

    def run(rows, tell):
        batches.append("".join(rows))
        if "c" in rows:
            raise EvaluationError("an unlucky row")
        return [row.upper() for row in rows]

    async def results(job):
        return [str(getattr(result, "error", result)) async for _, result, done in job.events() if done]

    async def story():
        worker.submit(None, ["hold"], lambda rows, _: [go.wait(20)])
        jobs = [worker.submit("way", rows, run) for rows in (["a"] * 6, ["b"], ["c"], ["d"] * 2)]
        other = worker.submit("another way", ["e"], run)
        go.set()
        return await asyncio.wait_for(asyncio.gather(*map(results, [*jobs, other])), 20)

    found = asyncio.run(story())
    assert found == [["A"] * 6, ["B"], ["an unlucky row"], ["D"] * 2, ["E"]]
    assert batches == ["abcd", "a", "b", "c", "d", "e", "adaa", "aa"]  # one row of each; the spoiled batch singly; the other way; the rest
    worker.close(20)
    assert not worker.alive


def test_a_request_depends_on_its_own_seed_alone(client):
    asked = {"text": TEXT, "temperature": 1, "positions": [4, 5, 6], "seed": 3}
    first = [each["description"] for each in post(client, "/explain", **asked)["results"]]
    assert first == [each["description"] for each in post(client, "/explain", **asked)["results"]]
    assert first[1:2] == [each["description"] for each in post(client, "/explain", **asked | {"positions": [5]})["results"]]
    assert first != [each["description"] for each in post(client, "/explain", **asked | {"seed": 4})["results"]]


# ---------------------------------------------------------------------------------------------------------------- ours


def test_figures_stand_beside_copies_and_strangers(client, lens):
    found = post(client, "/explain", text=TEXT, temperature=0, positions=[6], k=3)["results"][0]["megalens"]
    assert found["fve_shuffled"] <= found["fve_shuffled_p95"] <= 1
    wanted = "chance" if found["fve"] <= found["fve_shuffled_p95"] else "above chance" if found["fve"] <= found["fve_copy"] else "better"
    assert found["verdict"].startswith(wanted)
    ids = lens.module.tokenizer(TEXT)["input_ids"]
    a_1D = lens.activations(TEXT)[6][None]
    assert found["fve_copy"] == pytest.approx(lens.score([found["copy"]], a_1D)[0].fve, abs=1e-5)
    assert lens.module.tokenizer.decode(ids[6:7]).strip() in found["copy"]
    assert len(found["samples"]) == 3
    assert [each["fve"] for each in found["samples"]] == pytest.approx(
        [lens.score([each["text"]], a_1D)[0].fve for each in found["samples"]], abs=1e-5
    )
    assert len(found["logit_lens"]) == 5
    assert found["search"] == "greedy" and found["trained"] is True


def test_a_search_is_named_and_never_worse(client):
    greedy, best = (
        post(client, "/explain", text=TEXT, temperature=0, positions=[6, 7], search=search)["results"] for search in ("greedy", "best_of:4")
    )
    assert all(b["megalens"]["fve"] >= a["megalens"]["fve"] - 1e-5 for a, b in zip(greedy, best, strict=True))
    assert {each["megalens"]["search"] for each in best} == {"best of 4"}


def test_samples_of_a_vector_are_those_of_the_api(client, lens):
    a_D = lens.activations(TEXT)[5]
    found = post(client, "/samples", activation=a_D.tolist(), k=4, seed=2)
    assert [[each["text"] for each in found["samples"]]] == lens.verbalize(a_D[None], draws=4, seed=2)
    assert 0 <= found["agreement"] <= 1


def test_an_edited_text_is_scored_phrase_by_phrase_and_patched(client, lens):
    text, at = "a river, in the north", 5
    found, own = post(client, "/edit", text=TEXT, position=at, description=text), lens.patch(TEXT, at, text, tokens=0)
    assert (found["fve"], found["kl"]) == pytest.approx((own.score.fve, own.kl), abs=1e-4)
    a_1D = lens.activations(TEXT)[at][None]
    for drop in found["drops"]:
        rest = text[: drop["start"]] + text[drop["end"] :]
        assert drop["delta_fve"] == pytest.approx(found["fve"] - lens.score([rest], a_1D)[0].fve, abs=1e-4)
    assert [text[drop["start"] : drop["end"]] for drop in found["drops"]] == ["a river,", "in the north"]


def test_phrases_end_at_stops_and_a_lone_one_is_cut_into_words():
    assert [("a, b c.")[s:e] for s, e in phrases("a, b c.")] == ["a,", "b c."]
    assert [("one two")[s:e] for s, e in phrases("one two")] == ["one", "two"]
    assert phrases("") == []
    assert len(phrases("word " * 50)) <= 16


def test_steering_by_0_changes_nothing_and_by_1_puts_the_rebuild_in(client, lens):
    asked = {"text": TEXT, "position": 5, "description": "a castle", "tokens": 3}
    still, whole = (post(client, "/steer", weight=weight, **asked) for weight in (0, 1))
    own = lens.patch(TEXT, 5, "a castle", tokens=3)
    assert still["kl"] == pytest.approx(0, abs=1e-5) and still["plain"] == still["patched"]
    assert (whole["plain"], whole["patched"]) == (own.plain, own.patched)
    assert whole["kl"] == pytest.approx(own.kl, abs=1e-4)


def test_metrics_count_requests_by_route_and_status(client):
    before = client.get("/metrics").text
    client.post("/explain", json={})
    after = client.get("/metrics").text

    def counted(text):
        return [
            int(line.split()[-1]) for line in text.splitlines() if line.startswith('megalens_requests_total{route="/explain",status="400"}')
        ]

    assert sum(counted(after)) == sum(counted(before)) + 1
    assert all(len(line.split()) == 2 or line.startswith("#") for line in after.splitlines())
    assert "megalens_up 1" in after


# -------------------------------------------------------------------------------------------- a real server and a real browser


@pytest.fixture(scope="module")
def live(lens):
    """A server on a free port, with its ``app`` and ``url``."""
    app, socket = make_app(lens, hosts=LOCAL), listen("127.0.0.1", 0)
    server = make_server(app)
    with closing(socket):
        thread = threading.Thread(target=server.run, args=([socket],))
        thread.start()
        yield SimpleNamespace(app=app, url=f"http://127.0.0.1:{socket.getsockname()[1]}")
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
    assert not app.state.worker.alive


def ask(live, route, **asked):
    request = urllib.request.Request(live.url + route, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def test_sixty_four_clients_at_once_are_all_answered_and_share_batches(live, lens):
    positions = [3, 4, 5]
    wanted = [lens.explain(TEXT)[at].explanation for at in positions]
    before, ready = live.app.state.worker.batches, threading.Barrier(64)

    def client(_):
        ready.wait(30)
        return ask(live, "/explain", text=TEXT, temperature=0, positions=positions, reverse=False)["results"]

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(client, range(64)))
    assert [[each["description"] for each in results] for results in found] == [wanted] * 64
    turns = live.app.state.worker.batches - before
    assert turns < 64 * 2 + 64 * 3 / 2  # two calls each, and batches of more than two rows
    assert live.app.state.worker.waiting == 0


def test_a_taken_port_is_refused_by_name(live):
    port = int(live.url.rpartition(":")[2])
    with pytest.raises(ValueError, match=f"nothing can be served at 127.0.0.1:{port}: .*set port= to another one"):
        listen("127.0.0.1", port)


needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
EVIL = "<img src=x onerror=alert(1)> & <script>alert(2)</script> river"


@needs_browser
def test_the_page_explains_edits_steers_and_compares_in_a_browser(live):
    with Chromium() as browser:
        browser.open(live.url + "/page")
        browser.run(f"document.getElementById('text').value = {json.dumps(EVIL)}; document.getElementById('tokenize').click()")
        browser.wait("document.querySelectorAll('#tokens .t').length > 10")
        assert browser.run("document.getElementById('tokens').textContent") == EVIL
        assert browser.run("document.querySelectorAll('#tokens img, #tokens script').length") == 0
        browser.run("state.chosen = new Set([4, 5]); paint(); document.getElementById('explain').click()")
        browser.wait("document.querySelectorAll('#tokens .told').length === 2 && !state.stop")
        shown = browser.run("document.getElementById('detail').textContent")
        for words in ("Position 4", "a copy of the last tokens", "explanations of other texts", "Logit lens", "greedy"):
            assert words in shown
        for label, words in (
            ("Draw 8 samples", "Agreement of their words"),
            ("What does each phrase hold?", "hrase"),
            ("New FVE", "KL of the next token"),
            ("Steer the subject and read on", "untouched: "),
        ):
            browser.run(f"[...document.querySelectorAll('#detail button')].find(b => b.textContent === {json.dumps(label)}).click()")
            browser.wait(f"document.querySelector('#detail > div:last-child').textContent.includes({json.dumps(words)})")
        browser.run("compare(4, 5)")
        browser.wait("document.getElementById('pair').textContent.includes('the other way round')")
        browser.run("state.chosen.clear(); document.getElementById('text').value = ''; document.getElementById('tokenize').click()")
        browser.wait("document.getElementById('trouble').textContent.includes('Provide either')")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        assert [line for line in browser.errors if "400" not in line] == []


@needs_browser
def test_tokens_are_chosen_by_dragging_and_by_keyboard(live):
    with Chromium() as browser:
        browser.open(live.url + "/page")
        browser.run("document.getElementById('text').value = 'one two three four five six seven eight nine ten eleven'")
        browser.run("document.getElementById('tokenize').click()")
        browser.wait("document.querySelectorAll('#tokens .t').length > 10")
        browser.run("document.getElementById('tokens').scrollIntoView()")
        boxes = "[2, 6].map(i => document.querySelectorAll('#tokens .t')[i].getBoundingClientRect())"
        places = browser.run(f"{boxes}.map(b => [b.x + b.width / 2, b.y + b.height / 2])")
        browser.drag(*places)
        assert browser.run("[...document.querySelectorAll('#tokens [aria-selected=true]')].map(t => +t.dataset.at)")[-5:] == [2, 3, 4, 5, 6]
        browser.run("document.querySelectorAll('#tokens .t')[0].focus(); state.chosen.clear()")
        for key in ("ArrowRight", " ", "End"):
            browser.press(key)
        assert browser.run("[...state.chosen]") == [1]
        assert browser.run("+document.activeElement.dataset.at === state.tokens.length - 1")
        assert browser.errors == []


def test_a_page_may_ask_its_own_server_or_nobody():
    assert "; connect-src 'self'\"" in workbench("a lens")
    assert "connect-src" not in workbench("a lens", [])


def test_a_page_without_a_server_has_the_servers_figures(client, lens):
    alone = still.found(lens, TEXT, lens.explain(TEXT))
    served = post(client, "/explain", text=TEXT, temperature=0, reverse=False)["results"]
    for a, b in zip(alone, served, strict=True):
        assert (a["position"], a["description"]) == (b["position"], b["description"])
        for name in ("fve", "fve_copy", "fve_shuffled", "fve_shuffled_p95", "norm"):
            assert a["megalens"][name] == pytest.approx(b["megalens"][name], abs=1e-4)
        assert {"logit_lens", "drops", "trained", "verdict"} <= set(a["megalens"])


@needs_browser
def test_a_page_without_a_server_shows_what_it_was_given(client, live, tmp_path):
    results = post(client, "/explain", text=EVIL, temperature=0, reverse=False)["results"]
    (tmp_path / "page.html").write_text(workbench("a lens", results), encoding="utf-8")
    with Chromium() as browser:
        browser.open((tmp_path / "page.html").as_uri())
        assert browser.run("document.getElementById('tokens').textContent") == EVIL
        assert browser.run("document.querySelectorAll('#tokens .told').length") == len(results)
        assert browser.run("getComputedStyle(document.getElementById('ask')).display") == "none"
        assert "Position" in browser.run("document.getElementById('detail').textContent")
        assert browser.run(f"fetch('{live.url}/health', {{mode: 'no-cors'}}).then(() => 'let out', () => 'kept in')") == "kept in"

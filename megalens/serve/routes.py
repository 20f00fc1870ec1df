"""The routes: those of the field's NLA servers, with the same names, fields and statuses, and our own beside them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from megalens.serve import completion, schema
from megalens.serve.answers import Events, answer, body_of, refusal, told, while_listening
from megalens.serve.limits import Limits, Refused
from megalens.serve.reader import Context, Reader, Row, Told
from megalens.serve.schema import Asked, Saying
from megalens.serve.tokens import decode, infos
from megalens.serve.worker import Failure, Job, Left, Worker


class Slots:
    """So many requests of a route at once; more are refused."""

    def __init__(self, route: str, count: int):
        self.route, self.count, self.used = route, count, 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold one.

        Raises:
            Refused: all are held.
        """
        if self.used >= self.count:
            raise Refused(429, f"All {self.count} {self.route} slot(s) in use. Please retry.")
        self.used += 1
        try:
            yield
        finally:
            self.used -= 1


class Routes:
    """The handlers.

    Args:
        reader: the lens.
        worker: the thread that it runs on.
    """

    def __init__(self, reader: Reader, worker: Worker, limits: Limits):
        self.reader, self.worker, self.limits = reader, worker, limits
        self.tokenizer, self.most_bytes = reader.tokenizer, limits.body_bytes(reader.width)
        self.explains = Slots("/explain", limits.max_concurrent_explains)
        self.describes = Slots("/describe", limits.max_describe_requests)
        self.scores = Slots("/score", limits.reconstructor_max_concurrent)

    @property
    def layer(self) -> int:
        """The lens's ``layer_l``."""
        return self.reader.module.config.layer_l

    async def health(self, request: Request) -> Response:
        """``GET /``."""
        config, device, limits = self.reader.module.config, str(self.reader.device), self.limits
        ours: dict[str, Any] = {
            "t_text": config.t_text,
            "min_pos": config.activation_dumper.min_pos,
            "seq_len": config.activation_dumper.seq_len,
        }
        ours |= {"norm": self.reader.lens.norm, "dtype": config.dtype, "max_samples": limits.max_samples}
        return answer(
            {
                "status": "ok" if self.worker.alive else "the model's thread has ended",
                "verbalizer_model": config.model_label,
                "d_model": self.reader.width,
                "verbalizer_quantization": None,
                "verbalizer_kv_cache_dtype": None,
                "verbalizer_cuda_graph_max_bs": None,
                "verbalizer_torch_compile": config.compile,
                "verbalizer_device": device,
                "reconstructor_available": True,
                "reconstructor_fp8": False,
                "reconstructor_int4": False,
                "reconstructor_device": device,
                "source_model": config.model_label,
                "extraction_layer": self.layer,
                "source_truncated": False,
                "source_fp8": False,
                "source_device": device,
                "completion_available": True,
                "num_cuda_devices": torch.cuda.device_count(),
                "max_concurrent": self.worker.batch,
                "max_concurrent_explains": limits.max_concurrent_explains,
                "source_max_concurrent": 1,
                "reconstructor_max_concurrent": limits.reconstructor_max_concurrent,
                "max_describe_requests": limits.max_describe_requests,
                "limits": limits.reported,
                "megalens": ours,
            },
            200 if self.worker.alive else 503,
        )

    async def tokenize(self, asked: schema.Shared, _: ExitStack) -> Any:
        """``POST /tokenize``."""
        encoded = await self.worker.call(self.reader.encode, asked)
        return {"tokens": infos(self.tokenizer, encoded), "prompt_length": len(encoded.ids), "text": encoded.text}

    async def extract(self, asked: schema.Extract, _: ExitStack) -> Any:
        """``POST /extract``."""
        context = await self.worker.call(self.reader.read, asked, asked.positions)
        ids, rows = context.encoded.ids, zip(context.positions, context.a_PD.tolist(), context.a_PD.norm(dim=-1).tolist(), strict=True)
        tokens = [
            {"token": decode(self.tokenizer, [ids[at]]), "token_id": ids[at], "position": at, "activation": a, "l2_norm": norm}
            for at, a, norm in rows
        ]
        return {"layer_index": self.layer, "tokens": tokens}

    async def explain(self, asked: schema.Explain, held: ExitStack) -> Any:
        """``POST /explain``."""
        held.enter_context(self.explains.take())
        context = await self.worker.call(self.reader.read, asked, asked.positions, asked.reverse)
        shown = await self.worker.call(self._shown, context)
        job = self._say(self.reader.rows(context, asked.seed), asked)
        if not asked.stream:
            told_P = await _results(job)
            return {"layer_index": self.layer, "results": [_result(*each) for each in zip(shown, told_P, strict=True)]}

        async def frames() -> AsyncGenerator[dict, None]:
            yield {"layer_index": self.layer, "total": len(shown), "prompt_length": len(context.encoded.ids)}
            async with aclosing(job.events()) as events:
                async for number, found, done in events:
                    place = {"position": shown[number]["position"]}
                    yield _frame(place, found, done, partial(_result, shown[number]))

        return frames()

    async def describe(self, asked: schema.Describe, held: ExitStack) -> Any:
        """``POST /describe``."""
        held.enter_context(self.describes.take())
        a_ND = self.reader.vectors(asked.activations)
        job = self._say([Row(a_D, number, asked.seed) for number, a_D in enumerate(a_ND)], asked)
        if not asked.stream:
            return {"results": [_described(each) for each in await _results(job)]}

        async def frames() -> AsyncGenerator[dict, None]:
            async with aclosing(job.events()) as events:
                async for number, found, done in events:
                    yield {"index": number} | _frame({}, found, done, _described)

        return frames()

    async def score(self, asked: schema.ScoreAsked, held: ExitStack) -> Any:
        """``POST /score``."""
        held.enter_context(self.scores.take())
        (found,) = await self.worker.call(self.reader.score, [asked.description], self.reader.vectors([asked.activation]))
        return {"mse": found.mse, "cosine_similarity": found.cosine_similarity, "megalens": found.extra}

    async def compare(self, asked: schema.CompareAsked, held: ExitStack) -> Any:
        """``POST /compare``: what the lens says of ``a - b`` at an activation's norm. No lens was trained on differences."""
        held.enter_context(self.describes.take())
        a_2D = self.reader.vectors([asked.activation_a, asked.activation_b])
        apart_D = a_2D[0] - a_2D[1]
        norm = float(apart_D.norm())
        if norm == 0:
            raise Refused(400, "The activations are equal: there is no difference to describe")
        (found,) = await _results(self._say([Row(apart_D * (self.reader.lens.norm / norm), 0, asked.seed)], asked))
        cos = float(torch.nn.functional.cosine_similarity(a_2D[0], a_2D[1], dim=0))
        described = _described(found)
        return described | {"diff_norm": norm, "megalens": found.extra | {"cos": cos}}

    async def completion(self, asked: schema.Completion, _: ExitStack) -> Any:
        """``POST /completion``."""
        count = min(asked.completion_tokens, self.limits.max_completion_tokens)
        encoded = await self.worker.call(self.reader.encode, asked, count)
        prompt = infos(self.tokenizer, encoded)
        go_on = partial(completion.go_on, self.reader, encoded, count, asked)
        job = self.worker.submit(None, [encoded], lambda _, tell: [go_on(lambda ids: tell(0, " ".join(map(str, ids))))])
        if not asked.stream:
            (ids,) = await _results(job)
            tokens = completion.tokens_of(self.reader, encoded, ids, bool(asked.messages))
            return {"tokens": prompt + tokens, "prompt_length": len(prompt), "text": decode(self.tokenizer, [*encoded.ids, *ids])}

        async def frames() -> AsyncGenerator[dict, None]:
            yield {"type": "prompt", "prompt_length": len(prompt), "tokens": prompt}
            sent = 0
            async with aclosing(job.events()) as events:
                async for _, found, done in events:
                    if isinstance(found, Failure):
                        raise found.error
                    ids = found if done else [int(i) for i in found.split()]
                    tokens = completion.tokens_of(self.reader, encoded, ids, bool(asked.messages), whole=done)
                    for token in tokens[sent:]:
                        yield {"type": "token", "token": token}
                    sent = max(sent, len(tokens))
            yield {"type": "done", "text": decode(self.tokenizer, [*encoded.ids, *ids])}

        return frames()

    # ------------------------------------------------------------------------------------------------------------ ours

    async def edit(self, asked: schema.Edit, held: ExitStack) -> Any:
        """``POST /edit``: what a given text is worth for an activation, phrase by phrase, and what the subject makes of it in its place."""
        held.enter_context(self.scores.take())
        if asked.activation is not None:
            a_D, found = self.reader.vectors([asked.activation])[0], {}
        else:
            context = await self.worker.call(self.reader.read, asked, [asked.position])
            a_D, at = context.a_PD[0], context.positions[0]
            patched, _ = await self.worker.call(self.reader.steer, context.encoded.ids, at, asked.description, 1.0, 0)
            found = {"position": at, "kl": patched.kl, "before": patched.before, "after": patched.after}
        (scored,) = await self.worker.call(self.reader.score, [asked.description], a_D[None])
        drops = await self.worker.call(self.reader.drops, asked.description, a_D)
        worth = {"fve": scored.extra["fve"], "mse": scored.mse, "cosine_similarity": scored.cosine_similarity}
        return worth | found | {"failed": scored.extra["failed"], "drops": drops}

    async def steer(self, asked: schema.Steer, held: ExitStack) -> Any:
        """``POST /steer``: the subject's own continuation, and the one with a text in an activation's place."""
        held.enter_context(self.scores.take())
        encoded = await self.worker.call(self.reader.encode, asked, asked.tokens)
        count, at = len(encoded.ids), asked.position
        if not -count <= at < count:
            raise Refused(400, f"Position {at} out of range (0..{count - 1})")
        arguments = encoded.ids, at % count, asked.description, asked.weight, asked.tokens
        done, scored = await self.worker.call(self.reader.steer, *arguments)
        return asdict(done) | {"position": at % count, "weight": asked.weight, "score": {"fve": scored.extra["fve"], "mse": scored.mse}}

    async def samples(self, asked: schema.Samples, held: ExitStack) -> Any:
        """``POST /samples``: several texts of one activation, and how much they agree."""
        held.enter_context(self.describes.take())
        if asked.activation is not None:
            rows = [Row(self.reader.vectors([asked.activation])[0], 0, asked.seed)]
        else:
            rows = self.reader.rows(await self.worker.call(self.reader.read, asked, [asked.position]), asked.seed)
        job = self.worker.submit(
            ("samples", *_way(asked)),
            [(row, asked) for row in rows],
            lambda given, _: self.reader.sample([r for r, _ in given], given[0][1]),
        )
        return (await _results(job))[0]

    # ---------------------------------------------------------------------------------------------------------- within

    def _say(self, rows: list[Row], asked: Saying) -> Job:
        """Rows in the queue, to be batched with others that are asked for in the same way."""
        return self.worker.submit(
            ("say", *_way(asked)),
            [(row, asked) for row in rows],
            lambda given, tell: self.reader.say([r for r, _ in given], given[0][1], tell),
        )

    def _shown(self, context: Context) -> list[dict]:
        """What is known of each position before it is explained."""
        tokens, dumper = infos(self.tokenizer, context.encoded), self.reader.module.config.activation_dumper
        norms, likeliest = context.a_PD.norm(dim=-1).tolist(), self.reader.logit_lens(context.a_PD)
        trained = range(dumper.min_pos, dumper.seq_len)
        return [
            tokens[at] | {"l2_norm": norm, "megalens": {"trained": at in trained, "logit_lens": top}}
            for at, norm, top in zip(context.positions, norms, likeliest, strict=True)
        ]


def handler(routes: Routes, kind: type[Asked], method: Callable[[Asked, ExitStack], Any]) -> Callable[[Request], Any]:
    """The endpoint of a route: its body read and checked, its answer or stream sent, and what it held given back, however it ends."""

    async def endpoint(request: Request) -> Response:
        held = ExitStack()
        try:
            asked = schema.read(kind, await body_of(request, routes.most_bytes), routes.limits)
            made = await while_listening(request.receive, method(asked, held))
            if isinstance(made, AsyncIterator):
                return Events(made, held.pop_all().close)  # type: ignore[arg-type]
            return answer(made)
        except (Left, ClientDisconnect):
            raise
        except Exception as error:  # noqa: BLE001 (a request, whatever it holds, gets an answer)
            return refusal(error)
        finally:
            held.close()

    return endpoint


async def _results(job: Job) -> list[Any]:
    """All results of a job, in the order of its rows; the first failure is raised."""
    found: dict[int, Any] = {}
    async with aclosing(job.events()) as events:
        async for number, result, done in events:
            if isinstance(result, Failure):
                raise result.error
            if done:
                found[number] = result
    return [found[number] for number in range(len(found))]


def _way(asked: Saying) -> tuple:
    """What two requests must have in common to share a batch."""
    return asked.search, asked.temperature, asked.max_new_tokens, asked.k


def _described(made: Told) -> dict:
    return {"description": made.description, "mse": made.mse, "cosine_similarity": made.cosine_similarity, "megalens": made.extra}


def _result(shown: dict, made: Told) -> dict:
    """A position's ``ExplainResult``, and ``megalens``."""
    return shown | _described(made) | {"generated": False, "megalens": made.extra | shown["megalens"]}


def _frame(place: dict, found: Any, done: bool, full: Callable[[Told], dict]) -> dict:
    if isinstance(found, Failure):
        return {"error": told(found.error)[1], **place}
    return full(found) if done else {**place, "text": found, "done": False}

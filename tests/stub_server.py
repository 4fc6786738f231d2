"""A server of OpenAI's protocol without a model: its responses follow from the request alone, its faults are chosen.

    with StubServer(kind="vllm") as stub:
        ServerGenerator(stub.url, ...)

Or in another process, which prints its address: ``python tests/stub_server.py --delay 0.05``.
"""

import argparse
import asyncio
import hashlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

WORDS = "so then we add two and three which gives five of them in the image at last".split()
IMAGE_TOKENS = 256
KNOWN = {"model", "messages", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"}
KNOWN |= {"n", "logprobs", "generation_config"}
"""Fields that `transformers serve` does not refuse."""


def stub_text(body: dict[str, Any], number: int, words: int = 12) -> str:
    """The response to a request: words that depend on the prompt and, at a temperature above 0, on the seed."""
    asked = body.get("prompt") or body.get("messages")
    seed = (body.get("seed") or 0) + number if body.get("temperature", 1) else "greedy"
    digest = hashlib.sha256(json.dumps([asked, seed]).encode()).digest()
    return " ".join([WORDS[byte % len(WORDS)] for byte in digest[:words]] + [f"Final answer: {digest[-1] % 10}"])


class StubServer:
    """Serve on a free port in a thread of its own.

    Args:
        model: the one it serves.
        kind: whose ways it has: ``vllm``, ``sglang``, ``lmdeploy``, ``transformers`` or ``other``.
        faults: what happens to the requests in turn, before those that are answered: a status such as 429 or 500, ``reset``,
            ``half``, ``empty``, ``garbage``, ``no choices``, ``slow``, the bytes of a stream or an iterator of them, or None for an
            answer.
        poison: the fault of one request, from its body; None for none.
        delay: seconds until a response.
        key: the key that it wants.
        retry_after: seconds, in the header of a status 429.
        context: the longest prompt, in tokens; a longer one has status 400.
        ignores_n, same: it ignores `n`, or the seed.
        said_model: the model that its responses name.
        prefix: ``flag`` continues a prefix where continue_final_message is set, ``always``, ``closed`` or ``refused`` (422); None
            for its kind's way.
        keep: keep the requests' bodies.
        text: the response to a request from its body and the number of the sample.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        kind: str = "vllm",
        faults: Iterable[Any] = (),
        poison: Callable[[dict[str, Any]], Any] | None = None,
        delay: float = 0.0,
        key: str | None = None,
        retry_after: float | None = None,
        context: int | None = None,
        ignores_n: bool | None = None,
        same: bool = False,
        said_model: str | None = None,
        prefix: str | None = None,
        keep: bool = True,
        port: int = 0,
        text: Callable[[dict[str, Any], int], str] = stub_text,
    ) -> None:
        self.model, self.kind, self.poison, self.delay, self.key, self.retry_after = model, kind, poison, delay, key, retry_after
        self.faults = list(faults)
        self.text = text
        self.context, self.same, self.said_model, self.keep = context, same, said_model, keep
        self.ignores_n = kind == "transformers" if ignores_n is None else ignores_n
        ways = {"vllm": "flag", "sglang": "flag", "lmdeploy": "always", "transformers": "refused"}
        self.prefix = prefix or ways.get(kind, "closed")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.asked = self.answered = self.now = self.most_at_once = 0
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/asked", lambda request: JSONResponse(self.asked)),  # for benchmarks/pipelines.py
            Route("/v1/chat/completions", self._asked, methods=["POST"]),
            Route("/v1/completions", self._asked, methods=["POST"]),
        ]
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off"))

    def __enter__(self) -> "StubServer":
        self._socket.listen(1024)  # from now on connections wait, however late the thread begins
        self._thread = threading.Thread(target=self.serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._socket.close()

    def serve(self) -> None:
        """Serve in this thread."""
        self._socket.listen(1024)
        self._server.run(sockets=[self._socket])

    async def _models(self, request: Request) -> Response:
        if refused := self._unauthorized(request):
            return refused
        model: dict[str, Any] = {"id": self.model, "object": "model", "owned_by": self.kind if self.kind != "transformers" else ""}
        if self.kind == "transformers":
            model["status"] = {"value": "loaded"}
        return JSONResponse({"object": "list", "data": [model]})

    def _unauthorized(self, request: Request) -> Response | None:
        sent = request.headers.get("authorization")
        if self.key is None or sent == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": f"Incorrect API key provided: {sent}."}}, status_code=401)

    async def _asked(self, request: Request) -> Response:
        body = await request.json()
        self.asked += 1
        self.now += 1
        self.most_at_once = max(self.now, self.most_at_once)
        if self.keep:
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
        try:
            fault = self.faults.pop(0) if self.faults else self.poison(body) if self.poison else None
            if refused := self._unauthorized(request):
                return refused
            await asyncio.sleep(30 if fault == "slow" else self.delay)
            return self._fault(fault, request) if fault not in (None, "slow") else self._answer(body)
        finally:
            self.now -= 1

    def _fault(self, fault: Any, request: Request) -> Response:
        if fault == "reset":
            request.receive.__self__.transport.abort()  # type: ignore[attr-defined]
            return Response()
        if fault == "half":

            async def half() -> Any:
                yield b'{"id": "1", "choices": [{"index": 0, "mess'

            return StreamingResponse(half(), headers={"content-length": "400"}, media_type="application/json")
        if isinstance(fault, bytes | AsyncIterator):
            parts = fault if isinstance(fault, AsyncIterator) else iter([fault])
            return StreamingResponse(parts, media_type="text/event-stream")
        bodies = {"empty": "", "garbage": "<html>Bad gateway</html>", "no choices": '{"id": "1", "choices": [], "model": "tiny"}'}
        if fault in bodies:
            return Response(bodies[fault], media_type="application/json")
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return JSONResponse({"error": {"message": f"status {fault}"}}, status_code=fault, headers=headers)

    def _answer(self, body: dict[str, Any]) -> Response:
        def refused(status: int, reason: str) -> Response:
            return JSONResponse({"error": {"message": reason}}, status_code=status)

        if body["model"] != self.model:
            return refused(404, f"The model `{body['model']}` does not exist.")
        if self.kind == "transformers" and (unknown := set(body) - KNOWN):
            return refused(422, f"Unexpected fields in the request: {unknown}")
        prompt_tokens = self._prompt_tokens(body)
        if self.context is not None and prompt_tokens > self.context:
            text = f"This model's maximum context length is {self.context} tokens, and the prompt has {prompt_tokens}."
            return refused(400, text)
        count = 1 if self.ignores_n else body.get("n", 1)
        limit = body.get("max_tokens", 16)
        choices, completion_tokens = [], 0
        for number in range(count):
            words = self.text(body, 0 if self.same else number).split(" ")
            text, finish = " ".join(words[:limit]), "stop" if len(words) < limit else "length"
            for stop in body.get("stop") or ():
                text = text.split(stop)[0]
            said: dict[str, Any] = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
            if body.get("logprobs"):
                each = [{"token": word, "logprob": -0.5, "top_logprobs": []} for word in words[:limit]]
                said["logprobs"] = {"token_logprobs": [-0.5] * len(each)} if "prompt" in body else {"content": each}
            choices.append({"index": number, "finish_reason": finish, **said})
            completion_tokens += min(len(words) + 1, limit)
        self.answered += len(choices)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        usage["total_tokens"] = sum(usage.values())
        common = {"id": "1", "created": 0, "model": self.said_model or body["model"]}
        if body.get("stream"):
            return self._streamed(common, choices, usage)
        kind = "text_completion" if "prompt" in body else "chat.completion"
        return JSONResponse({**common, "object": kind, "choices": choices, "usage": usage})

    def _streamed(self, common: dict[str, Any], choices: list[dict[str, Any]], usage: dict[str, int]) -> Response:
        deltas: list[dict[str, Any]] = []
        for choice in choices:
            first, *rest = (choice["text"] if "text" in choice else choice["message"]["content"]).split(" ")
            for text, finish in [(first, None), *((f" {word}", None) for word in rest), ("", choice["finish_reason"])]:
                said: dict[str, Any] = {"text": text} if "text" in choice else {"delta": {"content": text}}
                deltas.append({"index": choice["index"], "finish_reason": finish, **said})
        chunks = [{**common, "object": "chat.completion.chunk", "choices": [delta]} for delta in deltas]
        chunks.append({**common, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    def _prompt_tokens(self, body: dict[str, Any]) -> int:
        """One token a word; three open a turn and two close it, and the prompt ends with an open turn of the assistant."""
        if "prompt" in body:
            return len(body["prompt"].split())
        tokens = 0
        for message in body["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            tokens += 5 + sum(len(part["text"].split()) if part["type"] == "text" else IMAGE_TOKENS for part in parts)
        continued = body["messages"][-1]["role"] == "assistant" and (
            self.prefix == "always" or (self.prefix == "flag" and body.get("continue_final_message"))
        )
        return tokens - 2 if continued else tokens + 3


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--kind", default="vllm")
    parser.add_argument("--delay", type=float, default=0.0)
    args = parser.parse_args()
    stub = StubServer(kind=args.kind, delay=args.delay, port=args.port, keep=False)
    print(stub.url, flush=True)
    stub.serve()

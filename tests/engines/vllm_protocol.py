"""A server that speaks vLLM's HTTP protocol over real sockets, with the embedded engine behind it.

What a test of the client needs and vLLM on a CPU is too slow for. It can be told to be wrong in the ways that servers
were seen to be wrong: raw log-probabilities, an adapter's earlier files under a new name, a load that fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from bascule.plugins.engine import Message, Sampled, SampleRequest
from bascule.runtime.engines.transformers import TransformersEngine
from bascule.schemas.errors import EngineError, PromptError
from bascule.schemas.trajectory import Output, Sampling, unpack_floats, unpack_ids
from bascule.trainers.base_model import load_model, resolve_model

KEY = "sk-protocol"


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class VllmProtocol:
    """One server.

    Attributes:
        served: folders of adapters, by the name that they are loaded under.
        stale: adapters whose files are taken from another folder; of a server that caches.
        raw: log-probabilities are those at temperature 1, whatever the sampling's is.
        refuse_load: adapters are not taken.
        open: completions under way; ``cut`` those whose client has gone.
        asked: adapters and the base model, in the order of completions.
        mixed: whether a completion of the base model was under way beside one of an adapter.
        held: completions wait for it.
    """

    def __init__(self, engine: TransformersEngine, context: int = 256) -> None:
        self._engine = engine
        self._context = context
        self._server: asyncio.Server | None = None
        self.url = ""
        self.served: dict[str, str] = {}
        self.stale: dict[str, str] = {}
        self.raw = self.refuse_load = False
        self.fail: Refusal | None = None
        self.open = self.cut = 0
        self.asked: list[str] = []
        self.mixed = False
        self._under_way: list[bool] = []
        self._loading = asyncio.Lock()
        self.held = asyncio.Event()
        self.held.set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self.url

    def folders(self, adapter: str) -> list[Path]:
        """Those that an adapter is served from, whatever name the client gave it there."""
        return [Path(folder) for name, folder in self.served.items() if name.startswith(f"{adapter}-")]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            work = asyncio.create_task(self._answer(method, path, headers, json.loads(body) if body else {}))
            gone = asyncio.create_task(reader.read(1))
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                self.cut += 1
            else:
                status, answer = work.result()
                text = answer if isinstance(answer, str) else json.dumps(answer)
                kind = "text/plain" if isinstance(answer, str) else "application/json"
                writer.write(
                    f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(text.encode())}\r\n"
                    f"connection: close\r\n\r\n{text}".encode()
                )
                await writer.drain()
            gone.cancel()
        writer.close()

    async def _answer(
        self, method: str, path: str, headers: dict[str, str], body: dict[str, Any]
    ) -> tuple[int, dict[str, Any] | str]:
        try:
            if headers.get("authorization") != f"Bearer {KEY}":
                raise Refusal(401, f"Received {headers.get('authorization')}")
            if self.fail is not None and path == "/v1/completions":
                raise self.fail
            match method, path:
                case "GET", "/version":
                    return 200, {"version": "0.0.0-protocol"}
                case "GET", "/v1/models":
                    return 200, {"object": "list", "data": self._models()}
                case "POST", "/tokenize":
                    return 200, self._tokenize(body)
                case "POST", "/v1/load_lora_adapter":
                    return 200, await self._load(body["lora_name"], body["lora_path"])
                case "POST", "/v1/unload_lora_adapter":
                    if body["lora_name"] not in self.served:
                        raise Refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
                    del self.served[body["lora_name"]]
                    await self._engine.unload_adapter(self._inner(body["lora_name"]))
                    return 200, "Success"
                case "POST", "/v1/completions":
                    self.open += 1
                    try:
                        return 200, await self._complete(body)
                    finally:
                        self.open -= 1
            raise Refusal(404, "Not Found")
        except Refusal as e:
            return e.status, {"error": {"message": str(e), "type": "X", "code": e.status}}
        except PromptError as e:
            return 400, {"error": {"message": e.message, "type": "BadRequestError", "code": 400}}
        except EngineError as e:
            return 500, {"error": {"message": e.message, "type": "InternalServerError", "code": 500}}

    def _inner(self, name: str) -> str:
        """The engine's name: each server has adapters of its own."""
        return f"{id(self)}.{name}"

    def _models(self) -> list[dict[str, Any]]:
        base = {"id": "base", "root": "model", "parent": None, "max_model_len": self._context}
        return [base, *({"id": n, "root": p, "parent": "base"} for n, p in self.served.items())]

    def _tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"] if "prompt" in body else tuple(Message(**m) for m in body["messages"])
        tokens = list(self._engine.encode(prompt))
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self._context}

    async def _load(self, name: str, folder: str) -> str:
        if not name or not folder:
            raise Refusal(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if self.refuse_load:
            raise Refusal(500, "No room for another adapter")
        async with self._loading:  # one after another, as vLLM does
            if name in self.served:
                raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
            await self._engine.load_adapter(self._inner(name), Path(self.stale.get(name.partition("-")[0], folder)))
            self.served[name] = folder
        return f"Success: LoRA adapter '{name}' added successfully."

    async def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        model, prompt = body["model"], body["prompt"]
        if model != "base" and model not in self.served:
            raise Refusal(404, f"The model `{model}` does not exist.")
        if body.get("n", 1) > 1 and body["temperature"] == 0:
            raise Refusal(400, "n must be 1 when using greedy sampling")
        self.asked.append(model)
        self._under_way.append(model == "base")
        self.mixed = self.mixed or len(set(self._under_way)) > 1
        try:
            return await self._completed(body, model, prompt)
        finally:
            self._under_way.remove(model == "base")

    async def _completed(self, body: dict[str, Any], model: str, prompt: Any) -> dict[str, Any]:
        await self.held.wait()
        adapter = None if model == "base" else self._inner(model)
        if "prompt_logprobs" in body:
            (scores,) = await self._engine.score(adapter, prompt)
            places = [None, *({str(i): {"logprob": x}} for i, x in zip(prompt[1:], scores, strict=True))]
            return {"choices": [{"index": 0, "text": "", "token_ids": [0], "prompt_logprobs": places}]}
        sampled = await self._sampled(body, adapter)
        choices = [self._choice(i, o, prompt) for i, o in enumerate(sampled.outputs)]
        if body.get("logprobs"):  # the two likeliest of the first token
            heat = 1.0 if self.raw else body["temperature"]
            top = {f"token_id:{t}": x for t, x in self._likeliest(prompt, heat).items()}
            choices[0]["logprobs"]["top_logprobs"] = [top]
        return {"choices": choices}

    async def _sampled(self, body: dict[str, Any], adapter: str | None) -> Sampled:
        text = self._engine.decode(body["prompt"])
        assert list(self._engine.encode(text)) == body["prompt"], "the test's prompt does not survive a round trip"
        sampling = Sampling(
            temperature=body["temperature"], max_tokens=body["max_tokens"], stop=tuple(body.get("stop", ()))
        )
        request = SampleRequest(
            trajectory="protocol",
            call=0,
            prompt=text,
            n=body.get("n", 1),
            sampling=sampling,
            seed=body.get("seed", 0),
            adapter=adapter,
        )
        return await self._engine.sample(request)

    def _choice(self, index: int, output: Output, prompt: list[int]) -> dict[str, Any]:
        return {
            "index": index,
            "text": output.text,
            "finish_reason": output.finish_reason,
            "logprobs": {"token_logprobs": unpack_floats(output.logprobs)},
            "token_ids": unpack_ids(output.token_ids),
            "prompt_token_ids": prompt,
        }

    def _likeliest(self, prompt: list[int], heat: float) -> dict[int, float]:
        with torch.inference_mode():
            model: Any = load_model(resolve_model(self._engine.model_name))
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        values, ids = (logits / heat).log_softmax(-1).topk(2)
        return dict(zip(ids.tolist(), values.tolist(), strict=True))

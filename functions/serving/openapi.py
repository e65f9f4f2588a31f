"""The OpenAPI document, made from the schemas that read requests and write replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from functions.serving.parse import DATA_CLASS_HEADER, DEADLINE_HEADER, LOCAL_ONLY
from functions.serving.replies import (
    ChatCompletion,
    ChatCompletionChunk,
    ErrorReply,
    Health,
    InvokeReply,
    ModelEntry,
    ModelList,
    Ready,
    TextCompletion,
)
from functions.serving.schema import ChatRequest, CompletionRequest, InvokeRequest

_REQUESTS = (ChatRequest, CompletionRequest, InvokeRequest)
_REPLIES = (
    *(ChatCompletion, ChatCompletionChunk, TextCompletion, InvokeReply),
    *(ModelEntry, ModelList, ErrorReply, Health, Ready),
)
_ERRORS = {
    "400": "not readable: encoding, JSON, nesting, or longer than the model's context",
    "404": "no such model",
    "413": "the body is too large",
    "422": "a field has a value that cannot be served; `param` names it",
    "429": "too many requests; `Retry-After` says when to come back",
    "500": "something broke",
    "503": "not ready, or the deadline passed in the queue",
}
_KEPT_ERRORS = {
    "403": "the request is local-only, and this route shares or keeps",
    "409": "the id was used before for something else",
    "410": "the conversation was deleted",
}


@dataclass(frozen=True)
class Extra:
    """Routes that only one function has: its paths, and the models that they name."""

    paths: Mapping[str, Any] = field(default_factory=dict)
    requests: tuple[type[BaseModel], ...] = ()
    replies: tuple[type[BaseModel], ...] = ()


def operation(
    summary: str, reply: type[BaseModel], request: type[BaseModel] | None = None, **parameters: str
) -> dict[str, Any]:
    """One method of a path. `parameters` are its texts by name; those of the path begin with `in_path_`."""
    said: dict[str, Any] = {"summary": summary, "parameters": [_parameter(*pair) for pair in parameters.items()]}
    if request is not None:
        said["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    errors = {code: _response(text, ErrorReply) for code, text in {**_ERRORS, **_KEPT_ERRORS}.items()}
    return {**said, "responses": {"200": _response("as asked", reply), **errors}}


def document(name: str, extra: Extra | None = None) -> dict[str, Any]:
    """The document of the function called `name`."""
    extra = extra or Extra()
    wanted = [(model, "validation") for model in (*_REQUESTS, *extra.requests)]
    wanted += [(model, "serialization") for model in (*_REPLIES, *extra.replies)]
    _, schemas = models_json_schema(wanted, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {"title": f"edgecascade {name}", "version": "1", "description": "OpenAI-compatible, with extensions."},
        "paths": {**_answer_paths(), **_model_paths(), **_status_paths(), **extra.paths},
        "components": {"schemas": schemas["$defs"]},
    }


def _parameter(name: str, description: str) -> dict[str, Any]:
    in_path = name.startswith("in_path_")
    where = {"in": "path", "required": True} if in_path else {"in": "query"}
    schema = {"type": "string"}
    return {"name": name.removeprefix("in_path_"), **where, "description": description, "schema": schema}


def _answer_paths() -> dict[str, Any]:
    chat = _post("Answer a chat", ChatRequest, ChatCompletion, ChatCompletionChunk)
    text = _post("Continue a text", CompletionRequest, TextCompletion, TextCompletion)
    invoke = _post("Answer one text, as `faas-cli invoke` sends it", InvokeRequest, InvokeReply, None)
    plain = {"text/plain": {"schema": {"type": "string"}}}
    invoke["requestBody"]["content"].update(plain)
    invoke["responses"]["200"]["content"].update(plain)
    return {"/v1/chat/completions": {"post": chat}, "/v1/completions": {"post": text}, "/": {"post": invoke}}


def _model_paths() -> dict[str, Any]:
    one = _get("Describe one model", ModelEntry)
    one["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    one["responses"]["404"] = _response(_ERRORS["404"], ErrorReply)
    return {"/v1/models": {"get": _get("List the models", ModelList)}, "/v1/models/{name}": {"get": one}}


def _status_paths() -> dict[str, Any]:
    ready = _get("Whether requests are taken", Ready)
    ready["responses"]["429"] = _response("the queue is full", Ready)
    ready["responses"]["503"] = _response("loading, failed to load, or stopping", Ready)
    metrics = {"summary": "Prometheus metrics", "responses": {"200": _content("metrics", {"text/plain": {}})}}
    self = {"summary": "This document", "responses": {"200": _content("OpenAPI", {"application/json": {}})}}
    return {
        "/healthz": {"get": _get("Whether the process answers", Health)},
        "/_/ready": {"get": ready},
        "/metrics": {"get": metrics},
        "/openapi.json": {"get": self},
    }


def _post(
    summary: str, request: type[BaseModel], reply: type[BaseModel], chunk: type[BaseModel] | None
) -> dict[str, Any]:
    answer = _response("the answer", reply)
    if chunk is not None:
        answer["content"]["text/event-stream"] = {"schema": _ref(chunk)}
    return {
        "summary": summary,
        "parameters": [
            _header(DEADLINE_HEADER, "milliseconds left to answer; the smaller of this and `deadline_ms` holds"),
            _header(DATA_CLASS_HEADER, f"`{LOCAL_ONLY}`: the request must not leave the device site"),
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
        "responses": {"200": answer, **{code: _response(text, ErrorReply) for code, text in _ERRORS.items()}},
    }


def _get(summary: str, reply: type[BaseModel]) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": _response("as asked", reply)}}


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}


def _response(description: str, model: type[BaseModel]) -> dict[str, Any]:
    return _content(description, {"application/json": {"schema": _ref(model)}})


def _content(description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": content}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}

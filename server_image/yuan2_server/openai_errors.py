"""OpenAI's error bodies, and what a worker's error codes mean in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from yuan2_server.protocol import ErrorCode


class OpenAIError(Exception):
    """An error as OpenAI's API reports it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, type_: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type = type_ or ("invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {
            "error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code},
        }

    def response(self) -> JSONResponse:
        """The HTTP answer. Clients may retry 429 and 503 after a second."""
        headers = {"retry-after": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def invalid(param: str | None, message: str, code: str | None = None) -> OpenAIError:
    """A request that cannot be answered as it is: 400, naming the parameter."""
    return OpenAIError(400, message, param=param, code=code)


def model_not_found(model: str, available: list[str]) -> OpenAIError:
    """404 for a model that nobody serves here."""
    known = f"; available: {', '.join(available)}" if available else ""
    return OpenAIError(
        404, f"The model `{model}` does not exist{known}.", param="model", code="model_not_found"
    )


def no_worker(model: str) -> OpenAIError:
    """503 while the model is served here but no worker is ready."""
    return OpenAIError(503, f"No worker for `{model}` is ready; try again later.", code="no_worker")


def from_worker(document: Mapping[str, Any], model: str, prompt: str = "messages") -> OpenAIError:
    """The error that a worker's document reports; `prompt` is the parameter that holds the text."""
    code, message = int(document["error_code"]), str(document.get("text", ""))
    if code == ErrorCode.INVALID_MODEL:
        return model_not_found(model, [])
    if code in (ErrorCode.RATE_LIMIT, ErrorCode.QUOTA_EXCEEDED):
        return OpenAIError(429, message, code="rate_limit_exceeded", type_="rate_limit_error")
    if code in (ErrorCode.ENGINE_OVERLOADED, ErrorCode.CONTROLLER_NO_WORKER):
        return OpenAIError(503, message, code="no_worker")
    if 40000 <= code < 41000 or code in (ErrorCode.PARAM_OUT_OF_RANGE, ErrorCode.CONTEXT_OVERFLOW):
        return _refused(code, message, document.get("param"), prompt)
    if code == ErrorCode.CUDA_OUT_OF_MEMORY:
        return OpenAIError(500, message, code="out_of_memory")
    return OpenAIError(500, message, code="worker_failed")


def _refused(code: int, message: str, field: Any, prompt: str) -> OpenAIError:
    """A worker's refusal, with the parameter as the client knows it; FastChat's own worker names none."""
    overflow = code == ErrorCode.CONTEXT_OVERFLOW
    if field is None and overflow:
        field = "prompt"
    names = {"max_new_tokens": "max_tokens", "prompt": prompt, "prompt_ids": prompt}
    param = names.get(field, field) if isinstance(field, str) else None
    return invalid(param, message, "context_length_exceeded" if overflow else None)

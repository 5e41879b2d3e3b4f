"""Mistakes a user can correct, told in one line."""

from __future__ import annotations

from typing import ClassVar


class UserError(ValueError):
    """Something the user gave cannot work as it is.

    The text is one line that says what, where and the way out; `reason` is the CamelCase word that a
    condition or a `Termination` carries. A program that ends because of one exits with
    `contract.EXIT_INVALID`.
    """

    reason: ClassVar[str] = "InvalidJob"

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class DatasetError(UserError):
    """The training data cannot be used."""

    reason = "InvalidData"


class ModelError(UserError):
    """A model directory cannot be used."""

    reason = "InvalidModel"


class TokenizerError(ModelError):
    """A tokenizer cannot be used with Yuan 2.0."""


class MessageError(UserError):
    """A conversation breaks a rule: `field` says where in it, `problem` what is wrong."""

    reason = "InvalidData"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

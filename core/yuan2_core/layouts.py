"""Layouts of a record: FastChat and ShareGPT, OpenAI, Alpaca, BELLE, raw text. Pure.

What a model cannot be taught as text is an error that names the field: calls of tools as objects, pictures,
messages that are not to be learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from yuan2_core.errors import MessageError
from yuan2_core.messages import (
    Dialogue,
    Message,
    Style,
    Turn,
    brief,
    check_answer,
    check_text,
    kind,
    read_dialogue,
    read_message,
)

ALPACA_PROMPT: Final = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""Prompt of an Alpaca record without input (Stanford Alpaca)."""

ALPACA_PROMPT_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Prompt of an Alpaca record with input (Stanford Alpaca)."""

SHAREGPT: Final = Style(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "observation": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "function_call": "assistant",
    },
)
"""FastChat's and ShareGPT's messages. Calls of tools are text there, and so are learned as what they are."""

OPENAI_RECORD: Final = Style(
    "role",
    "content",
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "tool": "user",
        "assistant": "assistant",
    },
)
"""Messages of OpenAI's fine-tuning files: what a tool answers is what the model reads next."""

_SPEAKER: Final = re.compile(r"(?:\A|\n)(Human|Assistant):")
"""Begins a message in BELLE's `instruction`."""

TEXT_FIELDS: Final = ("text", "content")
"""Fields of a record that may hold raw text."""

Reader = Callable[[Mapping[str, Any]], Dialogue]


def read_fastchat(record: Mapping[str, Any]) -> Dialogue:
    """`conversations`, beside them `system` and, as text, `tools`."""
    dialogue = read_dialogue(
        list_of(record, "conversations"), record.get("system"), field="conversations", style=SHAREGPT
    )
    return _with_turns(with_tools(dialogue, record), "conversations", "human")


def read_openai(record: Mapping[str, Any]) -> Dialogue:
    """`messages` with `role` and `content`."""
    dialogue = read_dialogue(openai_messages(record, "messages"), style=OPENAI_RECORD)
    return _with_turns(with_tools(dialogue, record), "messages", "user")


def read_alpaca(record: Mapping[str, Any]) -> Dialogue:
    """`instruction`, `input`, `output`; with `system` or `history`, a conversation without Alpaca's preamble,
    which stands for a system prompt."""
    answer = check_answer(check_text(field_of(record, "output"), "output"), "output")
    dialogue = alpaca_prompt(record)
    return Dialogue(dialogue.system, (*dialogue.turns, Turn(dialogue.question or "", answer)), None)


def alpaca_prompt(record: Mapping[str, Any]) -> Dialogue:
    """What stands before the answer of an Alpaca record."""
    instruction = check_text(field_of(record, "instruction"), "instruction")
    context = check_text(record.get("input", ""), "input")
    system = check_text(record.get("system") or "", "system")
    history = _history(record.get("history") or [])
    if system or history:
        question = f"{instruction}\n{context}" if context else instruction
        return with_tools(Dialogue(system or None, history, question), record)
    prompt = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT
    return with_tools(Dialogue(None, (), prompt.format(instruction=instruction, input=context)), record)


def read_belle(record: Mapping[str, Any]) -> Dialogue:
    """BELLE's multiturn_chat: `Human:` and `Assistant:` in the instruction."""
    instruction = check_text(field_of(record, "instruction"), "instruction")
    if check_text(record.get("input", ""), "input"):
        raise MessageError(
            "input", "must be empty; in this layout the instruction holds the whole conversation"
        )
    answer = check_answer(check_text(field_of(record, "output"), "output"), "output")
    messages = [*_belle_messages(instruction), Message("assistant", answer)]
    dialogue = read_dialogue(messages, field="instruction")
    if not dialogue.turns:
        raise MessageError("instruction", "no Human: message before the answer")
    return dialogue


def read_trl(record: Mapping[str, Any]) -> Dialogue:
    """TRL's `prompt` and `completion`, as text or as messages."""
    dialogue = trl_prompt(field_of(record, "prompt"))
    answer = answer_of(field_of(record, "completion"), "completion")
    return Dialogue(dialogue.system, (*dialogue.turns, Turn(dialogue.question or "", answer)), None)


def trl_prompt(prompt: Any) -> Dialogue:
    """A prompt as text, or as messages of which the last one asks."""
    if not isinstance(prompt, list):
        return Dialogue(None, (), check_text(prompt, "prompt"))
    dialogue = read_dialogue(
        openai_messages({"prompt": prompt}, "prompt"), field="prompt", style=OPENAI_RECORD
    )
    if dialogue.question is None:
        raise MessageError("prompt", "its last message must ask something")
    return dialogue


def answer_of(value: Any, field: str) -> str:
    """One answer: text, a message in either style, or a list of one message."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        style = SHAREGPT if SHAREGPT.role in value else OPENAI_RECORD
        message = read_message(_openai_message(value, field), field, style)
        if message.role != "assistant":
            raise MessageError(field, f"must be an answer, not a message of the {message.role}")
        return message.content
    return check_answer(check_text(value, field), field)


def read_text(record: Mapping[str, Any]) -> str:
    """Raw text of a record: its `text` or `content`.

    Raises:
        MessageError: it is missing, empty or no text.
    """
    name = next((name for name in TEXT_FIELDS if name in record), TEXT_FIELDS[0])
    text = check_text(field_of(record, name), name)
    if not text or text.isspace():
        raise MessageError(name, "empty text")
    return text


READERS: Final[Mapping[str, Reader]] = {
    "fastchat": read_fastchat,
    "openai": read_openai,
    "alpaca": read_alpaca,
    "belle": read_belle,
    "trl": read_trl,
}


def detect(record: Mapping[str, Any]) -> str | None:
    """The layout of a record by its fields; None where they do not tell."""
    if "conversations" in record:
        return "fastchat"
    if "messages" in record:
        return "openai"
    instruction = record.get("instruction")
    if "instruction" in record:
        return "belle" if isinstance(instruction, str) and _SPEAKER.match(instruction) else "alpaca"
    if "prompt" in record or "chosen" in record:
        return "trl"
    return "text" if "text" in record else None


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """A field that must be there."""
    if name not in record:
        raise MessageError(name, "missing")
    return record[name]


def list_of(record: Mapping[str, Any], name: str) -> list[Any]:
    """A field that must be a list of messages."""
    messages = field_of(record, name)
    if not isinstance(messages, list):
        raise MessageError(name, f"must be a list of messages, not {kind(messages)}")
    return messages


def openai_messages(record: Mapping[str, Any], name: str) -> list[Any]:
    """Messages of a record in OpenAI's style, each with its content as one text."""
    return [_openai_message(item, f"{name}[{place}]") for place, item in enumerate(list_of(record, name))]


def with_tools(dialogue: Dialogue, record: Mapping[str, Any]) -> Dialogue:
    """The definitions of tools behind the system prompt, where they are text.

    Raises:
        MessageError: they are objects.
    """
    for name in ("tools", "functions"):
        tools = record.get(name)
        if not tools:
            continue
        if not isinstance(tools, str):
            raise MessageError(
                name,
                f"definitions of tools are learned as text only, this is {kind(tools)}; write them into the "
                "system prompt as the model will read them",
            )
        if _is_empty_json(tools):
            continue
        check_text(tools, name)
        system = tools if dialogue.system is None else f"{dialogue.system}\n{tools}"
        dialogue = Dialogue(system, dialogue.turns, dialogue.question)
    return dialogue


def _is_empty_json(text: str) -> bool:
    """Whether a text says that there are no tools, as exports do."""
    try:
        return not json.loads(text)
    except ValueError:
        return not text.strip()


def _openai_message(message: Any, field: str) -> Any:
    if not isinstance(message, Mapping):
        return message
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise MessageError(
                f"{field}.{name}",
                "calls of tools are learned as text only; write the call into content as the model shall "
                "write it, and leave this field out",
            )
    if message.get("weight") not in (None, 1):
        raise MessageError(
            f"{field}.weight", f"{brief(message['weight'])}: training.loss says which answers are learned"
        )
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {
        **message,
        "content": "".join(_part(part, f"{field}.content[{i}]") for i, part in enumerate(content)),
    }


def _part(part: Any, field: str) -> str:
    kind_of_part = part.get("type") if isinstance(part, Mapping) else kind(part)
    if kind_of_part != "text":
        raise MessageError(field, f"only parts of type text can be learned, this is {brief(kind_of_part)}")
    return check_text(part.get("text"), f"{field}.text")


def _with_turns(dialogue: Dialogue, field: str, asker: str) -> Dialogue:
    if not dialogue.turns:
        raise MessageError(field, f"no {asker} message with an answer")
    return dialogue


def _history(pairs: Any) -> tuple[Turn, ...]:
    if not isinstance(pairs, list):
        raise MessageError("history", f"must be a list of pairs, not {kind(pairs)}")
    return tuple(_pair(pair, f"history[{place}]") for place, pair in enumerate(pairs))


def _pair(pair: Any, field: str) -> Turn:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise MessageError(field, "must be a question and its answer")
    question, answer = (check_text(part, f"{field}[{place}]") for place, part in enumerate(pair))
    return Turn(question, check_answer(answer, f"{field}[1]"))


def _belle_messages(instruction: str) -> list[Message]:
    """Messages before the answer; the text ends with the `Assistant:` that the answer follows."""
    before, *parts = _SPEAKER.split(instruction)
    if before or not parts:
        raise MessageError("instruction", "must begin with Human:")
    speakers, texts = parts[::2], parts[1::2]
    if speakers[-1] != "Assistant" or texts[-1].strip():
        raise MessageError("instruction", "must end with Assistant:, which the output goes on from")
    said = zip(speakers[:-1], texts[:-1], strict=True)
    return [Message("user" if speaker == "Human" else "assistant", text) for speaker, text in said]

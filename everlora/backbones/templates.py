"""From a row of instruction or chat data to the text of its prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from jinja2 import TemplateError

from everlora.errors import DataError, OptionError

__all__ = ["PLAIN_TEMPLATE", "PromptTemplate", "answer_of", "find_template"]

PLAIN_TEMPLATE = "{instruction}\n{input}\n"
_INPUT_LINE = re.compile(r"^\{input\}\n?", re.MULTILINE)


@dataclass(frozen=True)
class PromptTemplate:
    """How prompts are written.

    Attributes:
        text: what identifies the template: a chat template (jinja), or a format string.
        tokenizer: renders jinja templates; None for a format string.
    """

    text: str
    tokenizer: Any = None

    def prompt(self, row: Mapping[str, Any]) -> str:
        """Write the prompt of a row, everything before its answer.

        A format string gets `instruction` and `input`; a line of it that holds nothing but `{input}` goes where the
        input is empty. One message of the user is an instruction. A longer conversation has no place in a template
        that knows no messages: it is written as `role: content` lines, ending in `assistant: `.

        Args:
            row: what `everlora.streams.parse_row` returned, with `instruction` or `messages`.

        Raises:
            DataError: a chat template refuses the row.
        """
        messages = _messages(row)
        if self.tokenizer is not None and "messages" in self.text:
            return self._render(messages)
        if len(messages) > 1 or messages[0]["role"] != "user":
            return "".join(f"{turn['role']}: {turn['content']}\n" for turn in messages) + "assistant: "
        instruction, given = row.get("instruction", messages[0]["content"]), row.get("input", "")
        if self.tokenizer is not None:
            return self._render(messages, instruction=instruction, input=given)
        lines = self.text if given else _INPUT_LINE.sub("", self.text)
        return lines.format(instruction=instruction, input=given)

    def _render(self, messages: list[dict[str, str]], **variables: str) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self.text, add_generation_prompt=True, tokenize=False, **variables
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the chat template refuses messages of the roles {roles} ({error}); change the row or the template"
            ) from error
        return text


def answer_of(row: Mapping[str, Any]) -> str | None:
    """Return the answer of a row with `instruction` or `messages`, None where it has none."""
    if "messages" in row:
        last = row["messages"][-1]
        return str(last["content"]) if last["role"] == "assistant" else None
    output = row.get("output")
    return None if output is None else str(output)


def find_template(tokenizer: Any, template: str) -> PromptTemplate:
    """Resolve the option `template`.

    Args:
        tokenizer: a Hugging Face tokenizer, perhaps with a chat template.
        template: `"auto"` (the tokenizer's chat template if it has one, else everlora's own), `"chat"`, `"plain"`, a
            jinja template over `messages` or over `instruction` and `input` (anything with `{{` or `{%` is read as
            one), or a format string with `{instruction}` and perhaps `{input}`.

    Raises:
        OptionError: none of these, or `"chat"` and the tokenizer has no chat template.
    """
    chat = _chat_template(tokenizer)
    if template == "chat" and chat is None:
        raise OptionError(
            "expected a tokenizer with a chat template for template='chat', found one without; use template='plain' "
            "or give the template itself"
        )
    if template in ("auto", "chat") and chat is not None:
        return PromptTemplate(chat, tokenizer)
    if template in ("auto", "plain"):
        return PromptTemplate(PLAIN_TEMPLATE)
    is_jinja = isinstance(template, str) and ("{{" in template or "{%" in template)
    if is_jinja and ("messages" in template or "instruction" in template):
        return PromptTemplate(template, tokenizer)
    try:
        fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except (TypeError, ValueError) as error:
        raise _wrong_template(template) from error
    if is_jinja or "instruction" not in fields or not fields <= {"instruction", "input"}:
        raise _wrong_template(template)
    return PromptTemplate(template)


def _wrong_template(template: object) -> OptionError:
    return OptionError(
        f"expected template as 'auto', 'chat', 'plain', a jinja template, or a text with {{instruction}} and perhaps "
        f"{{input}}, found {template!r}"
    )


def _chat_template(tokenizer: Any) -> str | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise OptionError(
            f"expected one chat template, found several in the tokenizer ({names}); give the template to use as text"
        ) from error


def _messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the conversation before the answer."""
    if "messages" in row:
        messages = list(row["messages"])
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    text = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
    return [{"role": "user", "content": text}]

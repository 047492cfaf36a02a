"""Prompts as a chat template, a format string or everlora's own template writes them."""

from __future__ import annotations

from typing import Any

import pytest

from everlora.errors import DataError, OptionError
from tests.backbones.language_builders import CHAT_TEMPLATE, byte_tokenizer, chat, make, shown, supervised, task


def test_the_chat_template_is_taken_where_there_is_one_and_bos_stands_once() -> None:
    inputs = make(tokenizer=byte_tokenizer(chat_template=CHAT_TEMPLATE))
    encoded = inputs.encode([task("add", "4", input="1"), chat(("system", "s"), ("user", "u"), ("assistant", "4"))])
    assert shown(inputs, encoded.row(0)) == "<[user]add\n1;[assistant]4>"
    assert shown(inputs, encoded.row(1)) == "<[system]s;[user]u;[assistant]4>"
    assert inputs.template_text == CHAT_TEMPLATE
    without = make(tokenizer=byte_tokenizer(chat_template=CHAT_TEMPLATE.removeprefix("{{ bos_token }}")))
    assert without.encode_prompts([task("add")])[0] == inputs.encode_prompts([task("add")])[0]
    short = make(max_length=16, tokenizer=inputs.tokenizer)
    assert shown(short, short.encode([task("add", "4")]).row(0)) == "<d;[assistant]4>"


def test_the_plain_template_drops_an_empty_input() -> None:
    inputs = make(tokenizer=byte_tokenizer(chat_template=CHAT_TEMPLATE), template="plain")
    prompts = inputs.encode_prompts([task("add", input="1 2"), task("add")])
    assert [inputs.decode(prompt) for prompt in prompts] == ["add\n1 2\n", "add\n"]
    assert inputs.template_text == "{instruction}\n{input}\n"


def test_conversations_without_a_chat_template_are_lines() -> None:
    inputs = make(max_length=200, template="Q: {instruction}\nA: ")
    turns = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "see you")]
    expected = "system: be kind\nuser: hi\nassistant: hello\nuser: bye\nassistant: "
    encoded = inputs.encode([chat(*turns)])
    assert inputs.decode(encoded.row(0)) == expected + "see you"
    assert supervised(inputs, encoded) == "see you>"
    assert inputs.decode(inputs.encode_prompts([chat(("user", "hi"))])[0]) == "Q: hi\nA: "


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("Q: {instruction}\n{input}\nA: ", "Q: add\n1\nA: "),
        ("{{ '{' }}{{ instruction }}|{{ input }}{{ '}' }}", "{add|1}"),
        ("{% for m in messages %}{{ m.role }}={{ m.content }}{% endfor %}", "user=add\n1"),
    ],
)
def test_templates_of_ones_own(template: str, prompt: str) -> None:
    inputs = make(template=template)
    assert inputs.decode(inputs.encode_prompts([task("add", input="1")])[0]) == prompt


@pytest.mark.parametrize(
    "template", ["chatty", "{question}", "{instruction} {other}", "{instruction", "{{ other }}", 3]
)
def test_templates_that_cannot_be(template: Any) -> None:
    with pytest.raises(OptionError, match="expected template as 'auto', 'chat', 'plain'"):
        make(template=template)


def test_a_chat_template_that_is_missing_or_refuses_a_row() -> None:
    with pytest.raises(OptionError, match="expected a tokenizer with a chat template"):
        make(template="chat")
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system please') }}{% endif %}x"
    with pytest.raises(DataError, match=r"row 2: the chat template refuses .* system, user \(no system please\)"):
        make(template=strict).encode([task("a", "b"), chat(("system", "s"), ("user", "u"), ("assistant", "a"))])
    several = byte_tokenizer()
    several.chat_template = {"tools": "x", "rag": "y"}
    with pytest.raises(OptionError, match=r"found several in the tokenizer \(rag, tools\)"):
        make(tokenizer=several)

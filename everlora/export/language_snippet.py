"""The Python in the README of an exported language model: plain transformers (and peft), nothing of everlora."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.quantization import chosen_quantization
from everlora.backbones.templates import PromptTemplate
from everlora.language.generation import ends_of

__all__ = ["LanguageSnippet", "chat_template_of"]

_DTYPES = {torch.float32: "torch.float32", torch.bfloat16: "torch.bfloat16"}


def chat_template_of(backbone: CausalLMBackbone) -> str | None:
    """The chat template that prompts are written with; None where another kind of template writes them."""
    text = backbone.inputs.template_text
    return text if _is_jinja(text) and "messages" in text else None


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text


@dataclass(frozen=True)
class LanguageSnippet:
    """What the code depends on.

    Attributes:
        backbone: the model and its inputs.
        base: where the base model is loaded from, for a PEFT export; `None` for a merged one.
        adapter: sub-folder of the adapter that is loaded; empty where it lies beside the README.
    """

    backbone: CausalLMBackbone
    base: str | None = None
    adapter: str = ""

    def code(self) -> str:
        """Complete program: loads the export from the current folder, defines `generate`, and calls it once."""
        parts = [self._imports(), self._loading(), self._prompt(), self._generate(), self._call()]
        return "\n\n".join("\n".join(part) for part in parts)

    @property
    def _quantization(self) -> str:
        return chosen_quantization(self.backbone.model)

    def _imports(self) -> list[str]:
        names = ["AutoModelForCausalLM", "AutoTokenizer"]
        names += ["BitsAndBytesConfig"] if self._quantization != "none" else []
        names += ["GenerationConfig"]
        lines = ["import torch", *(["from peft import PeftModel"] if self.base is not None else [])]
        return [*lines, f"from transformers import {', '.join(names)}"]

    def _loading(self) -> list[str]:
        dtype = _DTYPES[self.backbone.dtype]
        lines = ['folder = "."  # the folder that holds this file']
        lines += [f"base = {json.dumps(self.base)}  # the base model"] if self.base is not None else []
        options = f"dtype={dtype}"
        if self._quantization == "8bit":
            lines += ["bits = BitsAndBytesConfig(load_in_8bit=True)"]
        elif self._quantization == "4bit":
            lines += [
                "bits = BitsAndBytesConfig(",
                "    load_in_4bit=True,",
                '    bnb_4bit_quant_type="nf4",',
                "    bnb_4bit_use_double_quant=True,",
                f"    bnb_4bit_compute_dtype={dtype},",
                ")",
            ]
        options += ", quantization_config=bits" if self._quantization != "none" else ""
        where = "folder" if self.base is None else "base"
        lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
        lines += [f"model = AutoModelForCausalLM.from_pretrained({where}, {options})"]
        place = f'f"{{folder}}/{self.adapter}"' if self.adapter else "folder"
        lines += [f"model = PeftModel.from_pretrained(model, {place})"] if self.base is not None else []
        ends = sorted(ends_of(self.backbone)) or None
        return [
            *lines,
            "model = model.eval()",
            "# nothing of what the folder of the model says about sampling and penalties",
            f"model.generation_config = GenerationConfig(eos_token_id={ends}, pad_token_id={self.backbone.inputs.pad})",
        ]

    def _prompt(self) -> list[str]:
        lines = ["", "def prompt_of(instruction):", '    """Write an instruction the way the model learned them."""']
        text = self.backbone.inputs.template_text
        message = '[{"role": "user", "content": instruction}]'
        if chat_template_of(self.backbone) is not None:
            options = "add_generation_prompt=True, tokenize=False"
            return [*lines, f"    return tokenizer.apply_chat_template({message}, {options})"]
        if _is_jinja(text):
            return [
                *lines,
                "    return tokenizer.apply_chat_template(",
                f"        {message}, chat_template={json.dumps(text)}, tokenize=False,",
                '        instruction=instruction, input="", add_generation_prompt=True,',
                "    )",
            ]
        # Written by the template itself, so that the line of an empty input is left out as in training.
        written = PromptTemplate(text).prompt({"instruction": "{instruction}", "input": ""})
        return [*lines, f'    return {json.dumps(written)}.replace("{{instruction}}", instruction)']

    def _generate(self) -> list[str]:
        start = self.backbone.inputs.bos
        lines = [
            "",
            "def generate(prompt, max_new_tokens=64):",
            '    """Continue a text with the likeliest tokens."""',
        ]
        lines += ["    ids = tokenizer(prompt, add_special_tokens=False).input_ids"]
        if start is not None:
            lines += [f"    if ids[:1] != [{start}]:", f"        ids = [{start}, *ids]  # the token that starts a text"]
        return [
            *lines,
            "    ids = torch.tensor([ids], device=model.device)",
            "    options = {",
            '        "attention_mask": torch.ones_like(ids),',
            '        "max_new_tokens": max_new_tokens,',
            '        "do_sample": False,',
            "    }",
            "    with torch.no_grad():",
            "        output = model.generate(input_ids=ids, **options)",
            "    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)",
        ]

    def _call(self) -> list[str]:
        return ["", 'print(generate(prompt_of("put your own instruction here")))']

"""Text to token ids and back from an artifact's tokenizer.json, without transformers (seconds to import)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from ir.errors import Problem, UserError


class TextModel:
    """The tokenizer and the chat template of an artifact."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError if the artifact has no tokenizer."""
        from tokenizers import Tokenizer

        path = directory / "tokenizer.json"
        if not path.is_file():
            why = "the model's directory had none when it was built"
            fix = "give token ids (--prompt-ids), or build from a directory with tokenizer.json"
            raise UserError([Problem(f"{directory} has no tokenizer", why, fix)])
        self._tokenizer: Any = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        template, special = directory / "chat_template.jinja", directory / "special_tokens.json"
        self._template = template.read_text("utf-8") if template.is_file() else None
        self._special: dict[str, str] = json.loads(special.read_text("utf-8")) if special.is_file() else {}

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the model expects around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def chat(self, text: str) -> list[int]:
        """Token ids of a user's message in the model's chat template. Raises UserError if it has none."""
        if self._template is None:
            raise UserError([Problem("the model has no chat template", "its files define none", "leave out --chat")])
        rendered = (
            _environment()
            .from_string(self._template)
            .render(
                messages=[{"role": "user", "content": text}],
                add_generation_prompt=True,
                **{f"{name}_token": token for name, token in self._special.items()},
            )
        )
        return self.encode(rendered, special_tokens=False)


def _environment() -> Any:
    """The template environment that chat templates are written for."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment: Any = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment

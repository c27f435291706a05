"""Text to token ids and back, through the model's own tokenizer files. transformers is imported on first use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ir.errors import Problem, UserError


class Tokenizer:
    """A thin wrapper over `AutoTokenizer` of a local directory."""

    def __init__(self, directory: Path, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
            text = str(error).strip()
            why = text.splitlines()[0] if text else type(error).__name__
            fix = "put tokenizer.json and tokenizer_config.json beside config.json"
            raise UserError([Problem(f"{directory} has no usable tokenizer", why, fix)]) from error

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text, of the tokenizer; generation_config.json may name more."""
        eos = self._tokenizer.eos_token_id
        return () if eos is None else (int(eos),)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return [int(i) for i in self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation (`[{"role": "user", "content": ...}]`) in the model's chat template."""
        if not self.has_chat_template:
            fix = "give a plain prompt"
            raise UserError([Problem("the model has no chat template", "its tokenizer files define none", fix)])
        text = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return self.encode(text, add_special_tokens=False)

"""The tokens that a grammar allows next, according to llguidance; for ``Options.allowed``."""

import json
from functools import cache
from typing import Any

import llguidance
import llguidance.hf
import torch
from torch import Tensor
from transformers import AutoTokenizer


@cache
def _tokenizer(path: str, vocab: int) -> llguidance.LLTokenizer:
    return llguidance.hf.from_tokenizer(AutoTokenizer.from_pretrained(path), vocab)


class Grammar:
    """A grammar that reads each text anew from its start.

    Args:
        kind: ``json`` (a schema), ``regex``, ``choice`` or ``grammar``.
        text: The grammar, as in vLLM's ``StructuredOutputsParams``.
        tokenizer: Directory of the tokenizer.
        vocab: Rows of the language-model head.
        spaces: Whether JSON texts can contain optional white space.
    """

    def __init__(self, kind: str, text: Any, tokenizer: str, vocab: int, spaces: bool) -> None:
        self.vocab, self.tokenizer = vocab, _tokenizer(tokenizer, vocab)
        if kind == "json":
            self.source = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(text), defaults={"whitespace_flexible": spaces}
            )
        else:
            text = json.dumps(text) if kind == "choice" else text
            self.source = llguidance.grammar_from(kind, text)

    def _after(self, tokens: list[int]) -> tuple[llguidance.LLMatcher, int]:
        matcher = llguidance.LLMatcher(self.tokenizer, self.source, log_level=0)
        assert not matcher.get_error(), matcher.get_error()
        return matcher, matcher.try_consume_tokens(tokens)

    def allowed(self, tokens: list[int]) -> Tensor:
        """Which tokens can follow; after the end of the text, all of them. -> [vocab] bool."""
        matcher, consumed = self._after(tokens)
        if consumed < len(tokens) or self.tokenizer.eos_token in tokens:
            assert self.tokenizer.eos_token in tokens
            return torch.ones(self.vocab, dtype=torch.bool)
        mask = matcher.compute_bitmask() if not matcher.is_stopped() else b""
        bits = [i for i in range(self.vocab) if mask and mask[i // 8] >> i % 8 & 1]
        result = torch.zeros(self.vocab, dtype=torch.bool)
        result[bits or [self.tokenizer.eos_token]] = True
        return result

    def begins(self, tokens: list[int]) -> bool:
        """Whether some text of the grammar begins with these tokens."""
        return self._after(tokens)[1] == len(tokens)

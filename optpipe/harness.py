"""A backend as a model of lm-evaluation-harness; imports lm_eval, so import it only when needed.

Follows its own causal model: contexts are encoded as the tokenizer does by default, an empty one
becomes the begin-of-text token (or else end-of-text), and texts longer than the context are scored
in its windows, of which the last has all the context that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from optpipe.errors import InputError
from optpipe.evaluate import ANSWER_TOKENS, Scored, Scorer


class Harness(TemplateLM):  # type: ignore[misc]  # lm_eval is not typed
    """One artifact and its tokenizer."""

    def __init__(self, scorer: Scorer, tokenizer: Any) -> None:
        super().__init__()
        self.scorer, self.tokenizer = scorer, tokenizer

    @property
    def eot_token_id(self) -> int:
        found: int | None = self.tokenizer.eos_token_id
        if found is None:
            raise InputError("the tokenizer has no end-of-text token, which an empty context needs")
        return found

    @property
    def prefix_token_id(self) -> int:
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        begins = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)
        special = not begins if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer(string, add_special_tokens=special, verbose=False).input_ids
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Scored]:
        return [self.scorer.loglikelihood(*ids) for _, *ids in requests]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """ln P of whole texts, the first token given the prefix token."""
        return [self._rolling(request.args[0]) for request in requests]

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.scorer.backend.capacity,
            context_len=1,
        )
        pairs = map(make_disjoint_window, windows)
        return sum(self.scorer.loglikelihood(context, rest)[0] for context, rest in pairs)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, up to the first of the texts that end one."""
        return [self._answer(*request.args) for request in requests]

    def _answer(self, context: str, asked: dict[str, Any]) -> str:
        if asked.get("do_sample") or asked.get("temperature"):
            raise InputError("this task samples its answers: only greedy decoding is offered here")
        until = asked.get("until") or []
        ends = [end for end in ([until] if isinstance(until, str) else until) if end]
        most = asked.get("max_gen_toks", ANSWER_TOKENS)

        def text(tokens: list[int]) -> str:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

        def stop(tokens: list[int]) -> bool:
            return tokens[-1] == self.eot_token_id or any(end in text(tokens) for end in ends)

        ids = self.tok_encode(context) or [self.prefix_token_id]
        answer = text(self.scorer.generate(ids, most, stop))
        for end in ends:
            answer = answer.partition(end)[0]
        return answer

"""A model of any engine as lm-eval asks it (`lm_eval.api.model.TemplateLM`).

Tokens are what lm-eval's own `hf` model makes of a text with the same `tokenizer.json`, so that both give the same
scores: special tokens that are written out in a text count as such, <bos> comes first where the tokenizer puts it there
or the caller wants it, and an empty context is <bos> alone.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from common.errors import UserError
from models.engine import InferenceEngine
from models.generation import generate
from models.sampling import SamplingConfig
from models.scoring import Request, check_fits, fits, score, score_texts
from models.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256
"""Tokens of an answer where a task names no number; lm-eval's own."""
_STOP_TAIL = 32
"""Tokens at the end of an answer in which its stop sequences are looked for after each new one."""
_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""Options of generation that are followed, as lm-eval normalises them."""
_WITHOUT_EFFECT = {
    **{"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "length_penalty": 1, "typical_p": 1},
    **{"min_p": 0, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "use_cache": True},
}
"""What may be said of others, for it is as if nothing were."""

Watch = Callable[[int, int], None]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Answers lm-eval's requests with an engine."""

    def __init__(
        self,
        engine: InferenceEngine,
        tokenizer: Tokenizer,
        bos: bool,
        batch_tokens: int,
        watch: Watch = lambda done, total: None,
    ) -> None:
        """`bos`: whether <bos> stands before every text. `watch` is told after each batch how many requests of how many
        have been answered, and may raise what stops the evaluation."""
        super().__init__()
        self._engine, self._tokens, self._bos = engine, tokenizer, bos
        self._batch_tokens, self._watch = batch_tokens, watch
        self._backend = tokenizer.special_aware()
        self._bos_text = str(self._backend.id_to_token(tokenizer.bos_id))
        self.truncated = 0
        """Requests whose beginning was cut off, for the model has fewer positions."""

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokens.bos_id

    @property
    def max_length(self) -> int:
        """The model's positions."""
        return self._engine.config.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """As lm-eval says: <bos> goes before it unless it is there already, or `add_special_tokens` is False."""
        ids = self._encoded(string)
        if add_special_tokens is None:
            add_special_tokens = self._bos and not string.startswith(self._bos_text)
        return [self.prefix_token_id, *ids] if add_special_tokens else ids

    def _encoded(self, text: str) -> list[int]:
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"the tokenizer cannot represent {text[:60]!r}: {error}") from error

    def check(self, request: Instance) -> None:
        """Raises UserError for a request that no weights could answer: of text that the tokenizer cannot represent, or
        with a continuation or an answer that is longer than the model."""
        if request.request_type == "generate_until":
            self.tok_encode(request.args[0])
            self._room(normalize_gen_kwargs(request.args[1], MAX_NEW_TOKENS))
        elif request.request_type == "loglikelihood":
            context, continuation = request.args
            if context:
                check_fits(self._encode_pair(context, continuation)[1], self.max_length)
            else:
                check_fits(self.tok_encode(continuation, add_special_tokens=False), self.max_length)
        else:
            self.tok_encode(request.args[0])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        asked = [Request(context, continuation) for _, context, continuation in requests]
        self.truncated += sum(not fits(request, self.max_length) for request in asked)
        answers = score(self._engine, asked, self._batch_tokens, self._told(len(asked)))
        return [(answer.log_probability, answer.greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of whole texts, in windows of the model's positions that do not overlap, behind <bos>."""
        owners: list[int] = []
        windows: list[Request] = []
        for number, request in enumerate(requests):
            for context, continuation in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                owners.append(number)
                windows.append(Request(context, continuation))
        totals = [0.0] * len(requests)
        found = score_texts(self._engine, windows, self._batch_tokens, self._told(len(windows)))
        for owner, log_probability in zip(owners, found, strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes behind each context, up to a stop sequence; contexts lose what is too long at their
        beginning, as in lm-eval."""
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        done = 0
        for numbers in kinds.values():
            contexts = [requests[number].args[0] for number in numbers]
            written = self._written(contexts, requests[numbers[0]].args[1], self._told(len(requests), done))
            for number, text in zip(numbers, written, strict=True):
                texts[number] = text
            done += len(numbers)
        return texts

    def _written(self, contexts: Sequence[str], options: dict[str, Any], watch: Callable[[int], None]) -> list[str]:
        kinds = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
        _check_options(kinds)
        limit, room = int(kinds["max_gen_toks"]), self._room(kinds)
        stops = [stop for stop in kinds.get("until") or () if stop]
        sampling = SamplingConfig.model_validate(
            {
                "max_new_tokens": limit,
                "temperature": float(kinds["temperature"]) if kinds.get("do_sample") else 0.0,
                **{name: kinds[name] for name in ("top_k", "top_p", "repetition_penalty") if kinds.get(name)},
            }
        )
        prompts = []
        for context in contexts:
            ids = self.tok_encode(context) or [self.prefix_token_id]
            self.truncated += len(ids) > room
            prompts.append(ids[-room:])

        def ended(tokens: Sequence[int]) -> bool:
            tail = self._decoded(tokens[-_STOP_TAIL:])
            return any(stop in tail for stop in stops)

        rows = max(1, self._batch_tokens // (max(map(len, prompts)) + limit))
        answers = generate(
            self._engine, prompts, sampling, self._tokens.stop_ids, rows, ended if stops else None, watch
        )
        return [_before(self._decoded(answer), stops) for answer in answers]

    def _room(self, options: dict[str, Any]) -> int:
        """The positions that an answer leaves to its context. Raises UserError where there is none."""
        limit = int(options["max_gen_toks"])
        if limit >= self.max_length:
            raise UserError(
                f"the task has answers of up to {limit} tokens, and the model has {self.max_length} positions in all"
            )
        return self.max_length - limit

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def _told(self, total: int, before: int = 0) -> Callable[[int], None]:
        return lambda done: self._watch(before + done, total)


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises UserError for an option of generation that would change the answers, and that Cairn has not."""
    for name, value in options.items():
        if name not in _OPTIONS and value is not None and value != _WITHOUT_EFFECT.get(name):
            raise UserError(f"the task wants text generated with {name}: {value}, which Cairn does not do")


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text

"""An LLM behind an OpenAI-compatible server."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    DefaultHttpxClient,
    OpenAI,
    OpenAIError,
)

from fedsynth.instructions import one_line
from fedsynth.models.chat import Chat, Prompt, reply_of, unmarked
from fedsynth.models.encoding import LINE_END
from fedsynth.models.endpoint_cache import Answer, EndpointCache, cache_folder
from fedsynth.models.sampling import SamplingParams
from fedsynth.models.usage import Egress, TokenUsage
from fedsynth.scenario.server import Endpoint, host_of
from fedsynth.system.proxy import UNREADABLE, no_proxies
from fedsynth.typed import BadValue

A = TypeVar("A")
B = TypeVar("B")
Echo: TypeAlias = list[tuple[str, float | None]]

SAID = 200  # characters of a server's own message that ours repeats
LISTED = 8  # of a server's models in a message
SHORT = "A"  # a prompt that fits into every model
PROBE = Chat(
    'Which numbers are even: 1 or 2? Answer as JSON: {"numbers": [...]}',
    schema=json.dumps(
        {
            "type": "object",
            "properties": {"numbers": {"type": "array", "items": {"type": "integer", "enum": [1, 2]}, "maxItems": 2}},
            "required": ["numbers"],
            "additionalProperties": False,
        }
    ),
)
PROBED = 32  # tokens that its answer fits into
REFUSED = (400, 413, 422)  # server answers to a prompt that is too long for the model


class EndpointFailed(RuntimeError):
    """An endpoint gave no usable answer; the message names it, its model and the way out."""


class CannotScore(ValueError):
    """An endpoint cannot give the likelihood of a given text."""


class CapReached(EndpointFailed):
    """An endpoint's `max_tokens_total` is reached."""


class _Refused(CannotScore):
    """A server refused one text."""


class RemoteLLM:
    """A model behind an OpenAI-compatible server: vLLM, llama.cpp, `transformers serve`, a hosted one.

    The prompts leave this server. No private text leaks: only released or public text reaches a `TextModel`. They
    go to the one named address; redirects are not followed. Marks of
    turns that a text spells are cut (`fedsynth.models.chat`). The key is that of `key_env`. A key, organization or
    project that the environment holds for the `openai` package (OPENAI_API_KEY, ...) stays here.

    Args:
        endpoint: Where it answers, and how patiently it is asked.
        egress: Takes down what goes out; `max_tokens_total` holds for what it has counted.
        cache: Answers kept from earlier; None keeps none. Prompts that may hold text without a guarantee are not kept.

    Raises:
        BadValue: If an argument is out of range, or the environment lacks the key.
    """

    def __init__(self, endpoint: Endpoint, *, egress: Egress | None = None, cache: EndpointCache | None = None) -> None:
        self.endpoint, url, key_env = endpoint, endpoint.endpoint, endpoint.key_env
        self.egress, self.cache = egress, cache
        self.who = f"the model {endpoint.model!r} at {url}"
        key = "" if key_env is None else os.environ.get(key_env, "").strip()
        if key_env is not None and not key:
            raise BadValue(f"the environment variable {key_env} is not set: put the key for {self.who} there")
        try:  # an endpoint on this machine is reached past any proxy of the environment
            direct = no_proxies(host_of(url))
            client = DefaultHttpxClient(
                timeout=endpoint.timeout,
                follow_redirects=False,
                mounts=direct,
                event_hooks={"request": [self._goes_out]},
            )
        except Exception as problem:  # it raises a plain Exception for an address that it cannot read
            raise BadValue(f"{self.who} cannot be asked: {UNREADABLE} ({problem})") from problem
        self._client = OpenAI(
            base_url=url,
            api_key=key or "none",  # without a key the package would take OPENAI_API_KEY
            timeout=endpoint.timeout,
            max_retries=endpoint.retries,
            http_client=client,
        )
        self._client.organization = self._client.project = None
        self.used = TokenUsage()  # as far as the server reports it
        self._counting = Lock()

    @classmethod
    def connect(cls, to: Endpoint, egress: Egress | None = None) -> RemoteLLM:
        """Connects to a scenario's endpoint and has it write one token, before clients spend budget on a doomed run.

        From then on answers are kept in the user's cache, and taken from there, unless the endpoint says otherwise.
        Where answers shall be structured, it gives one.

        Raises:
            BadValue: If the environment lacks the key, or the cache cannot be used.
            EndpointFailed: If the endpoint does not answer, or does not hold to a schema.
        """
        cache = EndpointCache(cache_folder()) if to.cache else None
        found = cls(to, egress=egress)
        found.complete(["A"], SamplingParams.greedy(1), seed=0)
        if found.structured:
            found._together(found._check_structured, [PROBE])
        found.cache = cache
        return found

    @property
    def chats(self) -> bool:
        """True if the endpoint answers questions: with `api = "chat"`."""
        return self.endpoint.api == "chat"

    @property
    def structured(self) -> bool:
        """True if the endpoint says so."""
        return self.endpoint.structured != "none"

    def complete(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int) -> list[str]:
        """One answer per prompt, in order; empty where the server's content filter cut it, or the server refused the
        prompt, as one that is too long, and takes a short one.

        Args:
            prompts: With `api = "chat"` the server applies the model's template: to a question with its system text, if
                it has one, or to a text as the user's message.
            sampling: How tokens are drawn, and how many. For `one_line` the server is told to stop at a line end. It is
                asked again, without that, where this leaves no text, as of a model that begins with a blank line.
            seed: Every prompt goes out with a seed of its own, made of this one and its place in the call. It works as
                far as the server honours it: many repeat a text only while nothing else is asked of them.

        Raises:
            BadValue: If a question goes to a model that goes on after text (`api = "completions"`).
            EndpointFailed: If a prompt gets no answer.
        """
        if not self.chats and any(isinstance(prompt, Chat) for prompt in prompts):
            raise BadValue(
                f'{self.who} goes on after a text (api = "completions"), so that it cannot be asked a question: set '
                'api = "chat" where it is an instruct model'
            )
        settings: dict[str, Any] = {"model": self.endpoint.model, "max_tokens": sampling.max_new_tokens}
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.top_k:  # not in OpenAI's own interface: some servers refuse it
            settings["extra_body"] = {"top_k": sampling.top_k}

        @cache
        def takes_short() -> bool:
            try:
                answered(0, SHORT)
            except APIStatusError:
                return False
            return True

        def answer(numbered: tuple[int, Prompt]) -> str:
            try:
                return answered(*numbered)
            except APIStatusError as problem:
                if problem.status_code not in REFUSED or not takes_short():
                    raise
                return ""

        def answered(place: int, prompt: Prompt) -> str:
            # 31 bits: a signed number to some servers, and llama.cpp takes the largest of 32 bits for "none".
            own = {"seed": int(np.random.SeedSequence([seed, place]).generate_state(1)[0]) >> 1}
            found = ""
            if sampling.one_line:
                try:
                    found = self._written(prompt, {**settings, **own, "stop": [LINE_END]}, (seed, place), one_line=True)
                except APIStatusError as problem:
                    if problem.status_code not in REFUSED:  # some models take no `stop`
                        raise
            return found or self._written(prompt, {**settings, **own}, (seed, place), one_line=sampling.one_line)

        return self._together(answer, enumerate(prompts))

    def _written(self, prompt: Prompt, settings: dict[str, Any], sample: tuple[int, int], *, one_line: bool) -> str:
        if isinstance(prompt, str) and not self.chats:
            answer = self._answer("completions", {**settings, "prompt": unmarked(prompt)}, sample)
        else:
            answer = self._answer("chat", {**settings, **self._format(prompt), "messages": _messages(prompt)}, sample)
        cut = answer.text is None or answer.finish == "content_filter"
        return "" if cut else reply_of(prompt, str(answer.text), one_line=one_line)

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[float]:
        """Mean log-likelihood (nats) per token of each continuation after its prompt, if the server gives it.

        A continuation's tokens are those of prompt + continuation from the first that differs from the prompt's. A
        token that the tokenizer merges across the border is scored, while `LocalLLM` tokenizes the two apart. If the
        server refuses a pair, for example as too long, and accepts a short one, the pair has no likelihood (-inf).

        Raises:
            ValueError: If the lists differ in length, or a prompt or continuation holds no token of its own.
            CannotScore: If the server does not echo a text with its log-likelihoods.
            EndpointFailed: If a text gets no answer.
        """
        if len(prompts) != len(continuations):
            raise ValueError(f"score needs a continuation per prompt, got {len(continuations)} for {len(prompts)}")
        if prompts and (self.chats or any(isinstance(prompt, Chat) for prompt in prompts)):
            raise CannotScore(self._no_score('api = "chat"'))
        pairs = [(unmarked(str(x)), unmarked(more)) for x, more in zip(prompts, continuations, strict=True)]
        texts = list(dict.fromkeys(text for prompt, more in pairs for text in (prompt, prompt + more)))

        @cache
        def takes_short() -> bool:
            try:
                self._echo(SHORT)
            except _Refused:
                return False
            return True

        def echo(text: str) -> Echo | None:
            try:
                return self._echo(text)
            except _Refused:
                if not takes_short():
                    raise
                return None

        echoes = dict(zip(texts, self._together(echo, texts), strict=True))
        means = []
        for i, (prompt, more) in enumerate(pairs):
            start, whole = echoes[prompt], echoes[prompt + more]
            if start is None or whole is None:
                means.append(-math.inf)
                continue
            own = _beyond(start, whole)
            if not own:
                raise ValueError(f"continuation {i} holds no token: {more!r}; leave empty texts out")
            logs = [log for _, log in own if log is not None]
            if len(logs) < len(own):  # a server gives no likelihood for the first token
                raise ValueError(f"prompt {i} holds no token of its own: {prompt!r}; give a first word to go on")
            means.append(sum(logs) / len(logs))
        return means

    def _echo(self, text: str) -> Echo:
        """The server's tokens of a text with their log-likelihoods, none for the first."""
        if not text:
            return []
        try:
            # One new token, as not all servers accept 0.
            settings = {"model": self.endpoint.model, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
            answer = self._answer("completions", {**settings, "prompt": text})
        except APIStatusError as problem:
            if problem.status_code not in REFUSED:
                raise
            raise _Refused(self._no_score(self._words(problem))) from None
        if not answer.tokens or not answer.logs or answer.read is None or not str(answer.text).startswith(text):
            raise CannotScore(self._no_score("no echo with logprobs and usage"))
        # Its offsets are useless: vLLM includes the name of a BOS, which is no part of the text.
        return list(zip(answer.tokens, answer.logs, strict=False))[: answer.read]

    def _format(self, prompt: Prompt) -> dict[str, Any]:
        """What holds the server to the schema of an answer."""
        if not self.structured or not isinstance(prompt, Chat) or not prompt.schema:
            return {}
        schema = json.loads(prompt.schema)
        if self.endpoint.structured == "json_object":
            return {"response_format": {"type": "json_object", "schema": schema}}
        form = {"name": "answer", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": form}}

    def _check_structured(self, probe: Chat) -> None:
        """Refuses a server that takes no schema, or does not hold to it."""
        body = {"model": self.endpoint.model, "max_tokens": PROBED, "temperature": 0.0, "messages": probe.messages}
        try:
            text = self._answer("chat", {**body, **self._format(probe)}).text
            said = json.loads(reply_of(probe, str(text), one_line=False))
            problem = "" if isinstance(said, dict) and set(said) == {"numbers"} else f"it says {self._quoted(text)!r}"
        except json.JSONDecodeError:
            problem = f"it says {self._quoted(text)!r}"
        except APIStatusError as refusal:
            problem = self._words(refusal)
        if problem:
            other = "json_object" if self.endpoint.structured == "json_schema" else "json_schema"
            raise EndpointFailed(
                f'{self.who} gives no structured answers by "{self.endpoint.structured}" ({problem}): leave structured '
                f'out, or try structured = "{other}"'
            )

    def _no_score(self, reason: str) -> str:
        return (
            f'{self.who} does not tell how likely a text is ({reason}): use judge = "instruction", or a server and an '
            "api that do"
        )

    def _answer(
        self, api: Literal["completions", "chat"], body: dict[str, Any], sample: tuple[int, int] | None = None
    ) -> Answer:
        """The answer to one request: from the cache, or from the server, which is then kept.

        Args:
            api: The way to ask.
            body: All that the server is told.
            sample: Seed and place of the call; None where the answer depends on the text alone.
        """
        question = {"address": self.endpoint.endpoint, "api": api, "body": body, "sample": sample}
        cache = None if self.egress is not None and self.egress.unguarded() else self.cache
        answer = None if cache is None else cache.get(question)
        if answer is not None:
            if self.egress is not None:
                self.egress.recalled(self.endpoint, answer.read or 0, answer.written or 0)
        else:
            self._check_cap()
            ask: Any = self._client.chat.completions if api == "chat" else self._client.completions
            answer = self._read(ask.create(**body), api)
            if self.egress is not None:
                self.egress.answered(self.endpoint, answer.read or 0, answer.written or 0)
            if cache is not None:
                cache.put(question, answer)
        with self._counting:
            self.used.read += answer.read or 0
            self.used.written += answer.written or 0
        return answer

    def _read(self, sent: Any, api: str) -> Answer:
        """What is used of a server's answer."""
        choices, usage = getattr(sent, "choices", None), getattr(sent, "usage", None)
        if not choices:
            raise EndpointFailed(f"{self.who} sent an answer without a choice: check that the address ends in /v1")
        if usage is None and self.endpoint.max_tokens_total is not None:
            raise EndpointFailed(f"{self.who} reports no tokens, so that max_tokens_total cannot hold: leave it out")
        choice = choices[0]
        told = getattr(choice, "logprobs", None) if api == "completions" else None
        return Answer(
            text=choice.message.content if api == "chat" else choice.text,
            finish=choice.finish_reason or "",
            read=None if usage is None else usage.prompt_tokens or 0,
            written=None if usage is None else usage.completion_tokens or 0,
            tokens=tuple(getattr(told, "tokens", None) or ()),
            logs=tuple(None if log is None else float(log) for log in getattr(told, "token_logprobs", None) or ()),
        )

    def _check_cap(self) -> None:
        """Refuses a request that would begin above the cap. Requests under way at once may end above it."""
        cap = self.endpoint.max_tokens_total
        if cap is None:
            return
        spent = self.used.read + self.used.written if self.egress is None else self.egress.spent(self.endpoint)
        if spent >= cap:
            kept = "; the answers so far are kept, and cost a new run nothing" if self.cache is not None else ""
            raise CapReached(
                f"{self.who} has read and written {spent:,} tokens for this run, and max_tokens_total is {cap:,}: "
                f"raise it in a new run, or ask for fewer texts{kept}"
            )

    def _goes_out(self, request: Any) -> None:
        if self.egress is not None and request.method == "POST":  # a list of models is asked for without any text
            self.egress.sent(self.endpoint)

    def _together(self, work: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """`work` of each item, at most `concurrency` at once, in the order of the items; the first failure ends all."""
        try:
            with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
                return list(pool.map(work, items))
        except (OpenAIError, json.JSONDecodeError) as problem:
            # Not chained: a server's message may hold the key, and a traceback would put it into a log.
            raise EndpointFailed(self._why(problem)) from None

    def _why(self, problem: Exception) -> str:
        """One line with endpoint, model, problem and way out."""
        retried = f"after {self.endpoint.retries} retries"
        if isinstance(problem, APITimeoutError):
            limit = f"{self.endpoint.timeout:g} s"
            return f"{self.who} gave no answer within {limit}, {retried}: raise timeout, or lower concurrency"
        if isinstance(problem, APIConnectionError):
            reason = self._quoted(problem.__cause__ or problem)
            return f"{self.who} cannot be reached ({reason}): start its server, or check the address"
        if not isinstance(problem, APIStatusError):
            return f"{self.who} gave no usable answer ({self._quoted(problem)}): check that the address ends in /v1"
        code, words = problem.status_code, self._words(problem)
        if code in (401, 403):
            name = self.endpoint.key_env
            way = f"put a key that it takes into {name}" if name else "name the variable that holds the key as key_env"
            return f"{self.who} refuses access ({code}): {way}"
        if code == 404:
            return self._not_found()
        if code == 429:
            return f"{self.who} takes no more requests ({words}), {retried}: lower concurrency, or raise retries"
        if code >= 500:
            return f"{self.who} failed ({words}), {retried}: its server's log says more"
        return (
            f"{self.who} refuses the request ({words}): if a prompt is too long for it, use fewer or shorter "
            "demonstrations or fewer new tokens"
        )

    def _not_found(self) -> str:
        """The way out after 404, which a server sends for an unknown model and for an unknown address."""
        try:
            listed = self._client.with_options(max_retries=0).models.list()
            names = [model.id for model in getattr(listed, "data", None) or ()]
        except (OpenAIError, json.JSONDecodeError):
            return f"{self.who} is not found (404): check that the address ends in /v1, and the model's name"
        if self.endpoint.model in names:
            other = "chat" if self.endpoint.api == "completions" else "completions"
            return f'{self.who} does not answer {self.endpoint.api} (404): try api = "{other}"'
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        return f"{self.who} is not found (404): its server has {', '.join(map(repr, names[:LISTED])) or 'none'}{more}"

    def _words(self, problem: APIStatusError) -> str:
        """The status and the server's message."""
        body = problem.body
        said = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
        return f"{problem.status_code}: {self._quoted(said or 'no reason given')}"

    def _quoted(self, words: object) -> str:
        text = one_line(str(words))
        return (text if self.endpoint.key_env is None else text.replace(self._client.api_key, "***"))[:SAID]


def _messages(prompt: Prompt) -> Any:
    """The turns as the server's template shows them: it reads a mark that a text spells as the mark."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt.messages
    return [{**turn, "content": unmarked(turn["content"])} for turn in turns]


def _beyond(start: Echo, whole: Echo) -> Echo:
    """The tokens of `whole` from the first that differs from `start`."""
    shared = 0
    while shared < min(len(start), len(whole)) and start[shared][0] == whole[shared][0]:
        shared += 1
    return whole[shared:]

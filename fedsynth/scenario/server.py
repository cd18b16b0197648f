"""The server of an experiment: its models and endpoints, its timeouts and its quorum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from fedsynth.scenario.hardware import DeviceMap, Hardware, Precision, Quantization
from fedsynth.system.proxy import is_loopback
from fedsynth.typed import BadValue, Count, Positive, Share, in_range

Structured: TypeAlias = Literal["none", "json_schema", "json_object"]


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible server: vLLM, llama.cpp, `transformers serve`, a hosted one.

    Attributes:
        endpoint: Address up to and with the version, as `http://127.0.0.1:8000/v1`.
        model: The model's name at the server.
        key_env: Environment variable that holds the key, if one is needed; never the key itself.
        api: `completions` continues a prompt (a base LLM); `chat` sends each prompt as one user message.
        timeout: Seconds to wait for an answer.
        retries: Number of times that a request is repeated after no answer, 429 or 5xx.
        concurrency: Requests at once.
        max_tokens_total: No request begins once this endpoint's model has read and written so many tokens for a run, by
            the server's own count, over all arms, seeds and resumptions. Answers from the cache are free. A new run
            takes a higher one.
        cache: Answers are kept in a cache folder of the user (FEDSYNTH_CACHE), so that no prompt is paid for twice,
            also after a kill. Prompts that may hold text without a guarantee are never kept there.
        structured: How the server is held to the schema of an answer, where a method has one: by a `response_format` of
            type `json_schema` (OpenAI, vLLM, llama-server, Ollama), or of type `json_object` with the schema inside
            (llama-cpp-python). `none`: answers are free text, in a form that the question asks for.
    """

    endpoint: str
    model: str
    key_env: str | None = None
    api: Literal["completions", "chat"] = "completions"
    timeout: Positive = 60.0
    retries: int = 3
    concurrency: Count = 8
    max_tokens_total: Count | None = None
    cache: bool = True
    structured: Structured = "none"

    def __post_init__(self) -> None:
        host = host_of(self.endpoint)
        if not self.model:
            raise BadValue("model is empty: name the model that the endpoint serves")
        if self.key_env is not None and not self.key_env.isidentifier():
            # Not repeated: a user who mistakes the field puts the key itself here.
            raise BadValue(
                "key_env must name an environment variable, as OPENAI_API_KEY; a key is no part of a scenario"
            )
        if self.key_env is not None and self.endpoint.startswith("http:") and not is_loopback(host):
            raise BadValue(f"the key would go to {host} in clear: use https://, or leave key_env out")
        in_range(self)
        if self.structured != "none" and self.api != "chat":
            raise BadValue(f'structured = "{self.structured}" is for questions: say api = "chat", or leave it out')
        if self.retries < 0:
            raise BadValue(f"retries must be at least 0, got {self.retries}")

    @property
    def host(self) -> str:
        """The machine that prompts go to."""
        return host_of(self.endpoint)

    @property
    def here(self) -> bool:
        """True if it is on this machine."""
        return is_loopback(self.host)


def host_of(endpoint: str) -> str:
    """The host of an endpoint's address, which holds nothing but scheme, host, port and path."""
    try:
        parts = urlsplit(endpoint)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https") or parts.query or parts.fragment or "@" in parts.netloc:
        # Not repeated: a password or a key may stand in it.
        raise BadValue("endpoint must read http://HOST:PORT/v1 or https://HOST/v1; a key goes where key_env says")
    return host


@dataclass(frozen=True)
class PublicTest:
    """Public texts with labels.

    Attributes:
        source: `world:NAME`, or a file with the columns `text` and `label`. Texts of labels outside the scenario's list
            are a choice task that the LLM is not taught.
        column: Column that names a row's part; left out, all rows are read.
        equals: Its value in the rows to read.
    """

    source: str
    column: str = ""
    equals: str = ""

    def __post_init__(self) -> None:
        if bool(self.column) != bool(self.equals):
            raise BadValue("public_test.column and public_test.equals go together: which rows of which column")


@dataclass(frozen=True)
class Server:
    """The server's models and limits.

    Attributes:
        llm: Causal or seq2seq model, named as a client's, or an endpoint.
        adapter: LoRA that the llm starts with: `assets:NAME`, or a folder in PEFT format. Layers without LoRA weights
            stay as they are; other keys of its configuration are used as PEFT does, or refused by name.
        embedder: Model whose sentence embeddings group similar drafts, named as a client's; left out, the LLM itself.
            An endpoint cannot embed.
        timeout: Seconds that one exchange may take before the run ends with a reason.
        start_seconds: Simulations: seconds until SuperLink, Ray and the SuperNodes must be ready. A dead process is
            noticed at once: this limit is for a machine so busy that nothing proceeds.
        quorum: Share of the asked clients that must answer.
        professional: KnowledgeSG's model that judges and responds; left out, the LLM.
        local_only: Endpoints on other machines are refused.
        public: Public texts for a method or control that reads some: `world:NAME`, or a file of them (column `text`, or
            a .txt with one per line). CrossLM measures the LLM's perplexity on them.
        public_test: CrossLM: public texts with labels, on which the LLM is measured and never trained; left out, those
            of `public` that have a `label` of the list.
        precision: Precision of the server's models. `auto` is bfloat16 on a GPU that computes in it, and on CPUs where
            that pays; an embedder is float32 on a CPU. In bfloat16 a prompt's neighbours in a batch can change its
            text. The choice stands in the run's `versions.json`.
        device_map: `none`: each model on one device, a GPU if there is one. `auto`, `balanced` and `sequential` spread
            the LLM and the professional over several GPUs (accelerate).
        quantization: Weights of the LLM and the professional in 8 or 4 bits, on a GPU, with the extra
            `fedsynth[quantized]`; for models that stay as they are.
    """

    llm: str | Endpoint
    adapter: str | None = None
    embedder: str | None = None
    timeout: Positive = 3600.0
    start_seconds: Positive = 3600.0
    quorum: Share = 1.0
    professional: str | Endpoint | None = None
    local_only: bool = False
    public: str | None = None
    public_test: PublicTest | None = None
    precision: Precision = "auto"
    device_map: DeviceMap = "none"
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        in_range(self, "server")
        for key in ("llm", "professional", "embedder"):
            named = getattr(self, key)
            if isinstance(named, str) and named.startswith(("http://", "https://")):
                # Not repeated: a password or a key may stand in it.
                table = '{ endpoint = "http://HOST:PORT/v1", model = "NAME", api = "chat" }'
                way_out = (
                    f"write server.{key} = {table}" if key != "embedder" else "an endpoint embeds no text: name a model"
                )
                raise BadValue(f"server.{key} is an address, not a model's name: {way_out} (docs/endpoints.md)")
        placed = [key for key in ("device_map", "quantization") if getattr(self, key) != "none"]
        if placed and self.adapter is not None:
            raise BadValue(
                f"server.{placed[0]} is for models that stay as they are, and server.adapter is added to the weights "
                "of one: name a model that holds the adapter (merge_and_unload), or leave one of the keys out"
            )
        if isinstance(self.llm, Endpoint) and self.adapter is not None:
            raise BadValue("the llm is an endpoint, into which no adapter can be put: name a model as llm")
        if isinstance(self.llm, Endpoint) and self.embedder is None:
            raise BadValue(
                "the llm is an endpoint, which embeds no text: name an embedder, a model whose sentence embeddings put "
                "like drafts together"
            )
        if self.local_only and (far := self.elsewhere):
            raise BadValue(
                f"server.local_only = true, and {_named(far)} on another machine: name a model, or an endpoint on this "
                "one (127.0.0.1)"
            )

    @property
    def elsewhere(self) -> dict[str, Endpoint]:
        """The endpoints on other machines, by their keys."""
        named = {"server.llm": self.llm, "server.professional": self.professional}
        return {key: model for key, model in named.items() if isinstance(model, Endpoint) and not model.here}

    @property
    def hardware(self) -> Hardware:
        """How the models are loaded."""
        return Hardware(self.precision, self.device_map, self.quantization)


def check_unguarded(server: Server, *, guarantee: str, public: bool) -> None:
    """Checks that text without a guarantee goes to no other machine, whatever the method.

    Args:
        server: The server's models.
        guarantee: The clients'.
        public: True if their text is public.

    Raises:
        BadValue: With the ways out.
    """
    if guarantee == "none" and not public and (far := server.elsewhere):
        raise BadValue(
            f'client.guarantee = "none", and {_named(far)} on another machine: text without a guarantee goes to no '
            "other machine; name a model, or an endpoint on this one, or say data.public = true if anyone may read the "
            "clients' text"
        )


def _named(endpoints: Mapping[str, Endpoint]) -> str:
    return " and ".join(f"{key} is {found.endpoint}," for key, found in endpoints.items()).removesuffix(",")

"""How the server's models are loaded, and what is refused; GPUs are made up: no test here has one."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

import fedsynth.models.placing as module
from fedsynth.clients.evaluate import _writer
from fedsynth.federation.run.environment import surroundings
from fedsynth.models.adapters import attach_lora, merged, new_adapter, read_adapter, with_adapter
from fedsynth.models.embedding import Embedder
from fedsynth.models.hub import weights_hash
from fedsynth.models.llm import LocalLLM
from fedsynth.models.loading import forget_weights, load_frozen, load_generator, load_tokenizer
from fedsynth.models.placing import check_hardware, embedder_dtype, load_placed, placement, server_dtype
from fedsynth.scenario.client import Client, GeneratorTraining
from fedsynth.scenario.hardware import Hardware
from fedsynth.scenario.server import Server
from fedsynth.scenario.toml import from_toml
from fedsynth.simulation.simulate import check_server
from fedsynth.strategies.options import CrossLMOptions
from fedsynth.training.engine import Engine
from fedsynth.typed import BadValue

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this process believe that it sees so many GPUs."""

    def see(count: int, bf16: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)

    see(0)
    return see


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this process believe that these packages are installed, and no others that placing asks for."""

    def installed(*names: str) -> None:
        real = importlib.util.find_spec
        asked = {"accelerate", "bitsandbytes"}
        monkeypatch.setattr(module, "find_spec", lambda name: (name in names or None) if name in asked else real(name))

    return installed


class Loaded:
    """What a loader was asked for, and where the model was put."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.asked: list[Any] = []
        self.moved: list[Any] = []
        monkeypatch.setattr(module, "load_model", self)

    def __call__(self, name: str, role: str, **more: Any) -> Loaded:
        self.asked.append((name, role, more))
        return self

    def to(self, where: Any) -> Loaded:
        self.moved.append(str(where))
        return self


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    return Loaded(monkeypatch)


def test_the_llm_goes_to_the_gpu_in_bfloat16_where_there_is_one(cards: Any, loaded: Loaded) -> None:
    cards(1)
    assert server_dtype("any") is BF16
    assert server_dtype("any", Hardware("float32")) is FP32
    load_placed("any", "llm", server_dtype("any"))
    assert loaded.asked == [("any", "llm", {"dtype": BF16})]
    assert loaded.moved == ["cuda"]
    assert embedder_dtype() is BF16
    assert Engine().precision == "bfloat16"
    assert Engine(Hardware("float32")).precision == "float32"
    cards(1, bf16=False)  # an older card
    assert server_dtype("any") is embedder_dtype() is FP32
    assert Engine().precision == "float32"


def test_without_a_gpu_all_stays_on_the_cpu(cards: Any, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(0)
    load_placed("any", "llm", FP32)
    assert loaded.moved == ["cpu"]
    assert embedder_dtype() is FP32
    assert embedder_dtype(Hardware("bfloat16")) is BF16
    assert Engine().precision == "float32"  # CrossLM's adapter learns on float32, whatever its LLM is read in
    monkeypatch.setattr("fedsynth.models.loading.computes_in_bfloat16", lambda: True)
    assert server_dtype(tiny.folder()) is FP32  # too narrow to pay
    assert server_dtype(tiny.folder(), Hardware("bfloat16")) is BF16


@pytest.mark.parametrize("shared", ["auto", "balanced", "sequential"])
def test_several_gpus_share_a_model_that_is_then_left_where_it_is(
    cards: Any, packages: Any, loaded: Loaded, shared: Any
) -> None:
    cards(2)
    packages("accelerate")
    load_placed("any", "llm", BF16, Hardware(device_map=shared))
    assert loaded.asked == [("any", "llm", {"dtype": BF16, "device_map": shared})]
    assert loaded.moved == []


def test_fewer_bits_are_asked_of_bitsandbytes(cards: Any, packages: Any, loaded: Loaded) -> None:
    cards(1)
    packages("accelerate", "bitsandbytes")
    load_placed("any", "llm", BF16, Hardware(quantization="8bit"))
    load_placed("any", "llm", BF16, Hardware(quantization="4bit", device_map="auto"))
    (_, _, eight), (_, _, four) = loaded.asked
    assert (eight["quantization_config"].load_in_8bit, eight["device_map"]) == (True, {"": 0})
    config = four["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == (True, "nf4", BF16)
    assert four["device_map"] == "auto"
    assert loaded.moved == []
    assert placement(BF16, Hardware()) == {}


@pytest.mark.parametrize(
    ("hardware", "gpus", "installed", "said"),
    [
        (Hardware(device_map="auto"), 0, ("accelerate",), 'device_map = "auto" needs a CUDA GPU'),
        (Hardware(device_map="auto"), 2, (), "pip install accelerate"),
        (Hardware(device_map="auto"), 2, ("accelerate",), ""),
        (Hardware(quantization="8bit"), 0, ("accelerate", "bitsandbytes"), 'quantization = "8bit" needs a CUDA GPU'),
        (Hardware(quantization="4bit"), 1, ("accelerate",), r'pip install "fedsynth\[quantized\]"'),
        (Hardware(quantization="4bit"), 1, ("bitsandbytes",), "pip install accelerate"),
        (Hardware(quantization="4bit"), 1, ("accelerate", "bitsandbytes"), ""),
        (Hardware(), 0, (), ""),
    ],
)
def test_what_is_missing_is_refused_by_name(
    cards: Any, packages: Any, hardware: Hardware, gpus: int, installed: tuple[str, ...], said: str
) -> None:
    cards(gpus)
    packages(*installed)
    if not said:
        check_hardware(hardware)
        return
    with pytest.raises(BadValue, match=said):
        check_hardware(hardware)
    with pytest.raises(BadValue, match=said):
        load_placed(tiny.folder(), "llm", FP32, hardware)


def scenario(more: str, strategy: str = "cross_lm:CrossLM") -> Any:
    return from_toml(
        f'name = "own"\n[strategy]\nuse = "fedsynth.strategies.{strategy}"\n[data]\nsource = "world:hospitals"\n'
        f'clients = 1\ntrain_per_client = 8\ntest_per_client = 8\n[client]\ngenerator = "{tiny.folder()}"\n'
        f'task_model = "{tiny.folder()}"\nguarantee = "none"\n[server]\nllm = "{tiny.folder()}"\n{more}\n[arms.main]\n'
    )


def test_no_adapter_is_added_to_fewer_bits(cards: Any) -> None:
    with pytest.raises(BadValue, match=r"server.quantization is for models that stay as they are"):
        Server("any", adapter="own", quantization="4bit")
    with pytest.raises(BadValue, match=r"server.device_map is for models that stay"):
        Server("any", adapter="own", device_map="auto")
    asked = scenario('quantization = "8bit"')
    with pytest.raises(BadValue, match=r"CrossLM tunes the server LLM on one device, and server.quantization"):
        CrossLMOptions().check(asked)
    CrossLMOptions(feedback="none").check(asked)
    adapter = new_adapter(tiny.folder(), rank=2, alpha=4.0, seed=0)
    with pytest.raises(BadValue, match="an adapter is added to the weights"):
        LocalLLM.load(tiny.folder(), adapter=adapter, hardware=Hardware(quantization="8bit"))


def test_a_run_is_refused_before_any_work(cards: Any) -> None:
    from fedsynth.scenario.toml import cells

    [cell] = cells(scenario('quantization = "8bit"', "fdkt:FDKT"))
    with pytest.raises(BadValue, match=r'server.quantization = "8bit" needs a CUDA GPU'):
        check_server(cell)


def test_precision_and_device_of_each_model_are_in_the_environment(cards: Any, tmp_path: Path) -> None:
    asked = scenario(f'embedder = "{tiny.folder()}"', "fdkt:FDKT")
    name = tiny.folder()
    assert surroundings(asked)["computes"] == {
        f"llm {name}": "float32 on cpu",
        f"embedder {name}": "float32 on cpu",
        f"generator {name}": "float32",
    }
    half = replace(asked, server=replace(asked.server, precision="bfloat16"), arms={})
    assert surroundings(half)["computes"][f"llm {name}"] == "bfloat16 on cpu"
    arms = replace(asked, arms={"a": {}, "b": {"server": {"precision": "bfloat16"}}})
    assert surroundings(arms)["computes"][f"llm {name}"] == "float32 on cpu; bfloat16 on cpu"
    json.dumps(surroundings(arms))


def test_the_llm_and_the_embedder_compute_as_asked() -> None:
    half = LocalLLM.load(tiny.folder(), workers=1, hardware=Hardware("bfloat16"))
    assert half.model.dtype is BF16
    assert next(Embedder.for_server(tiny.folder()).body.parameters()).dtype is FP32
    adapter = new_adapter(tiny.folder(), rank=2, alpha=4.0, seed=0)
    assert LocalLLM.load(tiny.folder(), adapter=adapter, hardware=Hardware("bfloat16")).model.dtype is BF16


def test_adapted_models_share_one_copy_of_their_base() -> None:
    first, second = (
        with_adapter(tiny.folder(), new_adapter(tiny.folder(), rank=rank, alpha=4.0, seed=0))
        for rank in (11, 13)  # of no other test: earlier models may hold an earlier copy
    )
    frozen = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in (first, second)]
    assert frozen[0] == frozen[1]
    own = [{p.data_ptr() for p in model.parameters() if p.requires_grad} for model in (first, second)]
    assert not own[0] & own[1]
    free = load_generator(tiny.folder())  # a copy of its own, all of which can be trained
    assert not {p.data_ptr() for p in free.parameters()} & frozen[0]
    assert all(p.requires_grad for p in free.parameters())


def test_a_client_without_an_adapter_answers_with_the_shared_copy(tmp_path: Path) -> None:
    training = GeneratorTraining(precision="float32")
    config = Client(tiny.folder(), guarantee="none", generator_training=training)
    client: Any = SimpleNamespace(config=config, work=tmp_path)
    own = {p.data_ptr() for p in _writer(client, None).llm.model.parameters()}
    assert own == {p.data_ptr() for p in load_frozen(tiny.folder()).parameters()}


def test_merging_changes_no_other_model() -> None:
    name = tiny.folder()
    before = [p.clone() for p in load_frozen(name).parameters()]
    adapted: Any = attach_lora(load_frozen(name), rank=2, alpha=4.0, seed=0)
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_B" in key:
                weight.fill_(0.1)
    ids = torch.tensor([load_tokenizer(name)("abc")["input_ids"]])
    expected = adapted(input_ids=ids).logits
    own = merged(name, read_adapter(adapted, weights_hash(name)))
    assert torch.allclose(own(input_ids=ids).logits, expected, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, load_frozen(name).parameters(), strict=True))
    assert not torch.allclose(load_frozen(name)(input_ids=ids).logits, expected, atol=1e-2)


def test_weights_that_a_process_forgets_are_gone_and_can_be_loaded_again(tmp_path: Path) -> None:
    own = str(shutil.copytree(tiny.folder(), tmp_path / "own"))  # other tests may hold the shared one's
    first = load_frozen(own)
    kept = weakref.ref(next(first.parameters()))
    del first
    gc.collect()
    assert kept() is not None  # read from disk once per process
    forget_weights()
    assert kept() is None
    assert load_frozen(own) is not None

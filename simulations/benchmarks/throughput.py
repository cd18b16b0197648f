"""Clients per second of CPU: this project's simulation, Flower driven the usual way, pfl-research, and a plain loop.

    python simulations/benchmarks/throughput.py [--json FILE] [--repeats 1] [--sizes toy,15m] [--many 1000]

All train a LoRA of rank 8 on all linear layers of the same random Llama for 5 steps of 4 texts (toy) or 8 (15m), on the
same records of simulated hospitals, in float32 with Adam and without a guarantee; a round ends with the mean of all
adapters. Counted is the CPU time of all processes below the measuring one, in rounds after the first, with one worker:

- `plain`: one process; the model is kept, an adapter is put in place, trained with PEFT and read. Also with the memory
  settings that `fedsynth run` gives its workers (`flower.KEEPING`).
- `ours`: what a client of `fedsynth run` does, ledger and all; also with a guarantee, and with a wide base in bfloat16.
- `usual`: a Flower ClientApp that builds its model for each message and learns by the model's own loss, as most
  examples do; its texts lie in a file, as tokens.
- `pfl`: pfl-research's simulator, of the package `pfl`, in an environment of its own beside this one (made if need be;
  without a package index it is left out).

Each way runs in a process of its own, one after the other, in turns (toy three, 15m one, times `--repeats`). Told are
medians over all rounds, and the median over turns of one way's by another's: the speed of a shared machine changes
while this runs. Last, `fedsynth run` has 1,000 clients of the toy model for two rounds under a guarantee: time, and the
memory of the driving processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from measuring import Bar, at_least, at_most, figure, options, seconds, told
from sizes import Memory
from transformers import LlamaConfig, LlamaForCausalLM

from fedsynth.clients.client_side import ClientSide, cell_of, simulated_client
from fedsynth.data.partition import open_site
from fedsynth.lora import Adapter, average
from fedsynth.models.adapters import new_adapter, read_adapter, with_adapter
from fedsynth.models.batches import padded
from fedsynth.models.hub import weights_hash
from fedsynth.models.loading import load_tokenizer
from fedsynth.scenario.client import GeneratorTraining
from fedsynth.scenario.schema import Cell
from fedsynth.scenario.toml import from_toml, to_toml
from fedsynth.simulation.flower import KEEPING
from fedsynth.simulation.simulate import run, supernodes
from fedsynth.training.dp_training import IGNORED, next_token_losses, trainable
from fedsynth.training.examples import Example, encode_slots

STEPS, RATE, TOKENIZER = 5, 1e-3, "assets:tiny-base"
# Width, inner, layers, heads, clients, texts in a batch, tokens of a text, rounds after the first.
SIZES = {"toy": (64, 128, 2, 4, 96, 4, 16, 3), "15m": (384, 1024, 6, 6, 8, 8, 64, 3)}
TURNS = {"toy": 3, "15m": 1}
PFL = Path(sysconfig.get_paths()["purelib"]).parents[2] / "pfl"  # inside this environment, which git ignores

SCENARIO = """
name = "clients"
rounds = {rounds}
[strategy]
use = "fedsynth.strategies.lora_avg:LoraAverage"
[data]
source = "world:hospitals"
task = "instructions"
clients = {clients}
train_per_client = {texts}
test_per_client = 1
[client]
generator = "{model}"
guarantee = "{guarantee}"
budget = {{ epsilon = 8.0 }}
max_noise_multiplier = 100.0
[client.generator_training]
expected_batch_size = {batch}
steps = {steps}
learning_rate = {rate}
rank = 8
alpha = 16.0
max_length = {tokens}
precision = "{precision}"
[server]
llm = "assets:tiny-llm"
[arms.main]
"""


def built(size: str, folder: Path) -> Path:
    """The model of a size, with a tokenizer, saved."""
    width, inner, layers, heads, *_ = SIZES[size]
    tokenizer = load_tokenizer(TOKENIZER)
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vocabulary = 8192 if size == "15m" else len(tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=128,
            **special,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cell(size: str, model: Path, guarantee: str = "none", precision: str = "float32") -> Cell:
    """The cell that all ways run."""
    *_, clients, batch, tokens, _ = SIZES[size]
    # With 20 texts each text is drawn independently; with 8 all are in every step, so that ways differ in nothing else.
    texts = 20 if size == "toy" else batch
    toml = SCENARIO.format(
        clients=clients,
        texts=texts,
        model=model,
        batch=batch,
        guarantee=guarantee,
        steps=STEPS,
        rounds=1 + SIZES[size][-1],
        rate=RATE,
        tokens=tokens,
        precision=precision,
    )
    return cell_of(to_toml(from_toml(toml)), "main", 0)


def texts_of(of: Cell, client: int) -> list[Example]:
    """A client's texts as all ways train on them."""
    client = of.scenario.client
    site = open_site(of.scenario.data, client, of.seed)
    settings = client.generator_training
    slots = encode_slots(
        load_tokenizer(client.generator),
        site.train,
        (),
        len(site.train),
        GeneratorTraining(max_length=settings.max_length),
    )
    return [example for slot in slots for example in slot]


def batches(texts: list[Example], size: int) -> list[list[Example]]:
    """The first so many steps' texts; a short list goes round."""
    return [[texts[(step * size + i) % len(texts)] for i in range(size)] for step in range(STEPS)]


def cpu() -> float:
    """CPU seconds of this process and all below it."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            taken = process.cpu_times()
            total += taken.user + taken.system
    return total


# --- The ways: each gives CPU seconds per client, of every round after the first --------------------------------------


def plain(size: str, model: Path) -> list[float]:
    """A loop in one process."""
    of = cell(size, model)
    settings, ids = of.scenario.client.generator_training, range(of.scenario.data.clients)
    texts = [texts_of(of, client) for client in ids]
    start = new_adapter(str(model), rank=settings.rank, alpha=settings.alpha, seed=0)
    taken = []
    for _ in range(1 + SIZES[size][-1]):
        before = time.process_time()
        size_of = settings.expected_batch_size
        ends = [trained_by_hand(str(model), start, batches(texts[client], size_of)) for client in ids]
        start = average(ends, [1.0] * len(ends))
        taken.append((time.process_time() - before) / len(ids))
    return taken[1:]


def trained_by_hand(model: str, start: Adapter, steps: list[list[Example]]) -> Adapter:
    """PEFT's own layers, autograd's own gradients."""
    adapted = with_adapter(model, start).train()
    optimizer = torch.optim.Adam(trainable(adapted), lr=RATE, betas=(0.9, 0.99))
    pad = load_tokenizer(model).pad_token_id
    for batch in steps:
        optimizer.zero_grad(set_to_none=True)
        next_token_losses(adapted, batch, pad).mean().backward()
        optimizer.step()
    return read_adapter(adapted, weights_hash(model))


def simulated(server: Callable[[Any], None], client_app: Any, nodes: int) -> None:
    """A Flower simulation in this process, with one worker."""
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:  # noqa: ARG001 - Flower's signature
        server(grid)

    backend: Any = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1, "include_dashboard": False}}
    warnings.simplefilter("ignore")
    run_simulation(app, client_app, nodes, backend_config=backend)


def ours(size: str, model: Path, guarantee: str = "none", precision: str = "float32") -> list[float]:
    """Our clients under our server's own calls."""
    from fedsynth.clients.app import client_app
    from fedsynth.federation.messages import Finetune
    from fedsynth.federation.messaging import Clients
    from fedsynth.federation.nodes import nodes_by_client
    from fedsynth.federation.run.log import RunLog

    of = cell(size, model, guarantee, precision)
    scenario = of.scenario
    scenario_rounds = 1 + SIZES[size][-1]
    taken: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def opened(_: Any, envelope: Any) -> ClientSide:
            return simulated_client(of, envelope.client, place, envelope.run)

        def server(grid: Any) -> None:
            ids = scenario.data.clients
            run_log = RunLog(of, place, place / "events.jsonl")
            clients = Clients(grid, nodes_by_client(grid, ids, stack=scenario.stack), of, "simulated", (), run_log)
            start = new_adapter(str(model), rank=8, alpha=16.0, seed=0)
            for number in range(scenario_rounds):
                run_log.round, before = number + 1, cpu()
                answers = clients.ask_each({client: Finetune(start, number * ids + client) for client in range(ids)})
                start = average([a.adapter for a in answers.values()], [1.0] * ids)
                taken.append((cpu() - before) / ids)

        simulated(server, client_app(opened), supernodes(scenario.data.clients, 1))
    return taken[1:]


def usual(size: str, model: Path) -> list[float]:
    """A ClientApp that builds its model for each message, and reads its encoded texts from a file."""
    from flwr.app import Array, ArrayRecord, Message, RecordDict
    from flwr.clientapp import ClientApp
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    of = cell(size, model)
    ids, batch = of.scenario.data.clients, of.scenario.client.generator_training.expected_batch_size
    pad, folder = load_tokenizer(str(model)).pad_token_id, str(model)
    for client in range(ids):
        rows = [[list(text.tokens), text.start] for text in texts_of(of, client)]
        (model / f"texts-{client}.json").write_text(json.dumps(rows))
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        torch.set_num_threads(1)
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).train()
        sent = message.content["arrays"]
        set_peft_model_state_dict(adapted, {name: torch.from_numpy(a.numpy()) for name, a in sent.items()})
        optimizer = torch.optim.Adam(trainable(adapted), lr=RATE, betas=(0.9, 0.99))
        stored = Path(folder) / f"texts-{context.node_config['partition-id']}.json"
        texts = [Example(tuple(tokens), start) for tokens, start in json.loads(stored.read_text())]
        for step in batches(texts, batch):
            tokens, present = padded([text.tokens for text in step], pad)
            learnt, _ = padded([(IGNORED,) * text.start + text.tokens[text.start :] for text in step], IGNORED)
            optimizer.zero_grad(set_to_none=True)
            adapted(input_ids=tokens, attention_mask=present, labels=learnt).loss.backward()
            optimizer.step()
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        arrays = ArrayRecord({name: Array(tensor.detach().numpy()) for name, tensor in state.items()})
        return Message(RecordDict({"arrays": arrays}), reply_to=message)

    taken: list[float] = []

    def server(grid: Any) -> None:
        nodes: list[int] = []
        while len(nodes) < ids:
            nodes = list(grid.get_node_ids())
        start = new_adapter(folder, rank=8, alpha=16.0, seed=0)
        arrays = ArrayRecord({name: Array(array) for name, array in start.arrays.items()})
        for _ in range(3):  # these take long
            before = cpu()
            asked = [Message(RecordDict({"arrays": arrays}), message_type="train", dst_node_id=n) for n in nodes]
            replies: list[Any] = [reply.content["arrays"] for reply in grid.send_and_receive(asked)]
            mean = {name: np.mean([reply[name].numpy() for reply in replies], axis=0) for name in start.arrays}
            arrays = ArrayRecord({name: Array(array) for name, array in mean.items()})
            taken.append((cpu() - before) / ids)

    simulated(server, app, ids)
    return taken[1:]


def pfl(size: str, model: Path) -> list[float]:
    """pfl-research in its environment; nothing where that cannot be made."""
    if not (PFL / "bin" / "python").exists():
        made = [
            [sys.executable, "-m", "venv", str(PFL)],
            [str(PFL / "bin/python"), "-m", "pip", "install", "-q", "pfl"],
        ]
        subprocess.run(made[0], check=True)
        # torch and transformers are those of this environment; what pfl wants in other versions comes before them.
        packages = next(PFL.glob("lib/python*/site-packages"))
        (packages / "zz_beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        if subprocess.run(made[1], check=False, capture_output=True).returncode:
            return []
    of = cell(size, model)
    texts = [texts_of(of, client) for client in range(of.scenario.data.clients)]
    whole = [text for own in texts for text in own]
    pad = load_tokenizer(str(model)).pad_token_id
    tokens, present = padded([t.tokens for t in whole], pad)
    with tempfile.TemporaryDirectory() as folder:
        start = new_adapter(str(model), rank=8, alpha=16.0, seed=0)
        np.savez(Path(folder) / "start.npz", **dict(start.arrays))
        np.savez(
            Path(folder) / "texts.npz",
            tokens=tokens.numpy(),
            present=present.numpy(),
            starts=np.array([t.start for t in whole]),
        )
        batch = of.scenario.client.generator_training.expected_batch_size
        asked = {
            "model": str(model),
            "folder": folder,
            "clients": len(texts),
            "steps": STEPS,
            "rate": RATE,
            "batch": batch,
            "rounds": 1 + SIZES[size][-1],
        }
        script = Path(__file__).with_name("throughput_pfl.py")
        ran = subprocess.run(
            [str(PFL / "bin/python"), str(script), json.dumps(asked)],
            check=False,
            text=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if ran.returncode:
            raise RuntimeError(ran.stderr[-2000:])
    found: list[float] = json.loads(ran.stdout.splitlines()[-1])
    return found[1:]


WAYS: dict[str, Callable[[str, Path], list[float]]] = {
    "plain": plain,
    "ours": ours,
    "usual": usual,
    "pfl": pfl,
    "plain, memory kept": plain,
    "ours, private": lambda size, model: ours(size, model, "dp"),
    "ours, bfloat16": lambda size, model: ours(size, model, precision="auto"),
}
OF_SIZE = {
    "toy": ("plain", "ours", "usual", "pfl", "ours, private"),
    "15m": ("plain", "plain, memory kept", "ours", "ours, bfloat16"),
}


def swap(repeats: int, folder: Path) -> list[Bar]:
    """Putting another client's adapter of some 350,000 numbers into the resident model."""
    model = str(built("15m", folder))
    adapters = [new_adapter(model, rank=8, alpha=16.0, seed=seed) for seed in range(2)]
    took = seconds({"swap": lambda: [with_adapter(model, adapter) for adapter in adapters]}, 5 * repeats, warm=3)
    size = sum(array.size for array in adapters[0].arrays.values())
    return [at_most("milliseconds to swap an adapter", f"{size:,} numbers", 1000 * took["swap"] / 2, 2.0)]


def compared(size: str, repeats: int, model: Path) -> list[Bar]:
    """The bars of one size."""
    taken: dict[str, list[list[float]]] = {way: [] for way in OF_SIZE[size]}
    for turn in range(repeats * TURNS[size]):
        for way in taken:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "taken.json"
                command = [sys.executable, __file__, "--way", way, "--size", size, "--model", str(model)]
                quiet = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
                as_launched = KEEPING if way.startswith("ours") or way.endswith("kept") else {}
                done = subprocess.run(
                    [*command, "--out", str(out)],
                    check=False,
                    capture_output=True,
                    text=True,
                    env={**os.environ, **quiet, **as_launched},
                )
                if done.returncode:
                    raise RuntimeError(f"{size}, {way}: {done.stderr[-2000:]}")
                taken[way].append(json.loads(out.read_text()))
            found = np.round(1000 * np.array(taken[way][-1]), 1)
            print(f"{size}, {way}, turn {turn + 1}: {found}", file=sys.stderr, flush=True)
    case = f"{size}, {SIZES[size][4]} clients"
    taken = {way: turns for way, turns in taken.items() if all(turns)}
    all_rounds = {way: statistics.median(each for turn in turns for each in turn) for way, turns in taken.items()}
    bars = [figure(f"{way}: milliseconds of CPU per client", case, 1000 * each) for way, each in all_rounds.items()]
    limits = {
        "plain": ("a plain loop", 0.7 if size == "toy" else 0.95),
        "usual": ("Flower the usual way", 5.0),
        "pfl": ("pfl", 1.0),
    }
    for way in limits.keys() & taken.keys():
        ratios = [
            statistics.median(theirs) / statistics.median(ours)
            for theirs, ours in zip(taken[way], taken["ours"], strict=True)
        ]
        bars.append(at_least(f"ours beside {limits[way][0]}", case, statistics.median(ratios), limits[way][1]))
    return bars


def many(clients: int) -> list[Bar]:
    """Two rounds of DP-FedAvg among so many: the command's own run, with its evaluation of each client after each."""
    memory: dict[int, dict[str, float]] = {}
    watcher = Memory()

    def watch(event: dict[str, object]) -> None:
        if event.get("phase") == "evaluate" and event["done"] == event["total"]:
            memory[int(str(event["round"]))] = dict(watcher.now)

    with tempfile.TemporaryDirectory() as folder:
        model = built("toy", Path(folder) / "model")
        toml = SCENARIO.format(
            clients=clients,
            texts=20,
            model=model,
            batch=4,
            guarantee="dp",
            steps=5,
            rate=1e-3,
            tokens=16,
            precision="float32",
            rounds=2,
        )
        scenario = from_toml(toml)
        scenario = replace(scenario, client=replace(scenario.client, answer_tokens=4))
        watcher.start()
        started = time.perf_counter()
        result = run(scenario, out=Path(folder) / "run", on_event=watch)
        whole = time.perf_counter() - started
        cell = float(result.metrics.query("metric == 'seconds/cell'")["value"].iloc[0])
        answered = result.metrics.query("round == 2 and client >= 0")["client"].nunique()
    watcher.over.set()
    case = f"toy, {clients} clients, two rounds"
    driver = [sum(memory[number].get(kind, 0.0) for kind in ("server app", "SuperLink", "driver")) for number in (1, 2)]
    return [
        figure("seconds in all", case, whole),
        figure("milliseconds per client and round, evaluation included", case, 1000 * cell / clients / 2),
        at_least("clients that answered in round 2", case, answered, clients),
        figure("driver's memory after round 1, MB", case, driver[0]),
        at_most("driver's memory after round 2, of that after round 1", case, driver[1] / driver[0], 1.1),
    ]


def main(arguments: list[str]) -> int:
    """Prints the table; 1 where a bar is not kept."""
    parser = options(__doc__)
    parser.set_defaults(repeats=1)
    parser.add_argument("--many", type=int, default=1000, help="clients of the whole run (default 1000; 0: none)")
    parser.add_argument("--sizes", default="toy,15m", help="which models (default: both)")
    for name in ("--way", "--size", "--model", "--out"):
        parser.add_argument(name, help=f"of one process: {name[2:]}")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if chosen.way:
        Path(chosen.out).write_text(json.dumps(WAYS[chosen.way](chosen.size, Path(chosen.model))))
        return 0
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        bars += swap(chosen.repeats, Path(folder) / "swap")
        for size in filter(None, chosen.sizes.split(",")):
            bars += compared(size, chosen.repeats, built(size, Path(folder) / size))
        bars += many(chosen.many) if chosen.many else []
    return told(bars, chosen.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

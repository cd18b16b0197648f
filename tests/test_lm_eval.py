"""Adapters of a run as other programs load them: what `fedsynth model evaluate` prints, with plain PEFT."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fedsynth.cli.main import app
from fedsynth.federation.run.log import RunLog
from fedsynth.models.adapters import new_adapter, with_adapter
from fedsynth.models.loading import load_tokenizer
from fedsynth.reporting.adapters import lm_eval_command, saved
from fedsynth.scenario.toml import cells, load
from fedsynth.typed import BadValue

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose clients and server adapted `models:mine` in two rounds; the second round's weights differ."""
    shutil.copytree(families.folder("llama"), tmp_path / "models" / "mine")
    monkeypatch.setenv("FEDSYNTH_MODELS", str(tmp_path / "models"))
    cell = cells(load("hospitals", ["client.generator=models:mine"]))[0]
    out = tmp_path / "run"
    for number in (1, 2):
        log = RunLog(cell, out, out / "events.jsonl", round=number)
        for kind, client, seed in (("client", 0, 1), ("client", 1, 2), ("shared", -1, 3)):
            adapter = new_adapter("models:mine", rank=2, alpha=4.0, seed=seed)
            for name, array in adapter.arrays.items():
                array[:] += number * (0.05 if "lora_B" in name else 0.0)
            log.log_adapter(client, adapter, kind)
    return out


def asked(line: str) -> dict[str, str]:
    """The arguments that lm-eval reads from a printed command (`simple_parse_args_string`)."""
    words = shlex.split(line)
    assert words[:4] == ["lm_eval", "--model", "hf", "--model_args"]
    return dict(pair.split("=") for pair in words[4].split(","))


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(1, 12)[None]).logits
    return found


def test_the_printed_arguments_load_in_plain_peft_and_give_our_logits(run: Path) -> None:
    done = CliRunner().invoke(app, ["model", "evaluate", str(run), "--tasks", "pubmedqa,medqa_4options"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert len(lines) == 3  # the last round of two clients and of the server
    assert all("--tasks pubmedqa,medqa_4options" in line and "round-2-" in line for line in lines)
    shown = []
    for line, seed in zip(lines, (1, 2, 3), strict=True):
        given = asked(line)
        base = AutoModelForCausalLM.from_pretrained(given["pretrained"], dtype=getattr(torch, given["dtype"]))
        tokenizer = AutoTokenizer.from_pretrained(given["pretrained"])
        if base.config.vocab_size != len(tokenizer):  # as lm-eval does before it loads an adapter
            base.resize_token_embeddings(len(tokenizer))
        theirs = logits(PeftModel.from_pretrained(base.eval(), given["peft"], revision=given.get("revision")))
        own = new_adapter("models:mine", rank=2, alpha=4.0, seed=seed)
        for name, array in own.arrays.items():
            array[:] += 2 * (0.05 if "lora_B" in name else 0.0)
        ours = logits(with_adapter("models:mine", own).eval())
        assert torch.allclose(theirs, ours[..., : theirs.shape[-1]], atol=1e-4)
        shown.append(theirs)
    assert not torch.allclose(shown[0], shown[1], atol=1e-2)


def test_the_base_that_an_adapter_names_is_found_by_other_programs(run: Path) -> None:
    for folder in saved(run):
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert (Path(base) / "config.json").is_file()
        AutoPeftModelForCausalLM.from_pretrained(str(folder))


def test_a_model_that_converses_is_measured_in_its_chat_form(run: Path) -> None:
    folder = saved(run)[0]
    assert "--apply_chat_template" not in lm_eval_command(folder, "mmlu")
    base = Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    load_tokenizer.cache_clear()
    assert lm_eval_command(folder, "mmlu").endswith("--tasks mmlu --apply_chat_template")
    load_tokenizer.cache_clear()


def test_a_run_without_adapters_is_refused_and_so_is_a_folder_that_lm_eval_cannot_be_given(run: Path) -> None:
    with pytest.raises(BadValue, match="holds no adapter"):
        saved(run.parent)
    folder = saved(run)[0]
    odd = folder.rename(folder.with_name("round-2-a,b"))
    with pytest.raises(BadValue, match="no comma"):
        lm_eval_command(odd, "mmlu")

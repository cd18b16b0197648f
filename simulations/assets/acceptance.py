"""The abilities that a pretrained model of a world must have before it is shipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from fedsynth.instructions import ASK, asked, parse_record, record
from fedsynth.world.grammar import Style, known_facts, site, write_note
from fedsynth.world.lexicon import World
from fedsynth.world.quality import main_facts, quality, style_of, told_labels
from fedsynth.world.records import FIELD, answer_of, private_records

Role = Literal["llm", "slm", "base", "professional"]
GATES: dict[Role, dict[str, float]] = {
    "llm": {"template_valid": 0.95, "label_correct": 0.98, "register_match": 0.90},
    "slm": {"label_correct": 0.95},
    "base": {"department_correct": 0.85, "record_valid": 0.9, "in_style": 0.85, "in_style_new": 0.9},
    "professional": {"exact_match": 0.95},
}
SITES = 8  # the demo's hospitals, whose styles no public text has
DEMONSTRATIONS = 4
RECORD_TOKENS = 64


def measure_gates(
    world: World, model: Any, tokenizer: Any, role: Role, *, per_site: int = 32, seed: int = 7
) -> dict[str, float]:
    """The measured rates, under the names of `GATES`, and a few more.

    llm: notes continued after demonstrations of one label in a site's style; rates are means over the sites.
    slm: notes continued after the bare label, as many as for the llm; unread notes count as wrong.
    professional: answers to notes of the sites, greedy (`exact_match`, `department_correct`; `known_exact_match` where
        the weak text says the first fact often).
    base: the same answers; records written after the bare word that begins one (`record_valid`: a note of some style
        with an answer); records continued after demonstrations of a site (`in_style`: markers, separator,
        order and register are its own, with an answer; `in_style_new`: the note is none of the demonstrations' ones).
    """
    return _MEASURES[role](world, model, tokenizer, per_site, seed)


def _continues_blocks(world: World, model: Any, tokenizer: Any, per_site: int, seed: int) -> dict[str, float]:
    rng = np.random.default_rng([seed, 0])
    prompts, wanted = [], []
    for index in range(SITES):
        place = site(world, index)
        fact_prior = np.cumsum(place.fact_prior, axis=1)
        for _ in range(per_site):
            row = int(rng.integers(len(world.labels)))
            notes = [write_note(world, place.style, row, fact_prior, rng) for _ in range(DEMONSTRATIONS)]
            prompts.append("".join(f"{world.labels[row]}: {note}\n" for note in notes) + f"{world.labels[row]}:")
            wanted.append(world.labels[row])
    texts = sample_lines(model, tokenizer, prompts, seed=seed)
    shares = []
    for index in range(SITES):
        rows = slice(index * per_site, (index + 1) * per_site)
        q = quality(world, site(world, index).style, wanted[rows], texts[rows])
        shares.append((q.valid, q.label_correct, q.register_match))
    return dict(zip(GATES["llm"], (float(x) for x in np.mean(shares, axis=0)), strict=True))


def _writes_labels(world: World, model: Any, tokenizer: Any, per_site: int, seed: int) -> dict[str, float]:
    rng = np.random.default_rng([seed, 0])
    labels = [world.labels[int(k)] for k in rng.integers(len(world.labels), size=SITES * per_site)]
    texts = sample_lines(model, tokenizer, [f"{label}:" for label in labels], seed=seed)
    told = [told_labels(world, main_facts(world, text or "")) for text in texts]
    # A note whose main facts are all common ones tells no label and is left out; a note without a marker is wrong.
    wrong = [text is None or not main_facts(world, text) for text in texts]
    judged = [(t == {label}) for t, label, bad in zip(told, labels, wrong, strict=True) if t or bad]
    return {"label_correct": float(np.mean(judged)), "finished": float(np.mean([t is not None for t in texts]))}


def _answers(world: World, model: Any, tokenizer: Any, per_site: int, seed: int) -> dict[str, float]:
    notes = [private_records(world, index, per_site, seed, split="test") for index in range(SITES)]
    prompts = [note for corpus in notes for note in corpus.prompts]
    truths = [answer for corpus in notes for answer in corpus.answers]
    replies = sample_lines(model, tokenizer, [asked(note) for note in prompts], seed=seed, top_p=0.0)
    known = {
        fact[0]
        for facts, row in zip(world.facts, known_facts(world), strict=True)
        for fact, frequent in zip(facts, row, strict=True)
        if frequent
    }
    exact = [reply == truth for reply, truth in zip(replies, truths, strict=True)]
    department = [(r or "").partition(FIELD)[0] == t.partition(FIELD)[0] for r, t in zip(replies, truths, strict=True)]
    frequent = [hit for hit, truth in zip(exact, truths, strict=True) if truth.split(FIELD)[1] in known]
    return {
        "exact_match": float(np.mean(exact)),
        "department_correct": float(np.mean(department)),
        "known_exact_match": float(np.mean(frequent)),
    }


def _writes_records(world: World, model: Any, tokenizer: Any, per_site: int, seed: int) -> dict[str, float]:
    bare = sample_lines(model, tokenizer, [ASK] * (SITES * per_site), seed=seed, max_new_tokens=RECORD_TOKENS)
    valid = [answer_of(world, note) is not None for note in map(_note, bare)]
    prompts, shown = [], []
    for index in range(SITES):
        records = private_records(world, index, DEMONSTRATIONS * per_site, seed, split="train")
        for start in range(0, len(records), DEMONSTRATIONS):
            some = records.take(range(start, start + DEMONSTRATIONS))
            lines = [record(note, answer) for note, answer in zip(some.prompts, some.answers, strict=True)]
            prompts.append("\n".join([*lines, ASK]))
            shown.append(some.prompts)
    notes = [_note(t) for t in sample_lines(model, tokenizer, prompts, seed=seed, max_new_tokens=RECORD_TOKENS)]
    styles = [site(world, index).style for index in range(SITES) for _ in range(per_site)]
    follows = [
        answer_of(world, n) is not None and _alike(s, style_of(world, n)) for s, n in zip(styles, notes, strict=True)
    ]
    return {
        **_answers(world, model, tokenizer, per_site, seed),
        "record_valid": float(np.mean(valid)),
        "in_style": float(np.mean(follows)),
        "in_style_new": float(np.mean([note not in old for note, old in zip(notes, shown, strict=True)])),
    }


def _alike(style: Style, found: Style | None) -> bool:
    """True if markers, separator, order and register are the same; openers and closers are filling, copied last."""
    return found is not None and all(
        getattr(style, name) == getattr(found, name) for name in ("main", "history", "separator", "order", "register")
    )


def _note(text: str | None) -> str:
    """The note of a record that was continued from `ASK`; empty where it is not one."""
    found = parse_record(text or "")
    return found[0] if found else ""


_MEASURES: dict[Role, Callable[[World, Any, Any, int, int], dict[str, float]]] = {
    "llm": _continues_blocks,
    "slm": _writes_labels,
    "base": _writes_records,
    "professional": _answers,
}


@torch.no_grad()
def sample_lines(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, seed: int, max_new_tokens: int = 32, top_p: float = 0.95
) -> list[str | None]:
    """Continues each prompt to the end of its line; None where the line does not end in time.

    Args:
        model: In evaluation mode.
        tokenizer: Its end-of-sequence token is the line end.
        prompts: Each is read after a BOS.
        seed: Seed of the draws at temperature 1.
        max_new_tokens: Longest continuation.
        top_p: Probability mass that is drawn from; at 0 the likeliest token is always taken.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [[tokenizer.bos_token_id, *tokenizer.encode(p, add_special_tokens=False)] for p in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    written = torch.empty(len(rows), 0, dtype=torch.long)
    cache, ended = None, torch.zeros(len(rows), dtype=torch.bool)
    for _ in range(max_new_tokens):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        probabilities, order = out.logits[:, -1].float().softmax(-1).sort(descending=True)
        probabilities[probabilities.cumsum(-1) - probabilities > top_p] = 0
        ids = order.gather(1, torch.multinomial(probabilities, 1, generator=generator))
        written = torch.cat([written, ids], 1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        ended |= ids[:, 0] == tokenizer.eos_token_id
        if ended.all():
            break
    lines: list[str | None] = []
    for tokens in written.tolist():
        end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else None
        lines.append(None if end is None else tokenizer.decode(tokens[:end]).strip())
    return lines

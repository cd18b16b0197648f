"""What a pretrained model of a world must be able to do before it is shipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from fedsynth.world.grammar import site, write_note
from fedsynth.world.lexicon import World
from fedsynth.world.quality import main_facts, quality, told_labels

GATES = {
    "llm": {"template_valid": 0.95, "label_correct": 0.98, "register_match": 0.90},
    "slm": {"label_correct": 0.95},
}
SITES = 8  # the demo's hospitals, whose styles no public text has
DEMONSTRATIONS = 4


def measure_gates(
    world: World, model: Any, tokenizer: Any, role: Literal["llm", "slm"], *, per_site: int = 32, seed: int = 7
) -> dict[str, float]:
    """The measured rates, under the names of `GATES`.

    llm: notes continued after demonstrations of one label in a site's style; rates are means over the sites.
    slm: notes continued after the bare label, as many as for the llm; unread notes count as wrong.
    """
    rng = np.random.default_rng([seed, 0])
    if role == "slm":
        labels = [world.labels[int(k)] for k in rng.integers(len(world.labels), size=SITES * per_site)]
        texts = sample_lines(model, tokenizer, [f"{label}:" for label in labels], seed=seed)
        told = [told_labels(world, main_facts(world, text or "")) for text in texts]
        # A note whose main facts are all common ones tells no label and is left out; one without a marker is wrong.
        wrong = [text is None or not main_facts(world, text) for text in texts]
        judged = [(t == {label}) for t, label, bad in zip(told, labels, wrong, strict=True) if t or bad]
        return {"label_correct": float(np.mean(judged)), "finished": float(np.mean([t is not None for t in texts]))}
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


@torch.no_grad()
def sample_lines(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, seed: int, max_tokens: int = 32, top_p: float = 0.95
) -> list[str | None]:
    """Continues each prompt to the end of its line at temperature 1; None where the line does not end in time."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[tokenizer.bos_token_id, *tokenizer.encode(p, add_special_tokens=False)] for p in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    written = torch.empty(len(rows), 0, dtype=torch.long)
    cache, ended = None, torch.zeros(len(rows), dtype=torch.bool)
    for _ in range(max_tokens):
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

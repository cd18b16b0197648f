"""The card of exported texts and adapters, in the form of a data set's card on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsynth.corpus import Provenance
from fedsynth.federation.run.privacy_report import up
from fedsynth.models.hub import locate
from fedsynth.models.of_scenario import endpoints_of, models_of
from fedsynth.reporting.texts import Released, kinds_of
from fedsynth.scenario.schema import Scenario
from fedsynth.typed import BadValue

LICENCES = (
    re.compile(r"^- licence of the original: (.+)$", re.MULTILINE),  # `simulations/models/get.py`
    re.compile(r"^- licence, as the file says it: (.+)$", re.MULTILINE),  # `fedsynth model import`
    re.compile(r"\A---\n(?:.*\n)*?license: *(.+)$", re.MULTILINE),  # a card of the hub
)
UNKNOWN = "not known here"
BEYOND = (
    "what is true of the clients' data as a whole (a common disease, a usual phrase): it can be read from the texts, "
    "and is meant to be; the bound is about what one {unit} adds",
    "that a text is true, or harmless: models make things up",
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        run: The run's directory.
        out: The folder.
        texts: The texts, by file of the run.
        adapters: Arm, seed, kind and client of each adapter.
        files: By arm and kind, the file of texts in the folder.
        skipped: Arms that were left out, as they have no guarantee.
    """

    run: Path
    out: Path
    texts: tuple[Released, ...]
    adapters: tuple[tuple[str, int, str, int], ...]
    files: Mapping[tuple[str, str], str]
    skipped: tuple[str, ...]

    @property
    def cells(self) -> list[tuple[str, int]]:
        """Arm and seed of all that was written, in order."""
        named = [*((each.arm, each.seed) for each in self.texts), *((arm, seed) for arm, seed, *_ in self.adapters)]
        return list(dict.fromkeys(named))

    @property
    def arms(self) -> list[str]:
        """Their arms, in order."""
        return list(dict.fromkeys(arm for arm, _ in self.cells))


def origin_of(kind: Provenance) -> str:
    """A provenance in words."""
    match kind:
        case Provenance.PUBLIC:
            return "from public text and names of labels alone"
        case Provenance.DP_SYNTHETIC:
            return "written by models that clients trained under differential privacy"
        case Provenance.LLM_WRITTEN:
            return "written by the server's language model after released texts"
        case Provenance.SELF_GENERATED:
            return "written by clients after private texts"
        case _:  # `export` refuses it
            raise ValueError(f"{kind.value} text is not exported")


def guarantee_of(each: Released) -> str:
    """`public`, `dp` or `none`."""
    if each.corpus.provenance is Provenance.PUBLIC:
        return "public"
    return "dp" if each.corpus.grants else "none"


def portable(name: str) -> str:
    """A model's name without the folder that it lies in on this machine."""
    return Path(name).name if Path(name).is_absolute() else name


def licence_of(name: str) -> str:
    """A model's licence, as the papers in its folder say it; `UNKNOWN` if they do not, or it lies on the hub."""
    if name.startswith("assets:"):
        return "Apache-2.0, as fedsynth itself"
    try:
        folder = Path(locate(name))
    except BadValue:
        return UNKNOWN
    for paper in ("README.md", "IMPORT.md", "ORIGINAL.md"):
        with suppress(OSError, UnicodeDecodeError):
            text = (folder / paper).read_text(encoding="utf-8")
            for pattern in LICENCES:
                if found := pattern.search(text):
                    return found[1].strip().strip("'\"")
    return UNKNOWN


def card(made: Exported, scenario: Scenario, privacy: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    """The card's text.

    Args:
        made: What was written.
        scenario: The run's scenario.
        privacy: The run's `privacy.json`.
        versions: The run's `versions.json`.
    """
    parts = [
        _head(made, scenario),
        f"# Released by a fedsynth run: {_line(scenario.name)}",
        _what(made, scenario),
        "## Files\n\n" + _table(("file", "texts", "clients", "seeds", "provenance", "guarantee"), _files(made)),
        _adapters(made),
        *_privacy(made, privacy),
        _models(scenario, versions),
        f"Made with fedsynth {versions.get('fedsynth', UNKNOWN)}; the run's own directory has all settings.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(made: Exported, scenario: Scenario) -> str:
    kind = "text-classification" if scenario.data.task == "classification" else "text-generation"
    lines = [
        "license: other",
        "license_name: see-models",
        f"task_categories: [{kind}]",
        "tags: [synthetic, federated-learning, differential-privacy, fedsynth]",
    ]
    if made.files:
        lines.append("configs:")
        for (arm, name), file in made.files.items():
            lines += [f"- config_name: {json.dumps(f'{arm}-{name}')}", f"  data_files: {json.dumps(file)}"]
    return "\n".join(["---", *lines, "---"])


def _what(made: Exported, scenario: Scenario) -> str:
    source = scenario.data.source
    public = source if source.startswith(("world:", "hf:")) else "files of the run's own"
    clients = 1 if scenario.data.pooled else scenario.data.clients
    released = [name for name, there in (("texts", made.texts), ("adapters", made.adapters)) if there]
    left = f" Arms that have no guarantee were left out: {_line(', '.join(made.skipped))}." if made.skipped else ""
    return (
        f"{' and '.join(released).capitalize()} of {_counted(len(made.cells), 'cell')} (arms x seeds) of a federation "
        f"of {_counted(clients, 'client')}. The clients' own text ({_line(public)}) is not in this folder.{left}"
    )


def _files(made: Exported) -> Iterator[Sequence[str]]:
    for arm in made.arms:
        for kind in kinds_of(made.texts, arm):
            own = [each for each in made.texts if (each.arm, each.kind) == (arm, kind)]
            said = sorted({origin_of(each.corpus.provenance) for each in own})
            yield (
                f"`{made.files[arm, kind]}`",
                str(sum(len(each.corpus) for each in own)),
                str(len({each.client for each in own if each.client >= 0}) or "the server"),
                ", ".join(map(str, sorted({each.seed for each in own}))),
                "; ".join(said),
                ", ".join(sorted({guarantee_of(each) for each in own})),
            )


def _adapters(made: Exported) -> str:
    if not made.adapters:
        return ""
    rows = [
        (arm, str(seed), kind, "the server" if client < 0 else str(client)) for arm, seed, kind, client in made.adapters
    ]
    return (
        "## Adapters\n\nIn `adapters/`, in PEFT's format: `PeftModel.from_pretrained(base, folder)`. The base model's "
        "name is in each `adapter_config.json`, the digest of its weights in `grants.json`.\n\n"
        + _table(("arm", "seed", "kind", "client"), rows)
    )


def _privacy(made: Exported, privacy: Mapping[str, Any]) -> Iterator[str]:
    yield "## Privacy"
    open_arms = [arm for arm in made.arms if privacy[arm]["guarantee"] == "none"]
    if open_arms:
        yield (
            f"**No guarantee covers {_line(', '.join(open_arms))}:** these texts or adapters may repeat private text "
            "word for word. They were exported by an explicit choice."
        )
    for arm in made.arms:
        line = _line(privacy[arm]["line"])
        yield f"### {_line(arm)}\n\n{line[0].upper()}{line[1:]}."
        figures = privacy[arm].get("largest_over_clients")
        if figures is None:
            continue
        yield _table(("", ""), _figures(figures, privacy[arm]["terms"]))
        if figures["simulated"]:
            yield (
                "**This run was a simulation.** Its noise can be computed again from the run's seed, so that its "
                "figures are those of a hypothetical site. They protect nobody if the clients' text was real."
            )
    bounded = {arm: privacy[arm]["largest_over_clients"] for arm in made.arms if "largest_over_clients" in privacy[arm]}
    spent = [bounded[arm] for arm, _ in made.cells if arm in bounded]
    if len(spent) > 1 and not any(figures["simulated"] for figures in spent):
        epsilon, delta = up(sum(each["epsilon"] for each in spent), 3), sum(each["delta"] for each in spent)
        yield (
            f"**All of it together:** {len(spent)} cells spent of the same clients' data. By simple composition they "
            f"are ({epsilon:.3f}, {delta:g})-DP; the sites' ledgers have the exact figures."
        )
    open_ends = dict.fromkeys(line for arm in made.arms for line in privacy[arm]["not_covered"])
    units = " or ".join(sorted({figures["unit"] for figures in bounded.values()})) or "row"
    beyond = [line.format(unit=units) for line in BEYOND]
    yield "### What this does not cover\n\n" + "\n".join(f"- {_line(line)}" for line in [*open_ends, *beyond])


def _figures(figures: Mapping[str, Any], terms: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    unit = figures["unit"]
    yield "epsilon, the largest over clients and seeds", f"{up(figures['epsilon'], 3):.3f}"
    yield "delta", f"{figures['delta']:g}"
    yield "unit of privacy", unit if unit == "row" else f"{unit}, at most {figures['rows_per_unit']} rows of one"
    yield "adjacency", terms.get("adjacency", UNKNOWN)
    if figures["epsilon_replace_one"] is not None:
        yield f"epsilon, if a {unit} is replaced by another", f"{up(figures['epsilon_replace_one'], 2):.2f}"
    for rows, epsilon in figures["epsilon_rows"].items():
        yield f"epsilon of {rows} rows of one person", str(epsilon)
    for key in ("mechanism", "sampler", "accountant", "composition", "adversary"):
        if key in terms:
            yield key, terms[key]
    yield "what the server saw", "; ".join(terms["sees"])
    yield "public, and not protected", "; ".join(terms["public"])
    if terms.get("assumptions"):
        yield "assumptions", terms["assumptions"]


def _models(scenario: Scenario, versions: Mapping[str, Any]) -> str:
    recorded = versions.get("models", {})
    rows = [
        (
            role.replace("_", " "),
            f"`{portable(name)}`",
            " ".join(f"{kind} `{value}`" for kind, value in recorded.get(name, {}).items()) or UNKNOWN,
            licence_of(name),
        )
        for name, role in models_of(scenario)
    ]
    rows += [
        ("endpoint", f"`{each.model}`", "its provider's", "its provider's terms") for each in endpoints_of(scenario)
    ]
    return (
        "## Models and their licences\n\nThe licence of a model may bind what it wrote, and adapters of it. Read it "
        "before you pass this folder on.\n\n" + _table(("role", "model", "version", "licence"), rows)
    )


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_line(cell) for cell in line) + " |" for line in lines)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _line(text: str) -> str:
    """One line that Markdown shows as it is: names in a scenario are free text."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")

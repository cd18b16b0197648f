"""The data of an experiment: where they come from, what holds the text, how clients divide them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsynth.corpus import alike, told_apart
from fedsynth.scenario.task import slots_of
from fedsynth.typed import BadValue, Count, Positive, in_range


@dataclass(frozen=True)
class TestRows:
    """Test rows of a data file, which are held out: those whose `column` equals `equals`."""

    column: str
    equals: str


PAIR = "{first} | {second}"
_HALVES = frozenset(("first", "second"))


def check_pair(text: str | tuple[str, ...], pair: str | None) -> None:
    """Checks which columns hold the text, and how two of them become one.

    Raises:
        BadValue: If there are not one or two columns, or the template is not one of a pair.
    """
    if not isinstance(text, str) and (len(text) != 2 or text[0] == text[1]):
        raise BadValue(f"data.text must name one column, or two different ones for a pair, got {list(text)}")
    if pair is None:
        return
    if isinstance(text, str):
        raise BadValue("data.pair says how two columns become one text: data.text names one")
    slots_of("data.pair", pair, _HALVES, _HALVES)


@dataclass(frozen=True)
class Data:
    """A labelled data set and its division among clients.

    Attributes:
        source: `world:NAME` (a simulated world), `hf:NAME` (a Hugging Face data set), or a CSV, JSONL or Parquet file
            or a folder written by `datasets.save_to_disk`, looked up beside the scenario, in the working directory,
            then in the folder that the environment variable FEDSYNTH_DATA names. The column `split` names the split of
            a data set.
        clients: Number of clients; each is one hospital or bank.
        labels: The public label list; "all" takes those of a simulated world or file (never allowed at a real site).
        train_per_client: Simulated worlds: private notes per client.
        test_per_client: Simulated worlds: test notes per client, declared public (docs/privacy.md).
        text: Column of the text; two columns, as ["premise", "hypothesis"], for a pair, which becomes one text.
        pair: How the two become one, with the slots `{first}` and `{second}`; left out, `{first} | {second}`. A row
            that lacks one of them has no text. All that follows sees the one text: write it on one line, as texts
            are written.
        label: Column of the class name.
        attributes: Further columns whose public values and their wordings the card lists, [task.attributes.COLUMN]: a
            generator learns texts after label and values, and is asked for all combinations alike. A row with an
            unlisted value is a record of which no generator learns anything, whatever `unlisted` says.
        task: `classification`: text -> one of a list of labels. `instructions`: text (an instruction) -> free response.
            `choice`: the rows of a classification as instructions, each a question about the text to which the label's
            wording is the response (`task.templates.choice`), so that every method runs on the same rows; or, with
            `options`, multiple choice. Simulations.
        options: `choice`: columns of a question's own options, as ["a", "b", "c", "d"] (the last ones may be empty), or
            one column with a list of them, in a CSV file as JSON. `label` is then the column of the right one. A row
            with one option, more than 26, two that are the same, or no right one among them has no answer.
        answer_as: `options`: what names the right one: its `letter` (A, B, ...), its `index` (0, 1, ...), or its
            `text`.
        response: `instructions`: column of the response.
        notes_per_patient: Simulated worlds: a patient has from 1 to this many of the notes. Above 1 the patient is the
            privacy unit. The notes are the same.
        planted: Simulated worlds, `instructions`: every private response ends with its own secret, for audits.
        test: Rows held out for testing; left out, a seeded fifth of each client's rows.
        split: `iid`; `dirichlet` or `pathological`: by label; `natural`: by the values of `client_column`, the first
            `clients` of them in sorted order.
        alpha: `dirichlet`: concentration; the smaller, the more the clients differ.
        classes_per_client: `pathological`: number of classes that each client holds.
        client_column: Column whose values are the natural clients.
        unit: Column of the person; left out, rows are declared independent.
        limit: At most so many private units per client, drawn after the split.
        unlisted: Rows whose label `labels` does not list: `count` keeps them as records of which nothing is learnt, as
            a site's rows are; `drop` leaves them out before the source is divided: the task is a part of the source.
        per_label: At most so many private rows of each label, drawn after the split: one number, or one for each
            client, as [100, 3] for a rich client and a poor one.
        test_limit: At most so many test units per client, likewise.
        duplicates: `refuse` rejects a text that two clients hold, or that is in training and test text. `drop` keeps
            one copy of each text, also within a client, before the source is divided. Texts are compared as in
            `spellings`.
        spellings: `refuse` rejects a person or a client in several spellings; `merge` counts all its spellings as one.
            Spellings differ in case, blanks, composed characters and characters without a glyph. Labels in several
            spellings are always refused.
        revision: `hf:`: branch, tag or commit.
        subset: `hf:`: configuration of the data set.
        public: A declaration: anyone may read the clients' text, as that of a published data set. Then text without a
            guarantee may go to an endpoint on another machine. A simulated world's text is public.
        pooled: One client that holds all clients' text: a baseline that only a simulator can build.
        tuned_on: Clients on which settings were tuned; results are reported without them, too. The list may name more
            clients than a smaller run has.
    """

    source: str
    clients: Count = 8
    labels: Literal["all"] | tuple[str, ...] = "all"
    train_per_client: Count = 200
    test_per_client: Count = 600
    text: str | tuple[str, ...] = "text"
    pair: str | None = None
    label: str = "label"
    attributes: tuple[str, ...] = ()
    task: Literal["classification", "instructions", "choice"] = "classification"
    options: tuple[str, ...] = ()
    answer_as: Literal["letter", "index", "text"] = "letter"
    response: str = "response"
    notes_per_patient: Count = 1
    planted: bool = False
    test: TestRows | None = None
    split: Literal["iid", "dirichlet", "pathological", "natural"] = "iid"
    alpha: Positive = 0.5
    classes_per_client: Count | None = None
    client_column: str | None = None
    unit: str | None = None
    limit: Count | None = None
    unlisted: Literal["count", "drop"] = "count"
    per_label: int | tuple[int, ...] | None = None
    test_limit: Count | None = None
    duplicates: Literal["refuse", "drop"] = "refuse"
    spellings: Literal["refuse", "merge"] = "refuse"
    revision: str | None = None
    subset: str | None = None
    public: bool = False
    pooled: bool = False
    tuned_on: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        in_range(self, "data")
        check_pair(self.text, self.pair)
        if self.labels != "all" and not self.labels:
            raise BadValue("the label list is empty: name the classes, or leave `labels` out to take all of the source")
        if self.labels != "all" and len(set(self.labels)) < len(self.labels):
            raise BadValue(f"labels holds a class twice: {sorted(self.labels)}")
        if min(self.tuned_on, default=0) < 0 or len(set(self.tuned_on)) < len(self.tuned_on):
            raise BadValue(f"tuned_on must name distinct clients, from 0, got {list(self.tuned_on)}")
        if self.world is not None and (self.unit or self.test or self.client_column or self.split != "iid"):
            raise BadValue("unit, test, client_column and split belong to data files, not to a simulated world")
        if self.labels != "all" and (found := alike(self.labels)):
            raise BadValue(f"labels holds a class in several spellings: {', '.join(map(told_apart, found))}")
        if self.world is not None and (self.limit or self.test_limit or self.duplicates != "refuse"):
            raise BadValue(
                "limit, test_limit and duplicates belong to data files; a simulated world has train_per_client"
            )
        if self.unlisted != "count" and (self.labels == "all" or self.world is not None):
            raise BadValue('unlisted = "drop" belongs to a data file of which `labels` lists some classes')
        if self.per_label is not None:
            counts = (self.per_label,) if isinstance(self.per_label, int) else self.per_label
            if not counts or min(counts) < 1:
                raise BadValue(f"data.per_label must be at least 1, for each client, got {self.per_label}")
            if isinstance(self.per_label, tuple) and len(counts) != self.clients:
                raise BadValue(f"data.per_label names {len(counts)} clients, data.clients is {self.clients}")
            if self.world is not None or self.task == "instructions" or self.unit is not None:
                raise BadValue("per_label belongs to data files of labelled rows that are declared independent")
        if self.options and (self.task != "choice" or self.world is not None):
            raise BadValue('options are columns of a data file with task = "choice"')
        if self.attributes and (self.task != "classification" or self.world is not None):
            raise BadValue('attributes are columns of a data file with task = "classification"')
        if len(set(self.attributes)) < len(self.attributes):
            raise BadValue(f"data.attributes names a column twice: {list(self.attributes)}")
        texts = (self.text,) if isinstance(self.text, str) else self.text
        if taken := set(self.attributes) & {*texts, self.label, self.unit}:
            raise BadValue(f"data.attributes names {min(taken)!r}, the column of the text, the label or the person")
        if self.options and (self.labels != "all" or self.per_label is not None):
            raise BadValue("labels and per_label are about classes, and with options each row brings its own")
        if self.options and self.split in ("dirichlet", "pathological"):
            raise BadValue(f'split = "{self.split}" goes by label, and options have none: use "iid" or "natural"')
        if len(set(self.options)) < len(self.options):
            raise BadValue(f"data.options names a column twice: {list(self.options)}")
        if self.answer_as != Data.answer_as and not self.options:
            raise BadValue("answer_as says which of a row's options is right: name their columns as options")
        if self.spellings != "refuse" and not (self.unit or self.client_column):
            raise BadValue("spellings is about persons and clients: name their column as unit or client_column")
        if self.task == "instructions" and self.labels != "all":
            raise BadValue('labels belong to task = "classification"; responses are not of a list')
        if self.task == "instructions" and self.split in ("dirichlet", "pathological"):
            raise BadValue(f'split = "{self.split}" goes by label, and instructions have none: use "iid" or "natural"')
        if self.response != Data.response and (self.task != "instructions" or self.world is not None):
            raise BadValue('response is the column of a data file with task = "instructions"')
        if self.planted and (self.world is None or self.task != "instructions"):
            raise BadValue('planted belongs to a simulated world with task = "instructions"')
        if self.world is not None and not isinstance(self.text, str):
            raise BadValue("a pair of columns belongs to data files, not to a simulated world")
        if self.split == "natural" and self.client_column is None:
            raise BadValue('split = "natural" needs client_column: the column whose values are the clients')
        if self.alpha != Data.alpha and self.split != "dirichlet":
            raise BadValue(f'alpha belongs to split = "dirichlet", not to {self.split!r}')
        if (self.classes_per_client is not None) != (self.split == "pathological"):
            raise BadValue('classes_per_client and split = "pathological" need each other')
        if self.world is None and self.notes_per_patient != 1:
            raise BadValue("notes_per_patient belongs to a simulated world: a data file names its persons by data.unit")
        if self.source == "hf:":
            raise BadValue('source = "hf:" names no data set: write hf:NAME')
        if self.hub_name is None and (self.revision or self.subset):
            raise BadValue(f"revision and subset belong to a source hf:NAME, not to {self.source!r}")

    @property
    def world(self) -> str | None:
        """Name of the simulated world, or None for a source of one's own."""
        return self.source.removeprefix("world:") if self.source.startswith("world:") else None

    @property
    def classes(self) -> bool:
        """True if answers are class names; False for responses, and for options that each row brings."""
        return self.task != "instructions" and not self.options

    @property
    def unit_name(self) -> str:
        """The privacy unit: the column of persons, a world's patients, or the row."""
        return self.unit or ("patient" if self.notes_per_patient > 1 else "row")

    @property
    def hub_name(self) -> str | None:
        """Name of the Hugging Face data set, or None for another source."""
        return self.source.removeprefix("hf:") if self.source.startswith("hf:") else None

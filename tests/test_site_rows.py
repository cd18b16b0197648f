"""A site's imported rows: what requests read, whatever one of them holds; and what its operator is told."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from flwr.app import Context, RecordDict

from fedsynth.clients.audit_log import entries
from fedsynth.clients.client_side import ClientSide, cell_of
from fedsynth.clients.handler import reply_to
from fedsynth.corpus import Corpus, Provenance
from fedsynth.data import rowstore
from fedsynth.data.rowstore import Imported, Record, RowsUnusable
from fedsynth.data.sources import SiteData
from fedsynth.deployment.certificates import write_node_keys
from fedsynth.deployment.client import client_side
from fedsynth.deployment.policy import Models, Place, Policy, SiteConfig, SuperLink
from fedsynth.deployment.site import supernode as site_watch
from fedsynth.deployment.site.check import check
from fedsynth.deployment.site.ready import check_state
from fedsynth.deployment.site.rows import check_rows, import_rows, source_changed
from fedsynth.deployment.site.start import start
from fedsynth.federation.messages import (
    OUTPUTS,
    REQUESTS,
    Adopt,
    Envelope,
    ErrorCode,
    Evaluate,
    Finetune,
    Learn,
    Refused,
    Request,
    Score,
    SelfTrain,
    Synthesize,
)
from fedsynth.federation.records import pack_request, unpack_reply
from fedsynth.models.adapters import new_adapter
from fedsynth.models.loading import load_tokenizer
from fedsynth.privacy.ledger import Binding
from fedsynth.privacy.plan import Budget, composed_epsilon, plan
from fedsynth.scenario.data import TestRows
from fedsynth.scenario.toml import from_toml, to_toml
from fedsynth.system.folders import private_folder
from fedsynth.typed import BadValue

TestRows.__test__ = False  # pytest would collect it

LABELS = ("heart", "skin")
PARTS = ("train", "test")
SCENARIO = """
name = "tiny"
seeds = [0]
[strategy]
use = "fedsynth.strategies.{use}"
[data]
source = "at-the-sites.csv"
task = "{task}"
{labels}
clients = 1
[client]
generator = "{model}"
task_model = "{model}"
guarantee = "{guarantee}"
budget = {{ epsilon = 1.0 }}
answer_tokens = 4
generator_training = {{ expected_batch_size = 3, steps = 2, rank = 2, alpha = 4.0, max_length = 64 }}
scorer_training = {{ expected_batch_size = 3, steps = 2, rank = 2, alpha = 4.0, max_length = 32 }}
task_training = {{ augmented_epochs = 1, private_epochs = 1, max_length = 32 }}
[server]
llm = "scripted"
[arms.main]
"""


def scenario(task: str = "classification", guarantee: str = "dp") -> str:
    use = "fdkt:FDKT" if task == "classification" else "lora_avg:LoraAverage"
    labels = f"labels = {json.dumps(LABELS)}" if task == "classification" else ""
    return SCENARIO.format(use=use, task=task, labels=labels, model=tiny.folder(), guarantee=guarantee)


def rows(task: str = "classification") -> list[bytes]:
    """A small table, a line each: nine rows to learn from, three to test on."""
    answers = [*LABELS, *LABELS] if task == "classification" else ["rest", "tea", "sleep", "a walk"]
    key = "label" if task == "classification" else "response"
    return [
        json.dumps({"person": f"p{n}", "text": f"note {n}", key: answers[n % 4], "part": PARTS[n > 8]}).encode()
        for n in range(12)
    ]


def place(folder: Path, content: Sequence[bytes], task: str = "classification", **more: Any) -> Place:
    """A site that allows everything."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "notes.jsonl").write_bytes(b"\n".join(content) + b"\n")
    facts: dict[str, Any] = {"labels": LABELS} if task == "classification" else {"task": task}
    facts |= {"person": "person", "records": 9, "test": TestRows("part", "test"), **more}
    policy = Policy(
        Budget(1e4),
        requests=tuple(o.task for o in REQUESTS),
        outputs=OUTPUTS,
        without_guarantee=True,
        minimum_records=1,
        models=(tiny.folder(),),
        approve_text=False,
    )
    data = SiteData(id="notes-1", source="notes.jsonl", **facts)
    return Place(SiteConfig("north", data, policy, SuperLink("127.0.0.1:9443")), folder)


def imported(folder: Path, content: Sequence[bytes], task: str = "classification", **more: Any) -> Place:
    made = place(folder, content, task, **more)
    list(import_rows(made))
    return made


def client(site: Place, toml: str) -> ClientSide:
    """Where a request is answered."""
    envelope = Envelope("run", "main", 0, 1, 0)
    return client_side(site, cell_of(to_toml(from_toml(toml)), "main", 0), envelope, {})


def asked(site: Place, request: Request[Any], toml: str, exchange: int = 1, run: str = "run") -> Any:
    """What a site replies to a request."""
    whole = to_toml(from_toml(toml))
    cell, context = cell_of(whole, "main", 0), Context(1, 1, {}, RecordDict(), {"scenario-toml": whole})
    content = pack_request(request, Envelope(run, "main", 0, exchange, 0))
    sealed = reply_to(
        type(request),
        content,
        context,
        lambda _, envelope: client_side(site, cell, envelope, {}),
        unopened=lambda task, why: None,
    )
    return unpack_reply(sealed, request.reply)


def requests(task: str, guarantee: str) -> Iterator[Request[Any]]:
    """One of each kind that a scenario can lead to, in an order in which a run could ask them."""
    start = new_adapter(tiny.folder(), rank=2, alpha=4.0, seed=0)
    written = Corpus(
        ("some text", "other text"), LABELS if task == "classification" else ("so", "or so"), Provenance.LLM_WRITTEN
    )
    yield Learn(0, written)
    yield Evaluate()
    yield Evaluate(start)
    yield Adopt(start)
    yield Finetune(start, 0)
    if task == "classification":
        yield Synthesize(2, 1.0, 1.0, 8, 0)
        yield Score(written, 0)
    elif guarantee == "none":
        yield SelfTrain(start, 0, 0, candidates=2, keep=1, shots=4, max_new_tokens=8)
        yield Evaluate()


CRASH = "zqcrash"  # the tokenizer fails at it


def poisoned(line: bytes) -> list[bytes]:
    """What a row may become: each of it stopped a request once, or could."""
    note = b'"note '
    return [
        line.replace(note, b'"n\xffte '),
        line.replace(note, b'"n\\u0000te '),
        line[:-3],
        b"[" * 10_000,
        line.replace(b'"text": "note', b'"text": ' + b"[" * 10_000 + b"]" * 10_000 + b', "t": "'),
        line.replace(b'"text": "note', b'"text": ' + b"9" * 5000 + b', "t": "'),
        line.replace(note, f'"{CRASH} '.encode()),
        line.replace(note, b'"' + b"long " * 500),
        line.replace(b'"heart"', b'"lungs"').replace(b'"skin"', b'"lungs"').replace(b'"rest"', b'["rest"]'),
        line.replace(note, b'"\xe2\x80\x8b'),
        b"{}",
    ]


@pytest.fixture
def _crashing(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(load_tokenizer(tiny.folder()))
    whole = kind.__call__

    def failing(self: Any, text: Any, *arguments: Any, **more: Any) -> Any:
        if any(CRASH in each for each in ([text] if isinstance(text, str) else text)):
            raise ValueError(CRASH)
        return whole(self, text, *arguments, **more)

    monkeypatch.setattr(kind, "__call__", failing)
    for module in ("finetune", "score"):  # on public tokens, for seconds
        monkeypatch.setattr(f"fedsynth.clients.{module}.self_check", lambda *_, **__: None)


@pytest.mark.usefixtures("_crashing")
@pytest.mark.parametrize(
    ("task", "guarantee"), [("classification", "dp"), ("classification", "none"), ("instructions", "none")]
)
def test_the_code_of_a_reply_is_the_same_whatever_rows_hold(tmp_path: Path, task: str, guarantee: str) -> None:
    toml, clean = scenario(task, guarantee), rows(task)
    bad = [*clean[:2], *poisoned(clean[2]), *poisoned(clean[10]), *clean[3:]]
    none = [line for line in bad if line not in clean]
    contents = [clean, bad, none] if guarantee == "dp" else [clean, bad, none, [b""]]
    sites = [imported(tmp_path / f"{n}", content, task) for n, content in enumerate(contents)]
    assert len({client(site, toml).plan() for site in sites}) == 1
    for exchange, request in enumerate(requests(task, guarantee)):
        own = guarantee == "dp" and isinstance(request, Finetune | Synthesize | Score)  # each has a budget of its own
        run = f"run-{exchange}" if own else "run"
        found = [asked(site, request, toml, exchange, run) for site in sites]
        assert {type(reply) for reply in found} == {request.reply}, (request.task, found)
        if isinstance(request, Evaluate):
            assert len({tuple(reply.metrics) for reply in found}) == 1


# --- The store --------------------------------------------------------------------------------------------------------

ABOUT = Imported("d" * 64, "2026-01-01T00:00:00+00:00", 2)
RECORDS = [Record("p\u00e9", False, 'a "b"\n,\u2028c', "flu"), Record(None, True, "", ""), Record(3, False, "x", "y")]


def test_records_come_back_as_they_were_for_the_owner_alone(tmp_path: Path) -> None:
    path, before = tmp_path / "new" / "rows.jsonl", os.umask(0)
    try:
        rowstore.write(path, bytes(32), ABOUT, RECORDS)
    finally:
        os.umask(before)
    assert rowstore.read(path, bytes(32)) == RECORDS
    assert rowstore.about(path) == ABOUT
    assert [each.stat().st_mode & 0o777 for each in (path, path.parent)] == [0o600, 0o700]
    assert [each.name for each in path.parent.iterdir()] == ["rows.jsonl"]
    assert path.read_bytes().isascii()
    assert len(path.read_bytes().splitlines()) == 2 + len(RECORDS)  # what a text holds ends no line


def test_a_store_that_was_changed_cut_short_or_is_of_another_account_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rowstore.write(path, bytes(32), ABOUT, RECORDS)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for wrong in (
        whole.replace(b"flu", b"fly"),
        whole[:-1],
        whole[:-70],
        b"".join([*lines[:2], *lines[3:]]),
        b"".join([lines[0], lines[2], lines[1], *lines[3:]]),
        whole + lines[-1],
        b"",
    ):
        assert wrong != whole
        path.write_bytes(wrong)
        with pytest.raises(RowsUnusable, match="were changed or cut short"):
            rowstore.read(path, bytes(32))
    path.write_bytes(whole)
    with pytest.raises(RowsUnusable, match="or are those of another account"):
        rowstore.read(path, b"\1" * 32)
    assert rowstore.read(path, bytes(32)) == RECORDS


def test_the_mac_of_a_source_is_none_of_a_store(tmp_path: Path) -> None:
    """Whoever writes the source chooses what its MAC is of, and reads that MAC above the rows."""
    path, key = tmp_path / "rows.jsonl", bytes(32)
    forged = replace(ABOUT, mac="")
    rowstore.write(path, b"\1" * 32, forged, [Record("p", False, "what was never there", "flu")])
    body = path.read_bytes()[:-65]
    for mac in (rowstore.source_mac(key, body), rowstore.source_mac(key, body + b"\n")):
        path.write_bytes(body + mac.encode() + b"\n")
        with pytest.raises(RowsUnusable, match="were changed or cut short"):
            rowstore.read(path, key)


def test_rows_that_an_earlier_version_stored_are_imported_again(tmp_path: Path) -> None:
    site = imported(tmp_path, rows())
    before = rowstore.read(site.rows, site.open_ledger().mac_key)
    site.rows.write_bytes(site.rows.read_bytes().replace(b'"format": 3', b'"format": 1', 1))
    with pytest.raises(BadValue, match="or by an earlier version alone: `fedsynth site check"):
        check_rows(site)
    assert asked(site, Learn(0), scenario()) == Refused(ErrorCode.NOT_ALLOWED)
    assert told(site) == []
    check_rows(site)
    assert rowstore.read(site.rows, site.open_ledger().mac_key) == before


def test_an_import_that_fails_leaves_the_rows_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    rowstore.write(path, bytes(32), ABOUT, RECORDS)

    def full(*_: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no room"):
        rowstore.write(path, bytes(32), ABOUT, RECORDS[:1])
    assert rowstore.read(path, bytes(32)) == RECORDS
    assert len(list(tmp_path.iterdir())) == 1


def test_no_policy_gives_true_texts_to_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, toml = imported(tmp_path, rows()), scenario(guarantee="none")  # a site that allows everything
    asking = Synthesize(2, 1.0, 1.0, 8, 0)
    assert asked(site, asking, toml).statement.guarantee == "none"

    def never(*_: Any) -> None:
        raise AssertionError("private text was read")

    monkeypatch.setattr(Place, "open_rows", never)
    entries = site.open_ledger().entries()
    assert asked(site, replace(asking, true_texts=True), toml, 2) == Refused(ErrorCode.NOT_ALLOWED)
    assert site.open_ledger().entries() == entries
    assert asked(site, replace(asking, seed=1), toml, 3) == Refused(ErrorCode.FAILED)  # it would have been read


# --- What its operator is told, and the server not --------------------------------------------------------------------


def told(site: Place) -> list[str]:
    """Problems and warnings about data."""
    return [f.says for f in check(site) if f.what == "data" and f.state != "ok"]


@pytest.mark.parametrize("task", ["classification", "instructions"])
def test_the_operator_is_told_how_many_texts_are_long(tmp_path: Path, task: str) -> None:
    longer = ((b"note 1", b"note " + b"1" * 130), (b"note 2", b"note " + b"2" * 70))
    long = [row.replace(*longer[0]).replace(*longer[1]) for row in rows(task)]
    site = place(tmp_path, long, task)
    site = replace(site, site=replace(site.site, models=Models(generator=tiny.folder())))
    [said] = [f.says for f in check(site) if f.what == "lengths"]
    # A token per byte; two of the twelve lines are long, and tests are not counted (rows 10 and 11 hold "note 1", too).
    assert said.startswith("of 9 training texts, longer in tokens of the generator: 2 than 64, 1 than 128, 0 than 256")
    assert [f for f in check(place(tmp_path, long, task)) if f.what == "lengths"] == []  # no generator named


def test_requests_are_refused_on_a_declared_fact_until_rows_are_imported(tmp_path: Path) -> None:
    site = place(tmp_path, rows())
    site.open_ledger(create=True)  # as a site of an older version has it
    request = Learn(0)
    assert asked(site, request, scenario()) == Refused(ErrorCode.NOT_ALLOWED)
    with pytest.raises(BadValue, match="no rows have been imported as"):
        check_rows(site)
    write_node_keys(tmp_path / "keys" / "node", tmp_path / "north.pub")
    with pytest.raises(BadValue, match="no rows have been imported as"):
        start(site)
    key = site.open_ledger().mac_key
    [first, *_] = check(site)
    assert first.what == "site.toml"
    check_rows(site)
    assert site.open_ledger().mac_key == key
    assert type(asked(site, request, scenario())) is request.reply
    other = replace(site, site=replace(site.site, data=replace(site.site.data, text="note")))
    assert asked(other, Learn(1), scenario()) == Refused(ErrorCode.NOT_ALLOWED)  # rows of other columns are not these


def test_a_file_that_has_changed_is_told_to_the_operator_alone_and_requests_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, toml = imported(tmp_path, rows()), scenario()
    assert source_changed(site) == ""
    before = client(site, toml).train
    file = tmp_path / "notes.jsonl"
    os.utime(file)
    assert source_changed(site) == ""  # the same content
    file.write_bytes(file.read_bytes().replace(b"note 3", b"n\xffte 3"))
    assert "notes.jsonl has changed: requests go on with the rows as imported at 20" in source_changed(site)
    assert client(site, toml).train == before
    seen = []

    class Program:
        """Ends at the third look."""

        pid = returncode = 0

        def poll(self) -> int | None:
            seen.append(1)
            return 0 if len(seen) > 9 else None

    monkeypatch.setattr(site_watch, "READ_SECONDS", -1.0)
    monkeypatch.setattr(site_watch, "LOOK_SECONDS", 1e9)
    file.unlink()
    program: Any = Program()
    site_watch.watch(site, program, program, program, 1)
    assert capsys.readouterr().err == ""  # `site start` has said so
    assert "notes.jsonl cannot be read (No such file or directory)" in source_changed(site)
    assert type(asked(site, Learn(0), toml)) is Learn.reply
    [problem] = told(site)
    assert problem.startswith("nothing was imported: notes.jsonl: no such file in ")
    assert "; requests go on with the rows as imported at 20" in problem
    file.write_bytes(b"\n".join(rows()[1:]))
    assert "these are other rows than those imported before" in " ".join(told(site))
    assert len(client(site, toml).train) == len(before) - 1
    assert "these are other rows" not in " ".join(told(site))


def test_a_file_that_changes_while_a_site_runs_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, looks = imported(tmp_path, rows()), [0]

    class Program:
        pid = returncode = 0

        def poll(self) -> int | None:
            looks[0] += 1
            if looks[0] == 5:
                (tmp_path / "notes.jsonl").write_bytes(b"other")
            return 0 if looks[0] > 20 else None

    monkeypatch.setattr(site_watch, "READ_SECONDS", -1.0)
    monkeypatch.setattr(site_watch, "LOOK_SECONDS", 1e9)
    monkeypatch.setattr(site_watch.time, "sleep", lambda _: None)
    program: Any = Program()
    site_watch.watch(site, program, program, program, 1)
    assert capsys.readouterr().err.count("notes.jsonl has changed") == 1


def test_persons_of_several_spellings_are_not_imported_unless_a_key_merges_them(tmp_path: Path) -> None:
    content = rows()
    content[1] = content[1].replace(b'"p1"', b'"P0\\u200b"')
    site = place(tmp_path, content)
    assert "'P0\\u200b' and 'p0'; write each person one way, or say data.spellings" in told(site)[0]
    with pytest.raises(BadValue, match="no rows have been imported"):
        check_rows(site)
    data = replace(site.site.data, spellings="merge")
    site = replace(site, site=replace(site.site, data=data))
    assert "1 persons are written in several ways, and each counts as one (data.spellings)" in told(site)
    assert client(site, scenario()).train.units[:2] == ("p0", "p0")


def test_a_source_without_a_row_to_learn_from_is_a_problem_and_imported_all_the_same(tmp_path: Path) -> None:
    site = place(tmp_path, [b"nonsense"])
    assert told(site)[0].startswith(
        "no training row has 'text' and 'label' that can be read: requests are answered all"
    )
    check_rows(site)


def test_more_persons_than_declared_are_told_what_a_removal_costs(tmp_path: Path) -> None:
    site = imported(tmp_path, rows(), records=8)
    assert "only the first 8 take part. If one of them is taken out" in " ".join(told(site))
    assert "for one that another one replaces" not in " ".join(told(site))  # nothing was asked yet
    paid = plan(Budget(1.0), records=9, expected_batch=3, steps=2)  # as in the scenario above
    account = site.open_ledger()
    account.charge(paid, Binding("order", paid.digest(), "data", "model", "version"), "run")
    costs = composed_epsilon([paid], 1e-5), composed_epsilon([paid], 1e-5, relation="replace_one")
    assert 0.99 < costs[0] <= 1.0 < costs[1]
    assert (
        f"what this account has reserved: epsilon {costs[0]:.4g} for one that is emptied, {costs[1]:.4g} for one that "
        "another one replaces" in told(site)
    )
    assert "replaces" not in " ".join(told(place(tmp_path, rows(), records=9)))


# --- Folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_all_folders_of_a_site_are_its_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "site"
    place(folder, rows())
    before = os.umask(umask)
    try:
        for accounts in ("", str(tmp_path / "more" / "accounts")):
            site = place(folder, rows())
            site = replace(site, site=replace(site.site, accounts=accounts))
            list(import_rows(site))
            assert client(site, scenario()).train
    finally:
        os.umask(before)
    made = [
        each for each in (folder / "state", tmp_path / "more") for each in [each, *each.rglob("*")] if each.is_dir()
    ]
    assert {"runs", "accounts", "run", "main", "seed-0", "notes-1", "more"} <= {each.name for each in made}
    assert {each.stat().st_mode & 0o777 for each in made} == {0o700}


def test_folders_that_an_older_version_left_open_are_closed_and_told(tmp_path: Path) -> None:
    site = imported(tmp_path, rows())
    client(site, scenario())
    opened = [site.state / "runs", site.state / "runs" / "run", site.ledger.parent]
    for folder in opened:
        folder.chmod(0o755)
    assert "3 folders that others could read are closed to them now" in check_state(site)
    assert {folder.stat().st_mode & 0o777 for folder in opened} == {0o700}
    assert "closed" not in check_state(site)
    site.state.chmod(0o750)
    with pytest.raises(BadValue, match="can be read by others: chmod 700"):
        check_state(site)


def test_a_private_folder_leaves_those_above_that_were_there(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o755)
    private_folder(tmp_path / "shared" / "a" / "b")
    modes = [(tmp_path / "shared" / part).stat().st_mode & 0o777 for part in (".", "a", "a/b")]
    assert modes == [0o755, 0o700, 0o700]


def test_a_request_is_answered_without_the_source_and_leaves_it_alone(tmp_path: Path) -> None:
    site = imported(tmp_path, rows())
    (tmp_path / "notes.jsonl").unlink()
    assert type(asked(site, Learn(0), scenario())) is Learn.reply
    assert [entry["event"] for entry in entries(site.audit_log)] == ["asked", "stored", "answered"]

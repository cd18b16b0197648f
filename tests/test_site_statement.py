"""The page for a data officer: one site by hand, every number from policy, invitation or account, and no row read."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsynth.cli.main import app
from fedsynth.deployment.invitation import Invitation, Planned, invitation_toml
from fedsynth.deployment.policy import load_site
from fedsynth.deployment.site.init import init
from fedsynth.deployment.site.statement import statement
from fedsynth.privacy.audit import contents
from fedsynth.privacy.ledger import Binding
from fedsynth.privacy.plan import DPPlan
from fedsynth.typed import BadValue

DER = b"a certificate"
CA = f"-----BEGIN CERTIFICATE-----\n{base64.b64encode(DER).decode()}\n-----END CERTIFICATE-----\n"
FDKT = "fedsynth.strategies.fdkt:FDKT"
PLANNED = Planned("wards", "classification", ("heart", "skin"), (FDKT,), ("assets:tiny-slm",), "dp", 3, 1.5, 2e-6)
SITE = {
    "records = 0 ": "records = 420 ",
    "lifetime = { epsilon = 10.0, delta = 1e-5 }": "lifetime = { epsilon = 6.0, delta = 5e-6 }",
    "# per_run = { epsilon = 4.0, delta = 1e-5 }": "per_run = { epsilon = 2.0, delta = 3e-6 }",
    'outputs = ["text", "scores"]': 'outputs = ["text"]',
    "minimum_records = 100": "minimum_records = 150",
    '# contact = "..."': 'contact = "Ada, extension 12"',
}
FACTS = {420, 6, 5e-6, 2, 3e-6, 150, 3, 1.5, 2e-6, 9443, 12}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site that an invitation and a policy describe; there are no rows."""
    invitation = tmp_path / "invitation.toml"
    invitation.write_text(invitation_toml(Invitation("superlink.example.org:9443", CA, PLANNED)))
    init(tmp_path / "st-marys", name="st-marys", invitation=invitation)
    edit(tmp_path / "st-marys", SITE)
    return tmp_path / "st-marys"


def edit(folder: Path, changes: dict[str, str]) -> None:
    file = folder / "site.toml"
    text = file.read_text()
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    file.write_text(text)


def page(folder: Path) -> str:
    return statement(load_site(folder))


def numbers(text: str) -> set[float]:
    """All numbers of the page but those within words (st-marys-1) and the fingerprint."""
    text = re.sub(r"(?:[0-9A-F]{2}:){31}[0-9A-F]{2}", "", text)
    return {float(found) for found in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?:e-\d+)?(?![\w-])", text)}


def test_the_page_of_a_site_by_hand(folder: Path) -> None:
    text = page(folder)
    for line in (
        "# What leaves the site st-marys",
        "| the plan asks, for each of its arms | 1.5 | 2e-06 | the invitation |",
        "| one run with all its arms and seeds, at most | 2 | 3e-06 | policy.per_run |",
        "| all runs together, for ever, at most | 6 | 5e-06 | policy.lifetime |",
        "- 420 is a declared number of persons, and public. With fewer than 150 the site takes part in nothing",
        "- the column 'patient' tells whose row it is; all rows of a person are one unit",
        "- at this site: Ada, extension 12",
        "- the coordinator: whoever runs superlink.example.org:9443, and sent the invitation",
        "Only these methods may ask: fedsynth.strategies.fdkt:FDKT.",
    ):
        assert line in text.splitlines(), line
    assert "under differential privacy. A person of this site reads it first, and may refuse" in text
    assert "the coordinator plans 'wards' with 3 rounds" in text.lower()
    digest = hashlib.sha256(DER).hexdigest().upper()
    assert ":".join(re.findall("..", digest)) in text
    assert len(text.splitlines()) <= 60  # a page


def test_every_number_is_of_the_policy_the_invitation_or_follows_from_them(folder: Path) -> None:
    # One run: exp(2) * .01 + 3e-6 = 7.39 %, rounded up. All: 1 - exp(-6) * (1 - 5e-6 - .01) = 99.75 %.
    found = {math.ceil(1000 * (math.exp(2) * 0.01 + 3e-6)) / 10, 99.8}
    allowed = FACTS | found | {1, 100}  # "1 in 100", of the plain words
    assert numbers(page(folder)) == allowed
    assert found == {7.4, 99.8}


def test_a_number_that_changes_in_the_policy_changes_on_the_page(folder: Path) -> None:
    edit(folder, {"records = 420": "records = 977", "epsilon = 2.0": "epsilon = 1.25", "delta = 3e-6": "delta = 4e-6"})
    assert {977.0, 1.25, 4e-6} <= numbers(page(folder))
    assert not {420.0, 2.0, 3e-6} & numbers(page(folder))


def test_no_row_is_read_and_nothing_is_written(folder: Path) -> None:
    (folder / "notes.csv").mkdir()  # whoever opens it fails
    before = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert "No row of the data was read for this page." in page(folder)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == before


def test_what_was_spent_is_the_accounts(folder: Path) -> None:
    place = load_site(folder)
    plan = DPPlan(420, 42, 10, 2, 1.0, 4.0, 5e-6)
    ledger = place.open_ledger(create=True)
    ledger.charge(plan, Binding("an order", plan.digest(), "data", "model", "version"), run="a-run/main/0")
    account = contents(place.ledger)
    text = page(folder)
    assert f"| {math.ceil(1000 * account['epsilon']) / 1000:.3f} | 5e-06 | the account |" in text
    assert "So far: 1 run, 0 answers sent." in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"without_guarantee = false": "without_guarantee = true"},
            "**the policy lets outputs leave without any bound",
        ),
        (
            {"without_guarantee = false": "without_guarantee = true"},
            "**None of these figures holds once something has left without a bound, which the policy allows.**",
        ),
        ({'outputs = ["text"]': 'outputs = ["text", "metrics"]'}, "**no bound covers these figures**"),
        ({'outputs = ["text"]': 'outputs = ["adapter"]'}, "anyone who has it can write text with it"),
        ({'outputs = ["text"]': "outputs = []"}, "nothing that derives from private text"),
        ({'person = "patient" ': "independent_rows = true "}, "a person with several rows is protected less"),
        ({"per_run = {": "# per_run = {"}, "policy.lifetime, as no policy.per_run is set"),
        ({'contact = "Ada': '# contact = "Ada'}, 'write contact = "..." into site.toml'),
        ({"# identifiers = ": "identifiers = "}, "A text with one of these by its form stays here: e-mail address"),
    ],
)
def test_what_the_policy_opens_stands_on_the_page(folder: Path, changes: dict[str, str], said: str) -> None:
    assert said not in page(folder)
    edit(folder, changes)
    assert said in page(folder)


def test_without_the_invitation_the_page_says_that_the_plan_is_missing(folder: Path) -> None:
    (folder / "invitation.toml").unlink()
    text = page(folder)
    assert "the plan asks" not in text
    assert "the coordinator's invitation is not in this folder" in text


def test_a_plan_without_a_guarantee_is_said_to_be_refused(folder: Path) -> None:
    file = folder / "invitation.toml"
    file.write_text(file.read_text().replace('guarantee = "dp"', 'guarantee = "none"'))
    assert "an arm of the plan has no guarantee: this site refuses it" in page(folder)


def test_the_command_prints_the_page_alone(folder: Path) -> None:
    done = CliRunner().invoke(app, ["site", "check", str(folder), "--statement"])
    assert done.exit_code == 0, done.output
    assert done.stdout == page(folder)
    both = CliRunner().invoke(app, ["site", "check", str(folder), "--statement", "--json"])
    assert isinstance(both.exception, BadValue)
    assert json.dumps(str(both.exception)).startswith('"--statement prints a page')

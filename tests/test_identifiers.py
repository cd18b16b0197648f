"""Identifiers and secrets in released text: what is found, what is not taken for one, and what a policy keeps."""

from __future__ import annotations

import time

import numpy as np
import pytest
from attacks import ATTACKS
from typed_text import TYPED

from fedsynth.identifiers import KINDS, counts, kinds_in, told
from fedsynth.world import load_world, private_notes, private_records

# Numbers that states and standards publish as samples; keys are put together here, so that no file holds one.
FOUND = {
    "email": ["mail anna.b+x@example.org now", "<a_b@sub.example.co.uk>", "Mail: m\u00fcller@beispiel.example.",
              "a\u200b@example.org"],
    "phone": ["call +49 30 1234567", "+1 (212) 555-0123", "0044 20 7946 0958", "tel. 030 / 90 12 34 56",
              "(030) 1234567", "(212) 555-0123", "212-555-0123", "ring 01632 960 983"],
    "iban": ["DE89 3704 0044 0532 0130 00", "to GB82WEST12345698765432 please", "CH93 0076 2011 6238 5295 7, thanks",
             "FR1420041010050500013M02606"],
    "card": ["4111 1111 1111 1111", "card 5555-5555-5555-4444.", "378282246310005", "6011000990139424"],
    "national_id": ["AHV 756.9217.0769.85", "tax 86095742719", "tax 47 036 892 816", "DNI 12345678Z", "NIE X1234567L",
                    "2 55 08 14 168 025 38", "RSSMRA85T10A562S", "BSN: 111222333", "811218-9876", "131052-308T",
                    "44051401359", "85.07.30-033 28", "NHS 943 476 5919", "529.982.247-25", "11010519491231002X",
                    "SSN 078-05-1120"],
    "secret": ["AKIA" + "IOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "sk-" + "proj-" + "Ab3" * 10,
               "xoxb-" + "123456789012-abc", "password: Winter2024!", "api_key = 9f8e7d6c5b",
               "-----BEGIN " + "RSA PRIVATE KEY-----",
               "eyJ" + "hbGciOiJIUzI1NiJ9." + "eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N"],
    "url": ["see https://example.org/a?b=c.", "www.example.org", "FTP://files.example.org/x"],
    "ip": ["from 192.168.10.254 at night", "host 2001:db8:0:0:1::1", "fe80::1:2:3"],
}  # fmt: skip
NONE = [
    "Blood pressure 120/80, pulse 72, temperature 38.5 at 12:30:45 on 2024-05-12.",
    "Seen 03-04-2023 and 3/4/23; ICD S83.2, J18.9.", "Dose 1,500 mg, 3 x 500 mg, 0.5 ml; HbA1c 7.2 %.",
    "Version 1.2.3.4.5 of the form, room 12.4.1.", "2024 05 12 10 20", "@anna wrote to us @ noon, a@b",
    "Password reset did not work; the secret: patience.", "Ref 1234567890, order 4111 1111 1111 1112",
    "to GB82WEST12345698765433", "AHV 756.9217.0769.84", "12345678A", "078-00-1120", "943 476 5918",
    "http is slow, see www", "SPO2 98 RR 16 HR 110", "Ward 12::30", "999.999.999.999", "0.5-1.0 mg",
    "20-30 10-20 cm", "A1B2C3 and 100 200 300", "transfer 1.234.567,89 EUR by 01.02.2023",
    "I paid 0,99 and then 12 345 678", "case 17-2023-0042", "00:15 to 00:45",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_an_identifier_is_found_as_what_it_is(kind: str, text: str) -> None:
    assert kinds_in(text) == {kind}
    assert kinds_in(f"The patient said: {text}, and left.") == {kind}


@pytest.mark.parametrize("text", NONE)
def test_what_only_looks_like_one_is_none(text: str) -> None:
    assert kinds_in(text) == frozenset()


def test_every_kind_has_samples() -> None:
    assert set(FOUND) == set(KINDS)


def test_texts_are_counted_once_per_kind() -> None:
    texts = ["a@example.org b@example.org", "a@example.org, www.example.org", "nothing"]
    assert counts(texts) == {"email": 2, "url": 1}
    assert told(counts(texts)) == "2 with an e-mail address, 1 with a web address"
    assert told({}) == "none"


def test_one_in_a_thousand_texts_of_the_simulated_hospitals_at_most_is_taken_for_one() -> None:
    world = load_world("hospitals")
    texts = [text for client in range(10) for text in private_notes(world, client, 200, 0, split="train").prompts]
    records = [
        text
        for client in range(4)
        for c in [private_records(world, client, 100, 0, split="train")]
        for text in (*c.prompts, *c.answers)
    ]
    assert len(texts) == 2000
    assert sum(counts(texts).values()) <= 2
    assert sum(counts(records).values()) <= 1
    # Planted, each is found: the search looked at these texts.
    assert counts([f"{text} Mail a@example.org." for text in texts]) == {"email": 2000}


def test_of_plain_numbers_few_are_taken_for_persons() -> None:
    rng = np.random.default_rng(0)
    # One in a hundred begins with 00, and may be dialled.
    for digits, most in ((8, 0.02), (9, 0.02), (10, 0.02), (11, 0.13), (12, 0.02), (16, 0.08)):
        texts = ["no. " + "".join(map(str, rng.integers(0, 10, digits))) for _ in range(500)]
        assert sum(bool(kinds_in(text)) for text in texts) / 500 <= most


def test_what_people_type_has_no_secret() -> None:
    assert counts(TYPED).get("secret", 0) == 0


LONG = ("a", "1 ", "a@", "+1", "A1", "1:", "eyJ", "www.", "0 ", "password=", "1.", "(0")


@pytest.mark.parametrize("text", [*ATTACKS.values(), *(each * (20_000 // len(each)) for each in LONG)])
def test_a_text_of_any_form_is_searched_in_no_time(text: str) -> None:
    begun = time.process_time()
    kinds_in(text)
    assert time.process_time() - begun < 1

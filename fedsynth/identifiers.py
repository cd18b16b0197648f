"""Identifiers and secrets in released text by public rules: what has the form, and the check digits, of one."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias, get_args

from fedsynth.corpus import seen
from fedsynth.national_ids import holds_national_id, luhn

Kind: TypeAlias = Literal["email", "phone", "iban", "card", "national_id", "secret", "url", "ip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES: Mapping[Kind, str] = {
    "email": "e-mail address",
    "phone": "phone number",
    "iban": "bank account (IBAN)",
    "card": "payment card",
    "national_id": "national number",
    "secret": "key or password",
    "url": "web address",
    "ip": "IP address",
}

# Every repetition has an end, so that a text of any form is read in a time that grows with its length alone.
EMAIL = re.compile(r"(?<![\w.+-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,4}[^\W\d_]{2,24}(?!\w)")
URL = re.compile(r"(?i:\b(?:https?|ftp)://[^\s<>\"']{3,2000}|\bwww\.[\w-]{1,63}(?:\.[\w-]{1,63}){1,4})")
IPV4 = re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.]*\w)")
IPV6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f:]{0,38}:)[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:]{4,34}(?![\w:])")
IBAN = re.compile(r"(?<![A-Za-z0-9])(?P<state>[A-Z]{2})\d\d(?: ?[A-Z0-9]){11,30}")
CARD = re.compile(r"(?<![\w.,+-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w]|[.,-]\d)")
PHONE = re.compile(
    r"""
      (?<![\w+./-])(?:\+|00)[1-9]\d{0,2}(?:[ ./-]{0,2}\(?\d{1,5}\)?){2,6}       # of another country
    | (?<![\w+.,/-])(?:\(0\d{1,5}\)|0\d{1,5})[ /-]{1,3}\d{2,9}(?:[ -]\d{2,5}){0,4}   # with an area's code
    | (?<![\w+.,/-])(?:\([2-9]\d\d\)[ ]?|[2-9]\d\d[.-])[2-9]\d\d[ .-]\d{4}         # North America
    """,
    re.VERBOSE,
)
DATE = re.compile(r"\d{1,4}[-/. ]{1,2}\d{1,2}[-/. ]{1,2}\d{1,4}(?: \d{1,2})?")
SECRET = re.compile(
    r"""
      \b(?:AKIA|ASIA)[0-9A-Z]{16}\b | \bAIza[\w-]{35} | \bgh[pousr]_[A-Za-z0-9]{36,255}\b | \bgithub_pat_\w{22,255}\b
    | \bxox[abeoprs]-[\w-]{10,255} | \b[sr]k_(?:live|test)_\w{16,255}\b | \bsk-[\w-]{20,255}
    | \bhf_[A-Za-z0-9]{30,255}\b | \bglpat-[\w-]{20,255} | \beyJ[\w-]{8,2000}\.eyJ[\w-]{8,2000}\.[\w-]{8,2000}
    | -----BEGIN[ A-Z]{0,40}\ PRIVATE\ KEY-----
    | (?i:\b(?:password|passwort|passwd|pwd|api[ _-]?key|secret|access[ _-]?token))\s{0,3}[:=]\s{0,3}
      (?=[^\s,;]{0,64}\d)(?=[^\s,;]{0,64}[A-Za-z])[^\s,;]{6,64}
    """,
    re.VERBOSE,
)
# Letters of a state and the length of its accounts (the registry of ISO 13616).
_ACCOUNTS = """
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18
    FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20
    LU20 LV21 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19
    SK24 SM27 TN24 TR26 UA29 VA22 VG24 XK20
"""
LENGTHS = {code[:2]: int(code[2:]) for code in _ACCOUNTS.split()}


def kinds_in(text: str) -> frozenset[Kind]:
    """The kinds of identifiers that a text has. Signs without a glyph hide none.

    >>> sorted(kinds_in("Write to anna@example.org, or call +49 30 1234567."))
    ['email', 'phone']
    >>> kinds_in("Blood pressure 120/80 on 2024-05-12, ward 3.")
    frozenset()
    """
    text = seen(text)
    found: set[Kind] = set()
    spans = [(kind, span) for kind, own in _found(text).items() for span in own]
    # A number in an address or a longer number is part of it.
    for kind, (start, end) in spans:
        if not any(a <= start and end <= b and b - a > end - start for _, (a, b) in spans):
            found.add(kind)
    return frozenset(found)


def counts(texts: Iterable[str]) -> dict[Kind, int]:
    """How many texts have identifiers of each kind; kinds that none has are left out."""
    found = Counter(kind for text in texts for kind in kinds_in(text))
    return {kind: found[kind] for kind in KINDS if found[kind]}


def told(found: Mapping[Kind, int]) -> str:
    """Counts in words.

    >>> told({"email": 2, "url": 1})
    '2 with an e-mail address, 1 with a web address'
    """
    return ", ".join(f"{found[kind]} with {_article(NAMES[kind])}" for kind in KINDS if found.get(kind)) or "none"


def _article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aei' else 'a'} {name}"


def _found(text: str) -> dict[Kind, list[tuple[int, int]]]:
    spans: dict[Kind, list[tuple[int, int]]] = {}
    if "@" in text:
        spans["email"] = [m.span() for m in EMAIL.finditer(text)]
    spans["url"] = [m.span() for m in URL.finditer(text)]
    spans["secret"] = [m.span() for m in SECRET.finditer(text)]
    if not any(map(str.isdigit, text)):
        return spans
    spans["ip"] = [m.span() for m in IPV4.finditer(text)] + [m.span() for m in IPV6.finditer(text) if _ipv6(m[0])]
    spans["iban"] = [(m.start(), end) for m in IBAN.finditer(text) if (end := _iban_end(m))]
    spans["card"] = [m.span() for m in CARD.finditer(text) if _card(m[0])]
    spans["national_id"] = holds_national_id(text)
    spans["phone"] = [m.span() for m in PHONE.finditer(text) if _phone(m[0])]
    return spans


def _iban_end(match: re.Match[str]) -> int:
    """Where the account ends; 0 if it is none."""
    length, seen = LENGTHS.get(match["state"], 0), 0
    for place, char in enumerate(match[0]):
        seen += char != " "
        if length and seen == length:
            account = match[0][: place + 1].replace(" ", "")
            number = "".join(str(int(c, 36)) for c in account[4:] + account[:4])
            return match.start() + place + 1 if int(number) % 97 == 1 else 0
    return 0


def _card(written: str) -> bool:
    digits = re.sub(r"\D", "", written)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


def _phone(written: str) -> bool:
    digits = len(re.sub(r"\D", "", written))
    return 7 <= digits <= 15 and not DATE.fullmatch(written.strip())


def _ipv6(written: str) -> bool:
    if written.count(":") < 3:  # "12::30" of a table, "a::b" of a program
        return False
    try:
        ipaddress.IPv6Address(written)
    except ValueError:
        return False
    return True

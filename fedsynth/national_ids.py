"""Numbers of persons that states issue, told from other numbers by their check digits."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date


def luhn(digits: str) -> bool:
    """True if the last digit is the check digit of the others (ISO/IEC 7812), as on payment cards."""
    doubled = [int(d) * (1 + place % 2) for place, d in enumerate(reversed(digits))]
    return sum(n - 9 * (n > 9) for n in doubled) % 10 == 0


def holds_national_id(text: str) -> list[tuple[int, int]]:
    """Where a text has a national number with right check digits: start and end of each."""
    return [
        match.span()
        for pattern, right in RULES
        for match in pattern.finditer(text)
        if right(re.sub(r"[^0-9A-Za-z+]", "", match[0]).upper())
    ]


def _weighted(digits: str, weights: Sequence[int]) -> int:
    return sum(int(d) * w for d, w in zip(digits, weights, strict=False))


def _day(year: str, month: str, day: str) -> bool:
    try:
        date(2000 + int(year), int(month), int(day))  # a leap year, as the century is not known
    except ValueError:
        return False
    return True


def _switzerland(number: str) -> bool:
    return (10 - _weighted(number[:12], (1, 3) * 6)) % 10 == int(number[12])


def _germany(number: str) -> bool:
    """Tax number: ISO 7064, mod 11, 10; of the first ten digits one occurs twice or thrice, and not ten differ."""
    if len(set(number[:10])) not in (8, 9):
        return False
    rest = 10
    for digit in number[:10]:
        rest = ((rest + int(digit)) % 10 or 10) * 2 % 11
    return (11 - rest) % 10 == int(number[10])


def _spain(number: str) -> bool:
    digits = number[:-1].translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(digits) % 23] == number[-1]


def _france(number: str) -> bool:
    body = number[:13].replace("2A", "19").replace("2B", "18")
    return 97 - int(body) % 97 == int(number[13:])


_ODD = dict(zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", (
    1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22,
    25, 24, 23), strict=True))  # fmt: skip


def _italy(number: str) -> bool:
    odd = sum(_ODD[c] for c in number[:15:2])
    even = sum(int(c) if c.isdigit() else ord(c) - 65 for c in number[1:15:2])
    return chr(65 + (odd + even) % 26) == number[15]


def _netherlands(number: str) -> bool:
    return len(set(number)) > 2 and _weighted(number, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0


def _sweden(number: str) -> bool:
    digits = number.replace("+", "")[-10:]
    return _day(digits[:2], digits[2:4], digits[4:6]) and luhn(digits)


def _finland(number: str) -> bool:
    digits = re.sub(r"[+A]", "", number[:7]) + number[7:] if not number[6].isdigit() else number
    return (
        _day(digits[4:6], digits[2:4], digits[:2])
        and "0123456789ABCDEFHJKLMNPRSTUVWXY"[int(digits[:9]) % 31] == number[-1]
    )


def _poland(number: str) -> bool:
    month = str(int(number[2:4]) % 20)
    return _day(number[:2], month, number[4:6]) and _weighted(number, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)) % 10 == 0


def _belgium(number: str) -> bool:
    check = int(number[9:])
    born = _day(number[:2], number[2:4], number[4:6])
    return born and check in (97 - int(number[:9]) % 97, 97 - int(f"2{number[:9]}") % 97)


def _britain(number: str) -> bool:
    check = 11 - _weighted(number[:9], range(10, 1, -1)) % 11
    return check % 11 == int(number[9]) and check != 10


def _brazil(number: str) -> bool:
    first, second = (_weighted(number[:n], range(n + 1, 1, -1)) * 10 % 11 % 10 for n in (9, 10))
    return len(set(number)) > 1 and number[9:] == f"{first}{second}"


def _china(number: str) -> bool:
    weights = [2 ** (17 - place) % 11 for place in range(17)]
    return "10X98765432"[_weighted(number[:17], weights) % 11] == number[17]


def _states(number: str) -> bool:
    """No check digit, but a form of its own, and numbers that are never issued."""
    return number[:3] not in ("000", "666") and number[0] != "9" and number[3:5] != "00" and number[5:] != "0000"


def _rule(pattern: str, right: Callable[[str], bool]) -> tuple[re.Pattern[str], Callable[[str], bool]]:
    return re.compile(rf"(?<![\w.,+-])(?:{pattern})(?![\w+]|[.,-]\w)"), right


# A plain number of nine or ten digits needs the marks of its form, or its name before it: of a thousand such numbers
# one check digit alone would take a hundred for persons.
RULES: tuple[tuple[re.Pattern[str], Callable[[str], bool]], ...] = (
    _rule(r"756\.\d{4}\.\d{4}\.\d{2}|756\d{10}", _switzerland),
    _rule(r"[1-9]\d{10}|[1-9]\d \d{3} \d{3} \d{3}", _germany),
    _rule(r"\d{8}-?[A-Z]|[XYZ]-?\d{7}-?[A-Z]", _spain),
    _rule(r"[1-478] ?\d\d ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d", _france),
    _rule(r"[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]", _italy),
    _rule(r"\d{4}\.\d{2}\.\d{3}", _netherlands),
    (re.compile(r"(?i:\bBSN|burgerservicenummer)[\s:#]{1,4}\d{9}\b"), lambda text: _netherlands(text[-9:])),
    _rule(r"(?:\d\d)?\d{6}[-+]\d{4}", _sweden),
    _rule(r"\d{6}[-+A]\d{3}[0-9A-FHJ-NPR-Y]", _finland),
    _rule(r"\d{11}", _poland),
    _rule(r"\d\d\.\d\d\.\d\d-\d{3}[. ]\d\d", _belgium),
    _rule(r"\d{3} \d{3} \d{4}", _britain),
    _rule(r"\d{3}\.\d{3}\.\d{3}-\d\d", _brazil),
    _rule(r"[1-9]\d{5}(?:19|20)\d{9}[0-9Xx]", _china),
    _rule(r"\d{3}-\d{2}-\d{4}", _states),
)

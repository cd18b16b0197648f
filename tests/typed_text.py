# ruff: noqa: RUF001 - letters that look alike are those of other scripts
"""Texts as people type them: scripts, shapes and signs that tests of every step of the text's way share."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

SHARED = Path(__file__).parents[2] / "shared"  # beside a checkout, where there is one; nothing of it is needed

CONTROL = ("</s>", "<pad>", "<|endoftext|>", "[SEP]", "<|im_end|>", "<s>", "<bos>", "<eos>", "[CLS]", "[MASK]", "[PAD]",
           "<unk>", "[UNK]")  # fmt: skip

# Some with the label under which they are filed, where a heading or a number spells it.
LINES = (
    "您好，我想查询昨天的转账为什么还没有到账。",
    "お世話になっております。振込の状況を教えてください。",
    "เมื่อวานฉันโอนเงินแต่ปลายทางยังไม่ได้รับ",
    "لم يصل التحويل الذي أرسلته أمس، أرجو المساعدة.",
    "שלום, הכרטיס שלי נחסם \u200fאתמול\u200e בערב.",
    "मेरा कार्ड कल से काम नहीं कर रहा है।",
    "어제 보낸 송금이 아직 도착하지 않았습니다.",
    "Η κάρτα μου δεν λειτουργεί από χθες.",
    "Мой перевод до сих пор не пришёл.",
    "Größere Überweisung an „Müller & Söhne“: 1.250,00 € – seit Montag offen.",
    "Plan: continue metformin, review in 2 weeks",
    "pain since 3:45, worse at 5:10; see at 1: then 2:",
    "BP 150/90 => amlodipine 5 mg 1-0-0, K+ 4.1, CRP < 5 mg/l, x != y",
    "mail <anna.b@clinic.example> or https://clinic.example/a?b=c&d=%20e",
    "question: where is it? answer: at the desk",
    "the form says </s> and <pad>, the field [SEP], and <|endoftext|> at its end",
    "C:\\new\\notes and 100 % \\n as typed, \u240a too, \u241b as well",
    "👍",
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f sent from Glasgow",
    "?!",
    "a\ttab\tseparated\tline",
    "zero\u200bwidth and soft\u00adhyphen, e\u0301 decomposed",
)
SHAPED = (
    "Dear team,\n\nI write about order 7.\nIt has been open for 3 days.\n\nRegards,\nA. B.",
    "- milk\n- bread\n  * rye\n  * wheat\n\u2022 eggs",
    "1. fever\n2. cough\n3) rash\n4: none",
    "Subjective: tired\nObjective: T 37.9\nPlan: continue\nplan: and again",
    "Plan: one visit\nAllergies: none\nPlan: another visit",
    "> quoted line\r\n> another\r\n\r\nanswer below\r\n-- \r\nsignature",
    "question: what now?\nanswer: wait\n\nquestion: how long?\n answer: a day",
    "first page\fsecond page\vthird\u2028fourth\u2029fifth",
    "第一行\n第二行\n\n第四行",
    "From: a@b.example\nTo: c@d.example\nSubject: Plan: B\n\nfine\n-----Original Message-----\n-----\nText: old",
)
TYPED = (*LINES, *SHAPED)
LABELS = ("Plan", "plan", "Allergies", "question", "1", "2", "3", "4", "Text", "Subject", "转账")


def cases() -> dict[str, tuple[list[str], list[str]]]:
    """By file of ../shared/cases that holds labelled texts its texts and labels; none where it lacks."""
    found = {}
    for name in ("chinese", "sections", "multiline", "plain", "units", "nfd"):
        if (path := SHARED / "cases" / f"{name}.csv").is_file():
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
            found[name] = (table["text"].tolist(), table["label"].tolist())
    return found


def faq() -> list[tuple[str, str]]:
    """Instructions and responses of ../shared/cases/faq.jsonl; none where it lacks."""
    path = SHARED / "cases" / "faq.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [(row["text"], row["response"]) for row in map(json.loads, rows)]

"""Detection of code, JSON and markup in place of sentences."""

from __future__ import annotations

import json
import re

LOOKED_AT = 10_000  # characters of a text

# Both expressions read the result of `_compact`, in which a run of white space has one character. Their time grows with
# the square of a run's length, and with the cube for blank lines.

# Signs that hardly any sentence, list, address or laboratory value holds: one of them is enough.
CERTAIN = re.compile(
    r"""
      ```
    | <([A-Za-z][\w:-]*)\b[^<>\n]{0,200}>[^<]{0,2000}</\1\s*>             # an element; <anna@clinic.org> is none
    | <!-- | <!DOCTYPE\b | <\?(?:xml|php)\b
    | <[A-Za-z][\w:-]*(?:\s+[\w:-]+=["'][^"'>]*["'])+\s*/?> | <[A-Za-z][\w:-]*\s*/>
    | <(?:html|head|body|div|span|br|hr|ul|ol|li|table|tr|td|p)>
    | ^[ ]?\|?(?:[ ]?:?-{3,}:?[ ]?\|)+(?:[ ]?:?-{3,}:?)?$                # the rule of a table
    | \[[^\]\n]{1,200}\]\([^)\s]{1,500}\)                                # a link
    | ^\#{2,6}[ ]\S                                                      # a heading; "# 1" may count something
    | \\(?:begin|end|documentclass|usepackage|frac|section|textbf|textit)\s*[{\[]
    | ^\#!\s*/ | ^\s*\#\s*(?:include|define|ifdef|pragma)\b
    | ^\s*(?:async\s+)?def\s\w+\s*\([^)]{0,500}\)[^:\n]{0,100}:
    | ^\s*class\s\w+(?:\([\w., ]*\))?:\s*$
    | ^\s*(?:(?:public|private|abstract|export|final)\s+)*(?:class|interface|struct|enum)\s\w+[^\n{]{0,200}\{
    | ^\s*from\s[\w.]+\simport\s\w | ^\s*(?:import|using|package)\s[\w.:*]+\s*;
    | \bfunction\s*\w*\s*\([^)]{0,500}\)\s*\{ | \)\s*=>\s*[{(\w]
    | \b(?:if|for|foreach|while|switch|catch)\s*\([^\n]{0,300}\)\s*\{ | \}\s*else\b
    | ^\s*(?:export\s+)?(?:let|var|const)\s+[\w${}\[\], ]{1,100}(?::\s*\w+\s*)?=
    | ^\s*(?:public|private|protected|static)\s+(?:(?:static|final)\s+)*[\w<>\[\]]+\s\w+(?:\(|\s*=)
    | \b(?:console\.\w+|System\.out\.\w+|f?printf|document\.\w+)\s*\( | \bstd::\w
    | \bSELECT\b[^;]{1,500}\bFROM\b | \bINSERT\sINTO\b | \bUPDATE\s\w+\sSET\b
    | \b(?:CREATE|ALTER|DROP)\s(?:TABLE|INDEX|VIEW)\b
    | ^\s*[.\#@]?[\w-][\w .,\#>:-]{0,100}\{\s*(?:[\w-]+\s*:[^;{}\n]{1,200};|$)    # a rule of a style sheet
    | ^\s*\$\s+[a-z]\w* | ^\s*sudo\s\w
    | ^\s*[{}]\s*[;,]?\s*$
    | \{\s*"[^"\n]{1,60}"\s*:                                            # keys and their values
    | "[^"\n]{1,60}"\s*:\s*(?:"[^"\n]{0,200}"|[\d.-]+|true|false|null)\s*,\s*"[^"\n]{1,60}"\s*:
    """,
    re.MULTILINE | re.VERBOSE,
)
# Signs that a sentence may hold once.
LIKELY = re.compile(
    r"""
      ^[^\n]*[)\]"'+]\s*;\s*$                                            # a statement; a list's points end in words
    | \b[A-Za-z_]\w*\.[a-z_]\w*\(
    | \b(?:print|len|range|assert|lambda)\s*\(
    | ^\s*(?:int|float|double|char|bool|boolean|String|auto|void)\s+\w+\s*[=;(]
    | ^\s*(?:elif|if|while)\b(?=[^\n]*:$)[^\n]*(?:[<>=]|\bnot\b|\bis\b)[^\n]* | ^\s*for\s\w+\sin\s[^\n]*:\s*$
    | ^\s*(?:else|try|except(?:\s\w+)?|finally):\s*$
    | [\w)\]]\s*(?:==|!=|&&|\|\||\+=|-=|::)\s*[\w("'\[]
    | ^\s*[A-Za-z_][\w.\[\]]*\s*=\s*(?:[A-Za-z_]\w*(?:\(|\[|\.\w)|["'\[{])
    | ^\s*import\s[\w.]+(?:\sas\s\w+)?\s*$ | ^\s*return\b[^\n]*[;)\]]\s*$
    """,
    re.MULTILINE | re.VERBOSE,
)


def code_or_markup(text: str) -> bool:
    """True if the form of a text is that of code, JSON or markup instead of sentences.

    The rule is public and lets sentences through, with addresses, laboratory values, comparisons, lists, headings with
    colons and arrows between words. It misses fragments without a typical sign.
    """
    text = text[:LOOKED_AT]
    if text.lstrip()[:1] in ("{", "[") and _is_json(text):
        return True
    text = _compact(text)
    return CERTAIN.search(text) is not None or len(LIKELY.findall(text)) > 1


def _compact(text: str) -> str:
    """A text without blank lines and invisible ends of lines; other runs of white space become one blank."""
    lines = (f"{' ' if line[0].isspace() else ''}{' '.join(line.split())}" for line in text.split("\n") if line.strip())
    return "\n".join(lines)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True

"""Parse label strings: by the metric's rule (`strict`), and by a forgiving one for a model's answers (`tolerant`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

PARSERS = ("strict", "tolerant")

LabelText = str | Sequence[str] | float | None  # a label string, a list of labels, or a missing value

MARK = "\0"  # precedes each text of a batch; no label contains it

# --- tolerant: the tokens of an answer ----------------------------------------------------------------------------

_SEPARATORS = '\n\r\v\f,;.!?|/\\&+()[]{}<>"`*_~#='
_WIDE_SEPARATORS = "\u2028\u2029“”„«»•·▪◦●‣…、，；。！？／｜（）【】《》「」『』—–"
_BLANKS = "\t \x1c\x1d\x1e\x1f"
_WIDE_BLANKS = "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_NARROW = (
    dict.fromkeys(_WIDE_SEPARATORS, ",") | dict.fromkeys(_WIDE_BLANKS, " ") | dict.fromkeys("’ʼ‘", "'") | {"：": ":"}
)
_WIDE = re.compile(f"[{''.join(_NARROW)}]")
_LOWER = bytes(range(256)).lower()
_TOLERANT = _LOWER.translate(
    bytes.maketrans((_SEPARATORS + _BLANKS).encode(), b"," * len(_SEPARATORS) + b" " * len(_BLANKS))
)
_STRICT = _LOWER.translate(bytes.maketrans(b"'\"", b",,"))
_TAG = re.compile(r"</?\w+>")
# "Emotions:", "Final answer:" and the like before a list.
_HEADING = re.compile(r"emotion|feeling|mood|label|answer|output|state|result|情绪|情感|标签|答案")
# Words that introduce a label in a sentence: all up to the last of them is dropped ("he seems to be sad" → "sad").
_VERBS = (
    "is|are|was|were|am|be|been|being|i'm|it's|he's|she's|they're|feel|feels|felt|feeling|seem|seems|seemed|appear|appears|"
    "appeared|look|looks|looked|sound|sounds|sounded|show|shows|showing|express|expresses|expressing|include|includes|"
    "including|as|with"
)
# Articles, degrees and joining words before a label.
_FILLERS = (
    "a|an|the|and|or|but|also|both|then|very|quite|rather|somewhat|slightly|slight|so|too|extremely|really|deeply|mildly|"
    "highly|possibly|probably|likely|perhaps|maybe|his|her|their|some|etc"
)
_EMPTY = {"", *_VERBS.split("|"), *_FILLERS.split("|")}
_LEAD = re.compile(
    rf".*(?<![\w'-])(?:{_VERBS}|sense of)(?: (?:to|like))?(?= |$)(?! (?:for|forward|after|up|down|off)\b)"
)
_FILLER = re.compile(rf"(?:(?:a bit|a little|{_FILLERS})(?: |$))+")
_REASON = re.compile(r" (?:because|since|due to|when|while|after)(?: .*)?$")


def parse_labels(text: LabelText, parser: str = "strict") -> list[str]:
    """Parse the labels of one text, in order, with duplicates.

    ``strict`` is the metric's rule: one leading ``[`` and one trailing ``]`` are dropped, and only quotes and commas
    separate; case is kept (look-ups ignore it). A lone ``[``, on which the published code raises IndexError, gives no
    label.
    ``tolerant`` reads answers of models: new lines, semicolons, full stops, slashes, bullets, "and" and Chinese
    punctuation separate too; tags, headings, a leading sentence and words of degree are dropped; all is lower case. Its
    labels, joined by ", ", parse to the same labels again.
    A list is taken unchanged by ``strict``; None and NaN have no labels.
    """
    if parser not in PARSERS:
        raise ValueError(f"parser {parser!r}: choose one of {', '.join(PARSERS)}")
    if not isinstance(text, str):
        if text is None or isinstance(text, float):
            return []
        labels = [str(label) for label in text]
        return labels if parser == "strict" else parse_labels(", ".join(labels), parser)
    if parser == "tolerant":
        return [label for label in map(clean_token, _separate(text).split(",")) if label]
    text = text.removeprefix("[").removesuffix("]")
    return [token for token in map(str.strip, text.replace("'", ",").replace('"', ",").split(",")) if token]


def distinct_labels(text: LabelText, parser: str = "tolerant") -> list[str]:
    """Parse the labels of one text, each once, in order of first appearance: what to show and to write of an answer."""
    return list(dict.fromkeys(parse_labels(text, parser)))


def split_batch(texts: Sequence[str], parser: str) -> list[str]:
    """Split many texts into one list of raw tokens, with `MARK` before each text and at the end.

    It works on the whole buffer at once. Tokens are lower case and not yet cleaned: `str.strip` (strict) or
    `clean_token` (tolerant) turns one into a label, "" if it holds none. Empty tokens may occur anywhere.
    """
    between = ",\0,"
    joined = between + between.join(texts) + between
    if joined.count("\0") != len(texts) + 1:
        return split_batch([text.replace("\0", "\ufffd") for text in texts], parser)
    if parser == "tolerant":
        return _separate(joined).split(",")
    joined = joined if joined.isascii() else joined.lower()
    # of equal length, which is fastest: the brackets that open and close a text become empty tokens
    buffer = joined.encode("utf-8", "surrogatepass").replace(b"\0,[", b"\0,,").replace(b"],\0", b",,\0")
    # the usual separators first and as a whole, so that few tokens are empty or need stripping
    return (
        buffer.replace(b"', '", b",")
        .translate(_STRICT)
        .replace(b", ", b",")
        .decode("utf-8", "surrogatepass")
        .split(",")
    )


def clean_token(token: str) -> str:
    """Extract the label of one raw token of a tolerant split; "" if there is none."""
    if token.endswith(":"):
        if _HEADING.search(token):
            return ""
        token = token.rstrip(": ")
    before = None
    while token != before:  # each rule may expose text for another
        before = token = token.strip(" '-")
        if " " in token:
            for rule in (_LEAD, _FILLER):
                if match := rule.match(token):
                    token = token[match.end() :]
            token = _REASON.sub("", token)
    return token if token not in _EMPTY and any(map(str.isalpha, token)) else ""


def _separate(text: str) -> str:
    """Lower-case a text, replacing every separator of the tolerant parser by a comma, and runs of blanks by one."""
    if "<" in text:
        text = _TAG.sub(",", text)
    if not text.isascii():
        text = _WIDE.sub(lambda match: _NARROW[match[0]], text.lower())
    buffer = text.encode("utf-8", "surrogatepass").translate(_TOLERANT)
    while b"  " in buffer:
        buffer = buffer.replace(b"  ", b" ")
    # the colon stays with the heading that it ends; apostrophes at a word's edge are quotation marks
    for mark in (b" and ", b" or ", b" - ", b"' ", b" '", b"',", b",'"):
        buffer = buffer.replace(mark, b",")
    return buffer.replace(b":", b":,").replace(b", ", b",").decode("utf-8", "surrogatepass")


def as_text(text: LabelText, parser: str) -> str:
    """Write a list or missing value as a string that parses to the same labels."""
    if isinstance(text, str):
        return text
    labels: Iterable[str] = parse_labels(text, parser)
    if parser == "strict":  # quotes and commas inside a listed label do not separate; such a label is on no wheel
        labels = (re.sub("[,'\"\\[\\]]", "\ufffd", label) for label in labels)
    return ",".join(labels)

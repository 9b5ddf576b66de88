"""Build the project's tables from the wheels, the authored lexicon, and WordNet's synonyms and derivations."""

from __future__ import annotations

import io
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from affectgpt.emotion_wheel.tables import Tables, TablesError, Wheel, compile_tables

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import Lemma, Synset, WordNetCorpusReader

DATA = Path(__file__).parent / "data"

# WordNet's lexicographer files in their numbered order; Debian's wordnet-base leaves this list out.
LEXNAMES = """
adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition
noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person
noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state noun.substance
noun.time verb.body verb.change verb.cognition verb.communication verb.competition verb.consumption verb.contact
verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl
"""

# Lexicographer files of words that name feelings. A follower from one of them that appears in WordNet's tagged texts is
# a base word, which people use as a label.
FELT = {"adj.all", "noun.feeling", "noun.attribute", "noun.state", "verb.emotion"}

# Distance of a word from the line it follows: the line's word, a word of one of its senses, or of a neighbouring sense.
HEAD, SENSE, NEIGHBOUR = range(3)


@dataclass(frozen=True)
class Entry:
    """A line of the lexicon: wheel words, nearest first, and the WordNet senses whose words follow it."""

    nearest: tuple[str, ...]
    senses: tuple[str, ...]


def build_tables(wordnet: Path, wheels: Path = DATA / "wheels.yaml", lexicon: Path = DATA / "lexicon.txt") -> Tables:
    """Build tables from the two source files and a WordNet 3.0 database folder (``data.adj``, ``index.adj``, …).

    Deterministic: the same inputs give the same arrays.

    Raises:
        TablesError: naming the file that is at fault.
    """
    wheel_list = read_wheels(wheels)
    wheel_words = {word for wheel in wheel_list for word in wheel.cluster[0]}
    entries = read_lexicon(lexicon, wheel_words)
    reader = open_wordnet(wordnet)
    irregular = {pos: _read_exceptions(wordnet / f"{pos}.exc") for pos in ("noun", "verb", "adj")}

    # base words: those of the lexicon, then those that follow one of its lines; nearest line first, then alphabetically
    sources: dict[str, set[tuple[int, str]]] = {word: {(HEAD, word)} for word in entries}
    word_classes: dict[str, set[str]] = defaultdict(set)  # WordNet's letters, n, v, a, s, r: how to inflect the word
    common = set(entries)
    for head, entry in entries.items():
        for sense in entry.senses:
            try:
                synset = reader.synset(sense)
            except Exception as error:  # nltk raises several types for an unknown sense
                raise TablesError(f"{lexicon}: {head!r} names {sense}, which {wordnet} lacks (WordNet 3.0?)") from error
            for distance, lemma in _followers(synset):
                word = _word(lemma)
                word_classes[word].add(lemma.synset().pos())
                if word not in entries:
                    sources.setdefault(word, set()).add((distance, head))
                    if distance == SENSE and lemma.count() > 0 and lemma.synset().lexname() in FELT:
                        common.add(word)
        if not entry.senses:
            word_classes[head].update(synset.pos() for synset in reader.synsets(head.replace(" ", "_")))
        verb = reader.morphy(head, "v")  # a participle's verb: startled → startle
        if verb and verb not in entries:
            sources.setdefault(verb, set()).add((HEAD, head))
            word_classes[verb].add("v")

    # surface forms follow their base words
    for word in list(sources):
        for form in _inflections(word, word_classes[word], irregular):
            if form not in entries and word_classes.get(form) is None:
                sources.setdefault(form, set()).update(sources[word])

    candidates = {}
    for word, lines in sources.items():
        # sorted: sources are sets, and the first reached wheel word decides the cluster
        reached = [w for _, head in sorted(lines) for w in (head, *entries[head].nearest) if w in wheel_words]
        candidates[word] = list(dict.fromkeys(reached))
    return compile_tables(wheel_list, candidates, base=common)


def read_wheels(path: Path) -> list[Wheel]:
    """Read wheels from YAML: wheel → level-1 sector → level-2 sector → list of outermost words."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [
            Wheel.from_rows(
                name, [(one, two, word) for one in sectors for two in sectors[one] for word in sectors[one][two]]
            )
            for name, sectors in tree.items()
        ]
    except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise TablesError(f"{path} is not a readable list of wheels: {error}") from error


def read_lexicon(path: Path, wheel_words: set[str]) -> dict[str, Entry]:
    """Read the authored lexicon, whose head describes its format. Every wheel word must have a line."""
    entries: dict[str, Entry] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([^:|]+): ([^|]+?) \|(.*)", line)
        if not match:
            raise TablesError(f"{path}, line {number}: `word: wheel words | senses` expected, found {line!r}")
        word, nearest = match[1], tuple(match[2].split(", "))
        if word in entries:
            raise TablesError(f"{path}, line {number}: {word!r} has a line already")
        if unknown := set(nearest) - wheel_words:
            raise TablesError(f"{path}, line {number}: {', '.join(sorted(unknown))} is on no wheel")
        entries[word] = Entry(nearest, tuple(match[3].split()))
    if missing := wheel_words - entries.keys():
        raise TablesError(f"{path}: no line for the wheel words {', '.join(sorted(missing))}")
    return entries


def open_wordnet(folder: Path) -> WordNetCorpusReader:
    """Open a plain WordNet database folder by nltk's reader, without nltk's data packages."""
    import nltk.data  # only building needs nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        def open(self, file: str) -> Any:
            if file == "lexnames":
                return io.StringIO("".join(f"{i}\t{name}\t0\n" for i, name in enumerate(LEXNAMES.split())))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Skip the mapping to other WordNet versions, which needs nltk's copy."""

    folder = Path(folder).resolve()
    needed = [f"{table}.{pos}" for table in ("data", "index") for pos in ("adj", "adv", "noun", "verb")]
    for name in (*needed, "noun.exc", "verb.exc", "adj.exc", "cntlist.rev"):
        if not (folder / name).is_file():
            raise TablesError(f"{folder / name} is missing: give a WordNet 3.0 database folder (Debian: wordnet-base)")
    nltk.data.path.append(str(folder))  # nltk reads only below the folders in this list
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns that other languages are not installed
        return Reader(str(folder), None)


def _followers(synset: Synset) -> Iterator[tuple[int, Lemma]]:
    """List the words that follow a line with this sense: of it, of neighbouring senses, and their derivations."""
    neighbours: list[Synset] = [*synset.similar_tos(), *synset.also_sees(), *synset.verb_groups()]
    if synset.lexname() in ("noun.feeling", "verb.emotion"):
        neighbours += synset.hyponyms()  # more special feelings
    for distance, senses in ((SENSE, [synset]), (NEIGHBOUR, neighbours)):
        for sense in senses:
            for lemma in sense.lemmas():
                if re.fullmatch(r"[a-z_-]+", lemma.name()):
                    yield distance, lemma
                    for derived in lemma.derivationally_related_forms():
                        if derived.synset().lexname() != "noun.person" and re.fullmatch(r"[a-z_-]+", derived.name()):
                            yield distance, derived


def _word(lemma: Lemma) -> str:
    return lemma.name().replace("_", " ")


def _read_exceptions(path: Path) -> dict[str, list[str]]:
    """Read irregular inflections as base word → forms."""
    forms = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        form, *bases = line.split()
        for base in bases:
            forms[base].append(form)
    return forms


def _inflections(word: str, word_classes: set[str], irregular: dict[str, dict[str, list[str]]]) -> list[str]:
    """List the inflected forms of a single word: plural; third person, past and participles; comparison; adverb."""
    if " " in word or "-" in word:
        return []
    stem = re.sub(r"(?<=[^aeiou])y$", "i", word)
    sibilant = re.search(r"(?:s|x|z|ch|sh)$", word)
    plural = stem + ("es" if sibilant or stem != word else "s")
    forms: list[str] = []
    if "n" in word_classes:
        forms += irregular["noun"].get(word) or [plural]
    if "v" in word_classes:
        special = irregular["verb"].get(word, [])
        ings = [form for form in special if form.endswith("ing")]
        pasts = [form for form in special if not form.endswith("ing")]
        bare = word[:-1] if re.search(r"[^eoy]e$", word) else word
        forms += [plural, *(ings or [bare + "ing"]), *(pasts or [stem + ("d" if word.endswith("e") else "ed")])]
    if word_classes & {"a", "s"}:
        forms += irregular["adj"].get(word, [])
        forms.append(_adverb(word))
    return forms


def _adverb(adjective: str) -> str:
    """Form the adverb: happy → happily, terrible → terribly, frantic → frantically, sad → sadly."""
    for ending, adverb in (
        ("ic", "ically"),
        ("ll", "lly"),
        ("ble", "bly"),
        ("ple", "ply"),
        ("tle", "tly"),
        ("y", "ily"),
    ):
        if adjective.endswith(ending):
            return adjective.removesuffix(ending) + adverb
    return adjective + "ly"

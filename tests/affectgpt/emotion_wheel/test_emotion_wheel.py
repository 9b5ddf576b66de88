"""The emotion wheel on its own tables and on small made ones: parsing, scoring, look-ups, files."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectgpt.emotion_wheel import EmotionWheel, Tables, TablesError, parse_labels
from affectgpt.emotion_wheel.__main__ import main
from affectgpt.emotion_wheel.build import DATA, build_tables, read_lexicon, read_wheels
from affectgpt.emotion_wheel.score import DEFAULT_TABLES
from affectgpt.emotion_wheel.tables import load_tables, save_tables

WORDNET = Path("/usr/share/wordnet")


@pytest.fixture(scope="module")
def wheel() -> EmotionWheel:
    return EmotionWheel.default()


# --- parsing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("The character's emotional state is happy, excited.", ["happy", "excited"]),
        ("happy\nsad\r\nangry", ["happy", "sad", "angry"]),
        ("1. Happy\n2) Sad\n- angry\n• calm\n* tense", ["happy", "sad", "angry", "calm", "tense"]),
        ("happy; sad. angry / calm | tense", ["happy", "sad", "angry", "calm", "tense"]),
        ("happy and sad, and angry or calm & tense", ["happy", "sad", "angry", "calm", "tense"]),
        ("开心，happy、sad；angry。calm", ["开心", "happy", "sad", "angry", "calm"]),
        ("['happy', \"sad\"] (angry) “calm” ‘tense’", ["happy", "sad", "angry", "calm", "tense"]),
        ("['happy' 'sad']", ["happy", "sad"]),
        ("I don't care, don’t care", ["i don't care", "don't care"]),
        ("Emotions: happy\n**Final answer:** sad", ["happy", "sad"]),
        ("happy: he smiles", ["happy", "he smiles"]),
        ("<answer>happy</answer>", ["happy"]),
        ("He seems to be slightly anxious and a bit worried", ["anxious", "worried"]),
        ("filled with joy because he won", ["joy"]),
        ("in my feelings, not good enough, self-conscious", ["in my feelings", "not good enough", "self-conscious"]),
        ("looking forward to, look forward", ["looking forward to", "look forward"]),
        ("not happy", ["not happy"]),
        ("happy - sad — angry", ["happy", "sad", "angry"]),
        ("", []),
        (" ... !? ", []),
        (None, []),
        (float("nan"), []),
        (["Happy", "sad, angry"], ["happy", "sad", "angry"]),
    ],
)
def test_tolerant_parser_reads_a_models_answer(text, labels):
    assert parse_labels(text, "tolerant") == labels


ANSWERS = st.text(
    st.one_of(
        st.sampled_from(list("abhs ,;.:'’\"[]()-\n、，<>/ıİΣς\u3000\x1c")), st.characters(exclude_characters="\0")
    ),
    max_size=40,
)
PIECES = st.lists(
    st.sampled_from(["happy", "the", "very", "is", "and", "as", "with", "because", "a bit", "don't", "look", "forward"])
    | ANSWERS,
    max_size=8,
).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(PIECES)
def test_tolerant_parser_keeps_its_own_labels(text):
    labels = parse_labels(text, "tolerant")
    assert parse_labels(", ".join(labels), "tolerant") == labels
    assert all(label == label.strip() and label for label in labels)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        ANSWERS | PIECES | st.sampled_from(["[happy, sad]", "happy\0sad", "'happy', 'sad'"]), min_size=1, max_size=6
    )
)
@pytest.mark.parametrize("parser", ["strict", "tolerant"])
def test_batches_parse_as_single_strings_do(parser, texts):
    wheel = EmotionWheel.default()
    index, clusters = wheel.tables.index, wheel.tables.clusters[0]
    index = index | {word.replace("’", "'"): i for word, i in index.items()}
    for text, masks in zip(texts, wheel.masks(texts, parse=parser), strict=True):
        forms = [index[label] for label in map(str.lower, parse_labels(text, parser)) if label in index]
        for w, mask in enumerate(masks):
            assert {c for c in range(64) if int(mask) >> c & 1} == {int(clusters[w, f]) for f in forms} - {-1}


def test_unknown_parser_is_refused(wheel):
    for call in (lambda: parse_labels("happy", "loose"), lambda: wheel.score(["happy"], ["happy"], parse="loose")):
        with pytest.raises(ValueError, match="strict, tolerant"):
            call()


# --- scoring ----------------------------------------------------------------------------------------------------


def _plain(wheel: EmotionWheel, truth: str, guess: str, level: int) -> np.ndarray:
    """[3, W] precision, recall, F by sets of names."""
    out = np.full((3, len(wheel.names)), np.nan)
    for w in range(len(wheel.names)):
        g, p = ({wheel.clusters(label, level)[w] for label in parse_labels(text)} - {None} for text in (truth, guess))
        if g:
            precision, recall = len(g & p) / len(p) if p else 0.0, len(g & p) / len(g)
            out[:, w] = precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return out


@pytest.mark.parametrize("level", [1, 2])
def test_batched_scores_equal_sets_of_names(wheel, level):
    rng = np.random.default_rng(level)
    words = [*rng.choice(wheel.tables.words, 60), "neutral", "zorp", "happy."]

    def draw() -> str:
        return f"[{', '.join(rng.choice(words, rng.integers(0, 6)))}]"

    truth, guess = [draw() for _ in range(400)], [draw() for _ in range(400)]
    scores = wheel.score(truth, guess, level)
    expected = np.stack([_plain(wheel, t, g, level) for t, g in zip(truth, guess, strict=True)])
    for k, field in enumerate(("precision", "recall", "f1")):
        np.testing.assert_allclose(getattr(scores, field), expected[:, k], rtol=0, atol=1e-12)
    assert np.isnan(scores.f1).any()
    assert (scores.f1 == 0).any()


def test_scores_do_not_depend_on_the_batch(wheel):
    rng = np.random.default_rng(0)
    words = np.array(wheel.tables.words)
    truth = [", ".join(three) for three in rng.choice(words, (5000, 3))]  # more than one chunk
    guess = truth[1:] + truth[:1]
    whole = wheel.score(truth, guess)
    for n in (0, 1, 2047, 2048, 4999):
        np.testing.assert_array_equal(wheel.score([truth[n]], [guess[n]]).f1[0], whole.f1[n])


def test_word_order_case_and_repetition_do_not_matter(wheel):
    scores = wheel.score(["[happy, sad]"] * 3, ["[sad, happy]", "[HAPPY , Sad]", "[happy, happy, sad]"])
    np.testing.assert_array_equal(scores.f1, 1.0)


def test_lists_and_missing_values_score_as_their_labels(wheel):
    truth = [["happy", "sad"], None, float("nan"), ["happy, sad"], "happy"]
    scores = wheel.score(truth, ["happy, sad"] * 4 + [["don't care", "happy"]])
    assert (scores.f1[0] == 1).all()
    assert np.isnan(scores.f1[1:4]).all()  # in a list a comma does not separate
    assert (scores.recall[4] == 1).all()


def test_means_over_wheels_follow_their_names(wheel):
    tables = wheel.tables
    partial = next(w for w, c in zip(tables.words, (tables.clusters[0] >= 0).T, strict=True) if 0 < c.sum() < 5)
    scored = sum(c is not None for c in wheel.clusters(partial))
    scores = wheel.score([partial, "neutral"], [partial, "happy"])
    np.testing.assert_allclose(scores.mean("zero"), [scored / 5, 0.0])
    np.testing.assert_array_equal(scores.mean("skip"), [1.0, np.nan])
    with pytest.raises(ValueError, match="zero or skip"):
        scores.mean("none")


def test_corpus_f_is_the_harmonic_mean_of_mean_precision_and_recall(wheel):
    score = wheel.corpus(["happy", "happy, sad", "neutral"], ["happy, sad", "happy", "happy"])
    np.testing.assert_allclose(score.per_wheel_precision, 0.75)
    np.testing.assert_allclose(score.per_wheel_recall, 0.75)
    np.testing.assert_allclose(score.per_wheel_f1, 0.75)
    assert score.scored.tolist() == [2] * 5


def test_corpus_without_hits_or_scored_samples_is_zero(wheel):
    for truth, guess, scored in ((["happy"], ["sad"], 1), (["neutral"], ["happy"], 0), ([], [], 0)):
        score = wheel.corpus(truth, guess)
        assert (score.f1, score.precision, score.recall) == (0.0, 0.0, 0.0)
        assert score.scored.tolist() == [scored] * 5


def test_unequal_lengths_and_unknown_levels_are_refused(wheel):
    with pytest.raises(ValueError, match="2 ground truths but 1 predictions"):
        wheel.score(["happy", "sad"], ["happy"])
    with pytest.raises(ValueError, match="level 3"):
        wheel.score(["happy"], ["happy"], level=3)


# --- what is on the wheels --------------------------------------------------------------------------------------


def test_own_tables_place_basic_emotions_where_one_expects_them(wheel):
    assert wheel.clusters("fear") == ("scared", "fearful", "scared", "fear", "scared")
    assert wheel.clusters("Happy") == ("happy", "happy", "joyful", "joy", "joyful")
    assert wheel.clusters("angrily") == ("mad", "angry", "mad", "anger", "mad")
    assert wheel.clusters("sadness") == ("sad",) * 5
    assert wheel.clusters("don't care")[0] == "sad"
    for word in ("neutral", "zorp", ""):
        assert wheel.clusters(word) == (None,) * 5


def test_every_wheel_word_is_in_its_own_cluster(wheel):
    for w, source in enumerate(read_wheels(DATA / "wheels.yaml")):
        for level in (1, 2):
            for word, cluster in source.cluster[level - 1].items():
                assert wheel.clusters(word, level)[w] == source.sectors[level - 1][cluster]


def test_members_are_the_words_that_map_to_the_cluster(wheel):
    seen = 0
    for w, cluster, words in wheel.members(level=2):
        assert words
        for word in words[:3]:
            assert wheel.clusters(word, 2)[w] == cluster
        assert set(words) <= set(wheel.words(w, cluster, 2, base=False))
        seen += 1
    assert seen == 36 + 41 + 36 + 48 + 36


# --- files ------------------------------------------------------------------------------------------------------


def test_tables_survive_their_file(wheel, tmp_path):
    save_tables(wheel.tables, tmp_path / "tables.npz")
    assert (tmp_path / "tables.npz").read_bytes() == DEFAULT_TABLES.read_bytes()
    _assert_same(load_tables(tmp_path / "tables.npz"), wheel.tables)


@pytest.mark.skipif(not (WORDNET / "data.adj").is_file(), reason=f"no WordNet at {WORDNET} (Debian: wordnet-base)")
def test_rebuilding_gives_the_shipped_tables(wheel, tmp_path, capsys):
    assert main(["build", "--wordnet", str(WORDNET), "--out", str(tmp_path / "tables.npz")]) == 0
    assert str(len(wheel.tables.words)) in capsys.readouterr().out
    _assert_same(load_tables(tmp_path / "tables.npz"), wheel.tables)


def _assert_same(a: Tables, b: Tables) -> None:
    assert (a.names, a.sectors, a.words) == (b.names, b.sectors, b.words)
    np.testing.assert_array_equal(a.clusters, b.clusters)
    np.testing.assert_array_equal(a.base, b.base)


def test_build_names_the_wordnet_file_that_is_missing(tmp_path, capsys):
    with pytest.raises(TablesError, match=r"data\.adj is missing"):
        build_tables(tmp_path)
    assert main(["build", "--wordnet", str(tmp_path), "--out", str(tmp_path / "x.npz")]) == 1
    assert "data.adj" in capsys.readouterr().err


def test_lexicon_errors_name_the_line(tmp_path):
    path = tmp_path / "lexicon.txt"
    for text, message in (
        ("happy joyful\n", "line 1: .word"),
        ("happy: joyful |\nhappy: joyful |\n", "line 2: 'happy' has a line"),
        ("happy: zorp |\n", "line 1: zorp is on no wheel"),
        ("happy: joyful |\n", "no line for the wheel words joyful"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(TablesError, match=message):
            read_lexicon(path, {"happy", "joyful"})


def test_damaged_own_tables_are_named(tmp_path):
    with pytest.raises(TablesError, match=r"none\.npz is missing"):
        load_tables(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(DEFAULT_TABLES.read_bytes()[:1000])
    with pytest.raises(TablesError, match=r"bad\.npz is damaged"):
        load_tables(tmp_path / "bad.npz")


@pytest.fixture
def published(tmp_path) -> Path:
    """A small folder in the published format."""
    from openpyxl import Workbook

    folder = tmp_path / "published"
    folder.mkdir()

    def sheet(name: str, rows: list) -> None:
        book = Workbook()
        for row in rows:
            book.active.append(row)
        book.save(folder / name)

    header = ["level1", "level2", "level3"]
    sheet("wheel1.xlsx", [header, [" Joy ", "Zest", "Thrilled"], [None, "Calm", "Serene"], ["Sad", "Low", "Thrilled"]])
    for n in range(2, 6):
        sheet(f"wheel{n}.xlsx", [header, ["Up", "Joy", "Calm"]])
    header = ["word_run1", "synonym_run1", "word_run2", "synonym_run2"]
    sheet("synonym.xlsx", [header, ["Joy", "Glad, merry", "Low", "blue"], ["Low", "blue , glad", "Calm", None]])
    with (folder / "format.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [["name", "format"], ["glad", "gladly,gladness"], ["blue", "blues,gladly"], ["joy", "joys"], ["odd", ""]]
        )
    return folder


def test_published_format_is_read_by_its_rules(published):
    wheel = EmotionWheel.from_published(published)
    assert wheel.names == ("wheel1", "wheel2", "wheel3", "wheel4", "wheel5")
    assert (wheel.sectors(0), wheel.sectors(0, 2)) == (("joy", "sad"), ("zest", "calm", "low"))
    assert wheel.clusters("joys")[:2] == ("joy", "up")
    assert wheel.clusters("joys", 2)[:2] == ("calm", "joy")  # a level-1 word: its alphabetically first level-2 sector
    assert wheel.clusters("gladly")[:2] == ("joy", "up")  # joy stands before low
    assert wheel.clusters("blues")[:2] == ("sad", None)
    assert wheel.clusters("odd") == (None,) * 5
    assert wheel.clusters("thrilled") == (None,) * 5  # on the wheel, but no form leads there
    assert wheel.words(0, "joy", base=False) == ("glad", "gladly", "gladness", "joy", "joys")
    assert wheel.words(0, "joy") == ("glad", "joy")


@pytest.mark.parametrize("name", ["wheel1.xlsx", "format.csv", "synonym.xlsx"])
def test_damaged_published_file_is_named(published, name):
    (published / name).write_bytes(b"PK\x03\x04\xff\xfe broken")
    with pytest.raises(TablesError, match=name.replace(".", r"\.")):
        EmotionWheel.from_published(published)


@pytest.mark.parametrize("name", ["wheel3.xlsx", "format.csv", "synonym.xlsx"])
def test_missing_published_file_is_named(published, name):
    (published / name).unlink()
    with pytest.raises(TablesError, match=name.replace(".", r"\.") + " is missing"):
        EmotionWheel.from_published(published)


def test_wrong_columns_and_empty_folders_are_named(published, tmp_path):
    shutil.copy(published / "synonym.xlsx", published / "wheel2.xlsx")
    with pytest.raises(TablesError, match=r"wheel2\.xlsx: columns level1"):
        EmotionWheel.from_published(published)
    with pytest.raises(TablesError, match=r"wheel1\.xlsx is missing"):
        EmotionWheel.from_published(tmp_path / "nowhere")

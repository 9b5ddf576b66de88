"""The reward rules: published tables and worked numbers, bounds, order, and what gaming a reward brings."""

import json
import math
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectgpt.data.datasets import Sample
from affectgpt.emotion_wheel import EmotionWheel, parse_labels
from affectgpt.rewards import (
    REWARDS,
    AccuracyReward,
    AlignmentReward,
    DualReward,
    EmotionWords,
    FormatReward,
    HitRateReward,
    LengthPenalty,
    PerceptionReward,
    RepetitionPenalty,
    RewardConfig,
    SentimentReward,
    SoftOverlongPunishment,
    bradley_terry,
    has_think_answer_format,
    make_rewards,
    register_reward,
    split_think_answer,
    wordnet_lemmas,
)
from affectgpt.rewards.closed_labels import hit_rates
from grpo_core.types import Completion, Group, Prompt

WHEEL = EmotionWheel.default()
WORDS = EmotionWords(WHEEL)
ORACLE = Path(__file__).resolve().parents[2].parent / "shared" / "emotion_wheel"
WORDNET = Path("/usr/share/wordnet")

LABELS = ("happy", "joyful", "sad", "angry", "worried", "surprised", "proud", "zorp", "calm", "Annoyed")
texts = st.lists(st.sampled_from(LABELS), max_size=6).map(", ".join)
thoughts = st.lists(st.sampled_from([*LABELS, "the man", "smiles.", "</think>", "so"]), max_size=8).map(" ".join)
answers = st.builds("<think>{}</think><answer>{}</answer>".format, thoughts, texts) | texts | thoughts


def group(labels: str | None, *texts: str, tokens: int = 1) -> Group:
    completions = [Completion((1,) * tokens, np.zeros(tokens, np.float32), "stop", text) for text in texts]
    return Group(Prompt("p", (1,), sample=Sample("p", None, None, None, labels=labels)), completions)


def think(thought: str, answer: str) -> str:
    return f"<think> {thought} </think> <answer> {answer} </answer>"


# --- format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "full", "prefix", "tolerant"),
    [
        ("<think>a</think> <answer>b</answer>", True, True, True),
        ("<think>a</think> <answer>b</answer> and more", False, True, True),
        ("well, <think>a</think> so <answer>b</answer>", False, False, True),
        ("<think>a</think><answer> </answer>", False, True, False),
        ("<think></think><answer>b</answer>", False, True, False),
        ("<answer>b</answer><think>a</think>", False, False, False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False, True, True),
        ("<think>a</think><answer>b", False, False, False),
        ("happy", False, False, False),
    ],
)
def test_the_three_readings_of_the_format(text, full, prefix, tolerant):
    for rule, valid in (("full", full), ("prefix", prefix), ("tolerant", tolerant)):
        assert has_think_answer_format(text, rule) is valid
        assert FormatReward(rule)([group("[happy]", text)]).tolist() == [[float(valid)]]


@given(answers)
@settings(deadline=None)
def test_a_full_match_is_a_match_by_every_reading(text):
    if parts := split_think_answer(text, "full"):
        assert split_think_answer(text, "prefix") == split_think_answer(text, "tolerant") == parts


# --- length penalties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("true", "predicted", "p1", "p2", "p3"),
    [
        (2, 3, 0.5, 0.6667, 0.6309),
        (2, 4, 0.3333, 0.5, 0.5),
        (3, 6, 0.25, 0.5, 0.6131),
        (1, 2, 0.5, 0.5, 0.0),
        (4, 5, 0.5, 0.8, 0.8614),
        (3, 3, 1, 1, 1),
        (3, 1, 1, 1, 1),
        (3, 0, 1, 1, 1),
    ],
)
def test_length_penalties_of_the_table(true, predicted, p1, p2, p3):
    for kind, expected in (("P1", p1), ("P2", p2), ("P3", p3)):
        value = LengthPenalty(kind, "as_written")(np.array([predicted]), np.array([true]))
        assert value[0] == pytest.approx(expected, abs=5e-5)


def test_the_repairs_of_p3_for_one_label():
    one, two = np.array([2, 3, 9]), np.array([2, 3, 9])
    single = lambda name, true: LengthPenalty("P3", name)(one, np.full(3, true))  # noqa: E731
    assert single("as_written", 1).tolist() == [0, 0, 0]
    np.testing.assert_allclose(single("shift_single", 1), math.log(2) / np.log(one + 1))
    assert single("shift_single", 1)[0] == pytest.approx(0.6309, abs=5e-5)
    np.testing.assert_array_equal(single("shift", 1), single("shift_single", 1))
    np.testing.assert_allclose(single("inverse_log", 1), [1.0, 1 / math.log(3), 1 / math.log(9)])
    np.testing.assert_allclose(single("shift", 2)[1:], math.log(3) / np.log(two[1:] + 1))
    for name in ("as_written", "shift_single", "inverse_log"):
        np.testing.assert_allclose(single(name, 2)[1:], math.log(2) / np.log(two[1:]))


@given(st.integers(0, 30), st.integers(0, 30))
@settings(deadline=None)
def test_penalties_are_factors_that_fall_with_every_further_label(predicted, true):
    for kind in ("P1", "P2", "P3"):
        for single in ("as_written", "shift_single", "shift", "inverse_log"):
            now, more = LengthPenalty(kind, single)(np.array([predicted, predicted + 1]), np.array([true, true]))
            assert 0 <= more <= now <= 1
            assert now == 1 or predicted > true


def test_a_penalty_multiplies_accuracy_and_dual_and_counts_different_words():
    groups = [
        group("[happy, Happy]", think("happy, sad and worried, sad", "happy, joyful, Happy."), think("x", "happy"))
    ]
    answer = AccuracyReward(WHEEL, "think", penalty=LengthPenalty("P2"))(groups)
    assert answer.tolist() == [[0.5, 1.0]]  # one true label, two different predicted ones
    thinking = DualReward(WHEEL, penalty=LengthPenalty("P2"))(groups)
    plain = DualReward(WHEEL)(groups)
    assert plain[0, 0] == pytest.approx(0.5, abs=0.15)
    assert thinking.tolist() == [[plain[0, 0] / 3, 0.0]]


def words_of_every_sector() -> list[str]:
    """As few words as a greedy search needs to be in every level-1 sector of every wheel."""
    clusters, base = WHEEL.tables.clusters[0], np.flatnonzero(WHEEL.tables.base)
    missing = {(w, c) for w in range(len(WHEEL.names)) for c in range(len(WHEEL.sectors(w)))}
    chosen = []
    while missing:
        reached = {f: {(w, int(c)) for w, c in enumerate(clusters[:, f])} & missing for f in base}
        best = max(base, key=lambda f: len(reached[f]))
        chosen.append(WHEEL.tables.words[best])
        missing -= reached[best]
    return chosen


def test_naming_a_word_of_every_sector_pays_less_than_a_correct_short_answer():
    """Recall is then 1: what stands against it is precision, and with a penalty the count."""
    everything = ", ".join(words_of_every_sector())
    print("\nground truth            penalty  every sector  first label  all labels")
    for labels in ("[happy]", "[sad, hurt]", "[angry, worried, tense]"):
        true = parse_labels(labels)
        groups = [group(labels, everything, true[0], ", ".join(true))]
        np.testing.assert_array_equal(WHEEL.score([labels], [everything]).recall, 1)
        values = {
            kind: AccuracyReward(WHEEL, penalty=LengthPenalty(kind))(groups)[0] for kind in ("none", "P1", "P2", "P3")
        }
        for kind, (listed, short, whole) in values.items():
            print(f"{labels:24}{kind:9}{listed:12.3f}{short:13.3f}{whole:12.3f}")
            assert whole == 1
            assert short == values["none"][1]
            assert listed < (short if kind == "none" else short / 2)
        assert values["none"][0] > 0.25  # without a penalty, the list earns this whatever the clip shows
        assert values["P1"][0] <= values["P2"][0] < values["P3"][0] < 0.6 * values["none"][0]


# --- emotion words in free text ----------------------------------------------------------------------------------


def test_words_are_found_in_one_pass_longest_first():
    assert WORDS.find("She is let down, and Happily SO; bad-tempered?") == ["let down", "happily", "bad-tempered"]
    assert WORDS.find("let, down") == []  # a comma ends a form
    assert WORDS.find("self conscious, don't care, the man's anger’s cause") == [
        "self-conscious",
        "don’t care",
        "anger",
    ]
    assert WORDS.find("sad, sad") == ["sad", "sad"]
    assert WORDS.find("unsaddled madness5 joy_ful") == ["joy"]


def test_prose_about_faces_and_voices_holds_no_emotion():
    text = "In the video, he looks down and speaks slightly faster in a low tone; his arms crossed, his lips pressed."
    assert WORDS.find(text) == []
    assert WHEEL.tables.index.keys() >= {"in", "looks", "down", "low"}  # though these are forms


@pytest.mark.skipif(not (WORDNET / "data.noun").is_file(), reason="WordNet is not installed")
def test_with_wordnet_forms_that_the_tables_lack_are_found_by_their_lemma():
    lemmas = wordnet_lemmas(WORDNET)
    with_lemmas = EmotionWords(WHEEL, lemmas)
    lacking = [w for w in ("dreadings", "miserablest", "rejoicings", "frighteningest") if w not in WHEEL.tables.index]
    derived = [w for w in lacking if any(lemma in WHEEL.tables.index for lemma in lemmas(w))]
    assert derived
    for word in derived:
        assert WORDS.find(word) == []
        assert with_lemmas.find(word)[0] in lemmas(word)
    assert with_lemmas.find("the person looks") == []


@given(st.lists(st.sampled_from(WHEEL.tables.words), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_found_words_are_forms_and_finding_again_gives_the_same(words):
    found = WORDS.find(", ".join(words))
    assert set(found) <= set(WHEEL.tables.words)
    assert WORDS.find(", ".join(found)) == found


# --- alignment and dual ------------------------------------------------------------------------------------------


def test_alignment_is_the_mean_jaccard_of_clusters():
    """`happy, sad` against `happy`: two clusters to one on each wheel."""
    texts = [
        think("he is happy but sad", "happy"),
        think("joyful", "happy"),
        think("angry", "happy"),
        think("he smiles at nothing in particular today", ""),
        "happy",
        think("he is happy", "zorp"),
    ]
    values = AlignmentReward(WHEEL)([group("[angry]", *texts)])[0]
    assert values.tolist() == [0.5, 1.0, 0.0, 0.0, 0.0, 0.0]
    binary = AlignmentReward(WHEEL, "threshold")([group("[angry]", *texts)])[0]
    assert binary.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert AlignmentReward(WHEEL, "threshold", threshold=0.7)([group("[angry]", *texts)])[0, 0] == 0  # F is 2/3


def test_alignment_over_wheels_that_neither_side_is_on():
    on = np.mean([c is not None for c in WHEEL.clusters("surprised")])
    assert on < 1
    groups = [group("[x]", think("surprised", "surprised"))]
    assert AlignmentReward(WHEEL)(groups).item() == 1
    assert AlignmentReward(WHEEL, unscored="zero")(groups).item() == pytest.approx(on)


def test_dual_is_the_f_of_the_thinkings_words():
    texts = [think("he beams, happy and a little sad", "angry"), "<think>joyful", "happy", think("a man", "happy")]
    values = DualReward(WHEEL)([group("[happy]", *texts), group("[neutral]", *texts)])
    expected = WHEEL.score(["[happy]"], ["happy, sad"]).mean("skip")[0]
    assert values[0].tolist() == [expected, 0.0, 0.0, 0.0]
    assert np.isnan(values[1]).all()


@cache
def all_rewards(penalty: str):
    def longer(comparisons):
        return np.array([0.5 + 0.5 * np.sign(len(c.first) - len(c.second)) for c in comparisons])

    names = [name for name in REWARDS if name not in ("hit_rate", "sentiment")]
    config = RewardConfig(length_penalty=penalty)
    return make_rewards(names, WHEEL, "think", config, max_length=20, judge=longer)


@given(
    st.lists(st.tuples(texts, st.lists(answers, min_size=3, max_size=3)), min_size=1, max_size=3),
    st.permutations(range(3)),
    st.sampled_from(("none", "P1", "P2", "P3")),
)
@settings(max_examples=40, deadline=None)
def test_rewards_are_bounded_and_move_with_their_completions(rows, order, penalty):
    groups = [group(truth, *members) for truth, members in rows]
    shuffled = [group(truth, *(members[i] for i in order)) for truth, members in rows]
    for reward in all_rewards(penalty):
        values = reward(groups)
        low, high = (-1, 0) if reward.name in ("overlong", "repetition") else (0, 1)
        assert values.shape == (len(rows), 3)
        assert ((values >= low) & (values <= high) | np.isnan(values)).all()
        np.testing.assert_array_equal(reward(shuffled), values[:, order])
        alone = np.concatenate([reward([g]) for g in groups])
        np.testing.assert_array_equal(alone, values)  # the other groups of the step do not matter


@given(texts | answers)
@settings(deadline=None)
def test_reading_labels_again_gives_the_same(text):
    once = parse_labels(text, "tolerant")
    assert parse_labels(", ".join(once), "tolerant") == once


# --- perception --------------------------------------------------------------------------------------------------


class Ranking:
    """A judge with a known order of answers, which remembers what it was asked."""

    def __init__(self, *order: str):
        self.order, self.asked = order, []

    def __call__(self, comparisons):
        self.asked += [(c.first, c.second) for c in comparisons]
        rank = self.order.index
        return np.array([0.5 if a == b else float(rank(a) < rank(b)) for a, b in self.asked[-len(comparisons) :]])


def test_the_better_half_of_a_group_gets_one():
    judge = Ranking("a", "b", "c", "d", "e")
    values = PerceptionReward(judge, "no_think")([group("[happy]", "c", "a", "e", "d", "b"), group("[sad]", *"edcba")])
    assert values.tolist() == [[1, 1, 0, 0, 1], [0, 0, 1, 1, 1]]
    assert len(judge.asked) == 2 * 10


def test_ill_formed_answers_lose_unheard_and_equals_share():
    good, better, bad = think("a", "b"), think("c", "d"), "happy"
    judge = Ranking(better, good)
    values = PerceptionReward(judge)([group("[happy]", bad, good, bad, better)])
    assert values.tolist() == [[0, 1, 0, 1]]
    assert judge.asked == [(good, better)]
    assert PerceptionReward(Ranking(good))([group("[happy]", good, good, good)]).tolist() == [[1, 1, 1]]


def test_without_verdicts_a_completion_cannot_be_judged():
    silent = lambda comparisons: np.full(len(comparisons), np.nan)  # noqa: E731
    assert np.isnan(PerceptionReward(silent, "no_think")([group("[happy]", "a", "b")])).all()
    assert np.isnan(PerceptionReward(silent)([group("[happy]", "a", "b")])).all()  # both ill-formed
    assert np.isnan(PerceptionReward(silent, "no_think")([group("[happy]", "a")])).all()


def test_perception_without_a_judge_is_refused_and_its_answers_are_checked():
    with pytest.raises(ValueError, match=r"needs a judge .* set reward\.judge"):
        make_rewards(["perception"], WHEEL, "think", RewardConfig(), max_length=20)
    for wrong in (np.ones(3), np.array([2.0])):
        with pytest.raises(ValueError, match="1 numbers in 0…1 or NaN"):
            PerceptionReward(lambda _, wrong=wrong: wrong, "no_think")([group("[happy]", "a", "b")])


def test_bradley_terry_finds_the_skills_that_made_the_wins():
    skills = np.array([[1.2, -0.7, 0.1, -0.6]])
    p = np.exp(skills)
    wins = 1e5 * p[:, :, None] / (p[:, :, None] + p[:, None, :]) * (1 - np.eye(4))
    np.testing.assert_allclose(np.diff(bradley_terry(wins)), np.diff(skills), atol=1e-4)  # their differences matter
    beaten = np.zeros((1, 3, 3))
    beaten[0, 0, 1] = 5
    result = bradley_terry(beaten)[0]
    assert np.isfinite(result[:2]).all()  # one that always won has a finite skill
    assert result[0] > result[1]
    assert np.isnan(result[2])


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=10, max_size=10))
@settings(max_examples=50, deadline=None)
def test_where_all_pairs_are_compared_the_ranking_is_by_wins(verdicts):
    wins = np.zeros((1, 5, 5))
    for (i, j), verdict in zip(combinations(range(5), 2), verdicts, strict=True):
        wins[0, i, j], wins[0, j, i] = verdict, 1 - verdict
    skills, won = bradley_terry(wins)[0], wins[0].sum(axis=1)
    for i, j in combinations(range(5), 2):
        assert np.sign(np.round(skills[i] - skills[j], 6)) == np.sign(won[i] - won[j])


# --- penalties on tokens -----------------------------------------------------------------------------------------


def test_overlong_completions_are_punished_softly():
    reward = SoftOverlongPunishment(max_length=100, cache=20)
    values = [reward([group("[happy]", "", tokens=n)]).item() for n in (1, 80, 85, 90, 100)]
    assert values == [0, 0, -0.25, -0.5, -1]
    with pytest.raises(ValueError, match="between 1 and"):
        SoftOverlongPunishment(10, 11)


def test_repeated_ngrams_are_punished():
    def value(*tokens: int, n: int) -> float:
        completion = Completion(tokens, np.zeros(len(tokens), np.float32), "stop", "")
        return RepetitionPenalty(n)([Group(Prompt("p", (1,)), [completion])]).item()

    assert value(1, 2, 3, 4, n=2) == 0
    assert value(5, 5, 5, 5, 5, n=2) == -0.75
    assert value(1, 2, n=3) == 0
    assert value(1, 2, 1, 2, n=2) == pytest.approx(-1 / 3)


# --- closed labels -----------------------------------------------------------------------------------------------


def test_a_hit_is_the_true_labels_cluster_among_the_answers():
    groups = [group("happy", "joyful, sad", "angry", "happy"), group("neutral", "neutral", "sad", "calm")]
    values = HitRateReward(WHEEL)(groups)
    assert values[0].tolist() == [1, 0, 1]
    assert np.isnan(values[1]).all()
    candidates = ("happy", "sad", "angry", "neutral")
    assert HitRateReward(WHEEL, candidates=candidates)(groups)[0].tolist() == [0.5, 0, 1]
    with pytest.raises(ValueError, match="has 2 labels"):
        HitRateReward(WHEEL)([group("[happy, sad]", "happy")])


@pytest.mark.skipif(not (ORACLE / "oracle").is_dir(), reason="the published tables are not here")
def test_hit_rates_are_the_published_codes():
    wheel = EmotionWheel.from_published(ORACLE / "mer2025")
    for case in json.loads((ORACLE / "oracle" / "cases.json").read_text(encoding="utf-8"))["hitrate_cases"]:
        truth, guesses = list(case["gt"].values()), [case["pred"][name] for name in case["gt"]]
        for key, candidates in (("hitrate", ()), ("mscore", tuple(dict.fromkeys(truth)))):
            rates = np.nanmean(hit_rates(wheel, truth, guesses, candidates), axis=0)
            expected = [row[key] for row in case["expected"]["mer2025"]["wheels"]]
            np.testing.assert_allclose(rates, expected, atol=1e-12, err_msg=f"{case['name']} {key}")


@pytest.mark.parametrize(
    ("value", "texts", "expected"),
    [
        ("1.4", ["happy, proud", "sad", "neutral", "positive", "not zorp"], [1, 0, 0, 1, 0]),
        ("-0.2", ["happy, proud", "sad", "neutral", "negative", "joyful, angry, worried"], [0, 1, 1, 1, 1]),
        ("positive", ["joyful", "[angry]"], [1, 0]),
    ],
)
def test_sentiment_is_positive_or_not(value, texts, expected):
    assert SentimentReward(WHEEL)([group(value, *texts)])[0].tolist() == expected


def test_a_neutral_sentiment_cannot_be_judged_and_other_labels_are_refused():
    assert np.isnan(SentimentReward(WHEEL)([group("0.0", "happy"), group("neutral", "happy")])).all()
    with pytest.raises(ValueError, match="needs a number"):
        SentimentReward(WHEEL)([group("[happy]", "happy")])


# --- by name -----------------------------------------------------------------------------------------------------


def test_rewards_by_name():
    judge = Ranking()
    rewards = make_rewards(list(REWARDS), WHEEL, "think", RewardConfig(), max_length=64, judge=judge)
    assert [reward.name for reward in rewards] == list(REWARDS)
    with pytest.raises(
        ValueError,
        match=r"unknown reward 'speed': choose among .*accuracy, .*alignment, .*or name one by import path",
    ):
        make_rewards(["speed"], WHEEL, "think", RewardConfig(), max_length=64)
    for name in ("format", "alignment", "dual"):
        with pytest.raises(ValueError, match=r"set prompt\.mode to think"):
            make_rewards([name], WHEEL, "no_think", RewardConfig(), max_length=64)
    with pytest.raises(ValueError, match="named twice"):
        make_rewards(["accuracy", "accuracy"], WHEEL, "think", RewardConfig(), max_length=64)
    with pytest.raises(ValueError, match=r"reward\.overlong_cache is 16 tokens of 8"):
        make_rewards(["overlong"], WHEEL, "think", RewardConfig(), max_length=8)


def test_your_own_rewards_stand_beside_the_built_in_ones(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def accuracy(completion): return 0\n"
        "def hits(completions, labels, **kwargs): return [float(c in t) for c, t in zip(completions, labels)]\n"
    )
    mine = f"{tmp_path}/mine.py"
    built_in, hits = make_rewards(["accuracy", f"{mine}:hits"], WHEEL, "no_think", RewardConfig(), max_length=8)
    assert (built_in.name, hits.name) == ("accuracy", "hits")
    assert hits([group("[happy, proud]", "proud", "sad")]).tolist() == [[1, 0]]
    with pytest.raises(ValueError, match=r"rewards accuracy and .*mine\.py:accuracy are both called 'accuracy'"):
        make_rewards(["accuracy", f"{mine}:accuracy"], WHEEL, "no_think", RewardConfig(), max_length=8)


def test_a_class_registers_itself_and_says_what_it_needs():
    needs = {"think": {"format", "alignment", "dual"}, "judge": {"perception"}}
    for need, names in needs.items():
        assert {name for name in REWARDS if REWARDS[name].needs == need} == names
    assert all(REWARDS[name].name == name and REWARDS.doc(name) for name in REWARDS)
    with pytest.raises(ValueError, match="'format' is registered already"):
        register_reward("format")(FormatReward)
    with pytest.raises(ValueError, match="give int a classmethod from_config"):
        register_reward("new")(int)


def test_unknown_options_list_the_valid_ones():
    for make, choices in (
        (lambda: LengthPenalty("P4"), "none, P1, P2, P3"),
        (lambda: LengthPenalty("P3", "max"), "as_written, shift_single, shift, inverse_log"),
        (lambda: FormatReward("strict"), "full, prefix or tolerant"),
        (lambda: AlignmentReward(WHEEL, "dice"), "jaccard or threshold"),
        (lambda: AlignmentReward(WHEEL, unscored="one"), "zero or skip"),
        (lambda: HitRateReward(WHEEL, unscored="one"), "zero or skip"),
        (lambda: RewardConfig(alignment_threshold=2.0), "at most 1"),
    ):
        with pytest.raises(ValueError, match=choices):
            make()

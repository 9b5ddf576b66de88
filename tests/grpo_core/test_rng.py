"""Random streams are pure functions of their counters."""

import os
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from grpo_core import rng


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of the Random123 distribution, "philox4x32 10"
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    low, high = words(key)
    assert [int(word) for word in rng.philox(tuple(words(counter)), low | high << 32)] == words(expected)


def test_streams_keep_their_numbers_over_releases():
    """A change of these numbers changes every recorded run."""
    assert rng.prompt_key("sample_00000001") == 0x1C2C56FEFF58AAD9
    np.testing.assert_array_equal(
        rng.row_key(7, 3, rng.prompt_key("a"), [0, 1]), [17117130070913654333, 12529058038711553574]
    )
    np.testing.assert_array_equal(rng.permutation(7, 1, 8), [2, 5, 0, 7, 4, 3, 6, 1])


def test_draw_follows_the_documented_counter_layout():
    seed, step, prompt, member, token, column = -5, 12, 0xFEDCBA9876543210, 3, 9, 31_000
    first = rng.philox((0x76543210, 0xFEDCBA98, step, member), 2**64 - 5)
    draw = rng.philox((token, column, 0, 0), first[0] | first[1] << np.uint64(32))[0]
    assert rng.uniform(seed, step, prompt, member, token, column) == (int(draw) + 0.5) / 2**32


def test_uniform_does_not_depend_on_the_batch_split():
    keys = np.array([rng.prompt_key(f"clip {i}") for i in range(6)], dtype=np.uint64)[:, None, None]
    whole = rng.uniform(1, 5, keys, np.arange(4)[:, None], np.arange(16))
    for i in reversed(range(6)):
        for member in (3, 0, 2, 1):
            rows = [rng.uniform(1, 5, keys[i, 0, 0], member, token) for token in range(16)]
            np.testing.assert_array_equal(whole[i, member], rows)


@pytest.mark.parametrize("argument", range(6))
def test_every_counter_changes_the_stream(argument):
    base = [11, 2, 1234567, 1, 4, 0]
    other = base.copy()
    other[argument] += 1
    assert rng.uniform(*base) != rng.uniform(*other)


def test_uniform_is_uniform_and_uncorrelated_between_members_and_tokens():
    u = rng.uniform(0, 0, rng.prompt_key("clip"), np.arange(400)[:, None], np.arange(500))
    assert u.dtype == np.float64
    assert 0 < u.min() < u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_prompt_key_is_stable_and_tells_ids_apart():
    keys = {rng.prompt_key(f"sample_{i:08d}") for i in range(5000)}
    assert len(keys) == 5000
    assert all(0 <= key < 2**64 for key in keys)


def test_permutation_visits_every_sample_once_and_differs_between_epochs_and_seeds():
    orders = [rng.permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert all((orders[i] != orders[j]).any() for i in range(4) for j in range(i))
    assert rng.permutation(0, 0, 0).shape == (0,)


def test_permutation_is_unbiased():
    firsts = np.bincount([rng.permutation(seed, 0, 5)[0] for seed in range(2000)], minlength=5)
    assert stats.chisquare(firsts).pvalue > 1e-3


def test_triton_computes_the_same_words(tmp_path):
    """The kernel of the docstring in Triton's interpreter; its own process, as TRITON_INTERPRET is read at import."""
    pytest.importorskip("triton")
    script = tmp_path / "draw.py"
    script.write_text(
        """
import numpy as np, torch, triton, triton.language as tl
from grpo_core import rng

@triton.jit
def draw(keys, out, token, B: tl.constexpr):
    rows = tl.arange(0, B)
    zero = tl.zeros([B], tl.uint32)
    columns = (rows * 3).to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(keys + rows), zero + token.to(tl.uint32), columns, zero, zero)
    tl.store(out + rows, word.to(tl.int64))

prompt, members = rng.prompt_key("clip"), np.arange(8)
keys = torch.from_numpy(rng.row_key(3, 2, prompt, members).view(np.int64))
out = torch.zeros(8, dtype=torch.int64)
draw[(1,)](keys, out, 17, B=8)
expected = rng.uniform(3, 2, prompt, members, 17, members * 3)
np.testing.assert_array_equal(((out.numpy() & 0xFFFFFFFF) + 0.5) / 2**32, expected)
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

"""Sample one token per row of given logits, and say how probable it was.

With logits x, x̂ = x after the repetition penalty (x/r if positive, x·r if not, for tokens seen), T the temperature:

    drawn from    softmax(x̂ / T) over the admissible tokens kept by top-k, then top-p, then min-p
    token         argmax over them of x̂ / T + gumbel(row key, token index, column)      (no noise at T = 0)

A token is kept by top-k if fewer than k scores are strictly larger; by top-p if the strictly larger ones hold less
than a share p of what top-k kept; by min-p if its probability is at least that share of the largest one. Tokens of
equal score are kept or dropped together. Logits of −1e29 or less count as −∞. Thresholds are found without sorting, by
a search over the ordered bits of the scores: each pass over the row cuts what is left of the 2³² candidates into nine.

The row is read twice, and up to eleven times more for each of top-k and top-p (from L2, where a GPU's rows fit).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels._backend import Backend, choose_backend, interpreted, tl, triton
from grpo_kernels.sampling.gumbel import gumbel_noise, gumbel_noise_reference


class SampledTokens(NamedTuple):
    """What sampling gives for each of B rows; log-probs and entropy float32, in nats, and at T = 0 those of T = 1.

    A row that is no distribution (a NaN or +∞ among its logits, or all −∞) harms no other: its token is 0, or the
    forced one, and the rest NaN. Where a whole row may not be drawn, the token is 0 likewise, and its log-probs NaN.
    """

    token: Tensor
    """int64 `[B]`"""
    logprob: Tensor
    """Under the distribution it was drawn from: penalised, tempered, truncated. −∞ for a forced token outside it."""
    tempered_logprob: Tensor
    """Under softmax(x / T) over the whole vocabulary, which is what training recomputes."""
    raw_logprob: Tensor
    """Under softmax(x)."""
    entropy: Tensor
    """Of softmax(x / T) over the whole vocabulary."""


@dataclass(frozen=True)
class SampleOptions:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the highest score.
        top_k: 0 is off. top_p: 1 is off. min_p: 0 is off. repetition_penalty: 1 is off.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "≥ 0 and finite"),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "an integer ≥ 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "> 0 and finite"),
        ):
            if not good:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    @property
    def inverse_temperature(self) -> float:
        """1 / T; at T = 0, where it is not needed to draw, that of T = 1, which log-probs are reported at."""
        return 1.0 / self.temperature if self.temperature else 1.0

    @property
    def whole(self) -> bool:
        """Whether scores are the logits, and all admissible tokens are kept."""
        return (self.top_k, self.top_p, self.min_p, self.repetition_penalty) == (0, 1.0, 0.0, 1.0)


@triton.jit
def ordered_bits(x):
    """Signed integers (as int64) that sort like float32 numbers."""
    # of negative numbers the larger has the smaller bits: all but the sign are flipped
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _load_scores(
    logits,  # one row of it, as of seen
    seen,
    forbidden,
    v,
    live,
    penalty,
    PENALTY: tl.constexpr,
    FORBIDDEN: tl.constexpr,
):
    """Logits and scores of tokens v; −∞ is −1e30, as is the score of a token that may not be drawn."""
    x = tl.load(logits + v, live, other=-1e30).to(tl.float32)
    x = tl.where(x <= -1e29, -1e30, x)  # NaN stays
    y = x
    if PENALTY:
        penalised = (tl.load(seen + v, live, other=0) != 0) & (x > -1e29)
        y = tl.where(penalised, tl.where(x > 0, x / penalty, x * penalty), x)
    if FORBIDDEN:
        y = tl.where(tl.load(forbidden + v, live, other=1) != 0, -1e30, y)
    return x, tl.where(live, y, -1e30) + 0.0  # −0 is 0


@triton.jit
def _threshold(
    # one row
    logits,
    seen,
    forbidden,
    V,
    penalty,
    inverse_temperature,
    peak,  # its highest score
    low,  # the search begins above this key
    bound,  # tokens, or probability
    MASS: tl.constexpr,
    PENALTY: tl.constexpr,
    FORBIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The smallest key above `low` whose strictly larger scores number, or weigh (MASS), less than `bound`."""
    high = tl.max(ordered_bits(peak + tl.zeros((1,), tl.float32)), 0)
    steps = tl.arange(0, PIVOTS).to(tl.int64) + 1
    lanes = tl.arange(0, BLOCK)
    while high - low > 1:
        pivots = low + (high - low) * steps // (PIVOTS + 1)
        larger = tl.zeros((PIVOTS,), tl.float32)  # counts up to 2²⁴ are exact
        for v0 in range(0, V, BLOCK):
            live = v0 + lanes < V
            _, y = _load_scores(logits, seen, forbidden, v0 + lanes, live, penalty, PENALTY, FORBIDDEN)
            above = (ordered_bits(y)[:, None] > pivots[None, :]) & live[:, None]
            if MASS:
                weight = tl.exp((y - peak) * inverse_temperature)
            else:
                weight = tl.full((BLOCK,), 1.0, tl.float32)
            larger += tl.sum(tl.where(above, weight[:, None], 0.0), 0)
        enough = larger < bound
        tested = pivots > low  # of a range shorter than PIVOTS some pivots fall on `low`, which is known already
        next_low = tl.maximum(low, tl.max(tl.where(enough | ~tested, low, pivots), 0))
        high = tl.minimum(high, tl.min(tl.where(enough & tested, pivots, high), 0))
        low = next_low
    return high


@triton.jit
def sample_row_kernel(
    # data and strides
    logits,  # [B, V]
    logits_stride,
    seen,  # [B, V] bytes; any pointer without PENALTY
    seen_stride,
    forbidden,  # [V] bytes; any pointer without FORBIDDEN
    forced,  # [B]; any pointer without FORCED
    keys,  # [B]
    positions,  # [B]
    # outputs, [B] each
    token_ptr,
    logprob_ptr,
    tempered_ptr,
    raw_ptr,
    entropy_ptr,
    # numbers
    V,
    inverse_temperature,
    penalty,
    top_k,
    top_p,
    log_min_p,
    # what to do
    GREEDY: tl.constexpr,
    PENALTY: tl.constexpr,
    FORBIDDEN: tl.constexpr,
    FORCED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """One row a program."""
    b = tl.program_id(0).to(tl.int64)
    logits += b * logits_stride
    seen += b * seen_stride
    lanes = tl.arange(0, BLOCK)

    # statistics of the whole softmax, lane by lane, and the highest score
    m = tl.full((BLOCK,), -1e30, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    q = tl.zeros((BLOCK,), tl.float32)
    s1 = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), -1e30, tl.float32)
    for v0 in range(0, V, BLOCK):
        live = v0 + lanes < V
        x, y = _load_scores(logits, seen, forbidden, v0 + lanes, live, penalty, PENALTY, FORBIDDEN)
        n = tl.maximum(m, x)
        shift = (m - n) * inverse_temperature
        shrink = tl.exp(shift)
        z = (x - n) * inverse_temperature
        e = tl.where(live, tl.exp(z), 0.0)
        q = (q + s * shift) * shrink + e * z
        s = s * shrink + e
        s1 = s1 * tl.exp(m - n) + tl.where(live, tl.exp(x - n), 0.0)
        m = n
        best = tl.maximum(best, y)
    highest = tl.max(m, 0)
    shift = (m - highest) * inverse_temperature
    shrink = tl.exp(shift)
    q = tl.sum((q + s * shift) * shrink, 0)
    s = tl.sum(s * shrink, 0)
    s1 = tl.sum(s1 * tl.exp(m - highest), 0)
    peak = tl.max(best, 0)
    tl.store(entropy_ptr + b, tl.log(s) - q / s)
    if (s != s) | (highest <= -1e29):  # NaN or +∞ somewhere, or −∞ everywhere
        token = 0
        if FORCED:
            token = tl.maximum(tl.load(forced + b).to(tl.int32), 0)
        tl.store(token_ptr + b, token)
        tl.store(logprob_ptr + b, float("nan"))
        tl.store(tempered_ptr + b, float("nan"))
        tl.store(raw_ptr + b, float("nan"))
        tl.store(entropy_ptr + b, float("nan"))
        return

    lowest = tl.full((), -2147483648, tl.int64)  # key of the lowest score that is kept: −2³¹ keeps all
    if TOP_K:
        lowest = _threshold(
            logits, seen, forbidden, V, penalty, inverse_temperature, peak, lowest, top_k,
            False, PENALTY, FORBIDDEN, BLOCK, PIVOTS,
        )  # fmt: skip
    if TOP_P:
        kept = tl.zeros((BLOCK,), tl.float32)
        for v0 in range(0, V, BLOCK):
            live = v0 + lanes < V
            _, y = _load_scores(logits, seen, forbidden, v0 + lanes, live, penalty, PENALTY, FORBIDDEN)
            kept += tl.where(live & (ordered_bits(y) >= lowest), tl.exp((y - peak) * inverse_temperature), 0.0)
        lowest = _threshold(
            logits, seen, forbidden, V, penalty, inverse_temperature, peak, lowest - 1, top_p * tl.sum(kept, 0),
            True, PENALTY, FORBIDDEN, BLOCK, PIVOTS,
        )  # fmt: skip

    key = tl.load(keys + b)
    position = tl.load(positions + b).to(tl.int32)
    forced_token = -1
    if FORCED:
        forced_token = tl.load(forced + b).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    winner = tl.zeros((BLOCK,), tl.int32)
    picked_x = tl.zeros((BLOCK,), tl.float32)
    picked_y = tl.zeros((BLOCK,), tl.float32)
    for v0 in range(0, V, BLOCK):
        v = v0 + lanes
        x, y = _load_scores(logits, seen, forbidden, v, v < V, penalty, PENALTY, FORBIDDEN)
        z = (y - peak) * inverse_temperature
        keep = (v < V) & (y > -1e29)  # −1e30 is the score of tokens that may not be drawn
        if TOP_K or TOP_P:
            keep &= ordered_bits(y) >= lowest
        if MIN_P:
            keep &= z >= log_min_p
        total += tl.where(keep, tl.exp(z), 0.0)
        race = z
        if not GREEDY:
            race += gumbel_noise(key, position, v)
        race = tl.where(keep, race, -float("inf"))
        if FORCED:
            # the forced token wins by 1e30; by 2e30 if it is not among the kept, which its log-prob then tells
            wins = tl.where(keep, 1e30, 2e30)
            race = tl.where(forced_token < 0, race, tl.where(v == forced_token, wins, -float("inf")))
        ahead = race > best
        best = tl.where(ahead, race, best)
        winner = tl.where(ahead, v, winner)
        picked_x = tl.where(ahead, x, picked_x)
        picked_y = tl.where(ahead, y, picked_y)
    # of lanes with equal scores the one with the first token wins
    most = tl.max(best, 0)
    leads = best == most
    token = tl.min(tl.where(leads, winner, V), 0)
    winning_lane = leads & (winner == token)
    x = tl.sum(tl.where(winning_lane, picked_x, 0.0), 0)
    y = tl.sum(tl.where(winning_lane, picked_y, 0.0), 0)
    x = tl.where(x <= -1e29, -float("inf"), x)  # of a forced token
    x = tl.where(most == -float("inf"), float("nan"), x)  # no token may be drawn: nobody won, and `token` is 0
    y = tl.where(most == -float("inf"), float("nan"), y)
    tl.store(token_ptr + b, token.to(tl.int64))
    logprob = (y - peak) * inverse_temperature - tl.log(tl.sum(total, 0))
    if FORCED:
        logprob = tl.where(most > 1.5e30, -float("inf"), logprob)
    tl.store(logprob_ptr + b, logprob)
    tl.store(tempered_ptr + b, (x - highest) * inverse_temperature - tl.log(s))
    tl.store(raw_ptr + b, x - highest - tl.log(s1))


ROW = {"BLOCK": 1024, "PIVOTS": 8, "num_warps": 8}
"""Launch of `sample_row_kernel`. Eight pivots cut a range into nine: 2³² candidates take eleven passes (9¹¹ > 2³²)."""


def sample_row(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    options: SampleOptions | None = None,
    *,
    seen: Tensor | None = None,
    forbidden: Tensor | None = None,
    forced: Tensor | None = None,
    backend: Backend | None = None,
) -> SampledTokens:
    """Draw a token for each row.

    Args:
        logits: `[B, V]`, raw, any float dtype; the last stride 1.
        keys: int64 `[B]`, each row's Philox key (same bits as an unsigned key).
        positions: integer `[B]`, index of the token being drawn in its completion, from 0.
        options: temperature and truncation; the whole softmax at temperature 1 unless given.
        seen: bool `[B, V]`, tokens that the repetition penalty is for.
        forbidden: bool `[V]`, tokens that are never drawn.
        forced: integer `[B]`, the token that a row takes whatever the draw, or -1. Its log-probs are reported like a
            drawn one's; `logprob` is −∞ if it could not have been drawn.
        backend: `triton`, `torch`, or None: Triton on CUDA.

    Returns:
        `SampledTokens`. The token depends on its row's logits, key and position alone.

    Raises:
        ValueError: shapes do not fit each other, or a penalty without `seen`.
    """
    options = options or SampleOptions()
    seen = seen if options.repetition_penalty != 1 else None  # without a penalty nobody reads it
    check_sampling(logits.shape[0], logits.shape[1], keys, positions, options, seen, forbidden, forced)
    if choose_backend(logits.device, backend, logits.dtype) == "torch":
        return sample_row_reference(logits, keys, positions, options, seen=seen, forbidden=forbidden, forced=forced)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    batch, vocabulary = logits.shape
    result = empty_result(batch, logits.device)
    launch = dict(ROW, BLOCK=256, PIVOTS=32) if interpreted() else ROW
    sample_row_kernel[(batch,)](
        logits=logits,
        logits_stride=logits.stride(0),
        seen=logits if seen is None else seen.view(torch.uint8),
        seen_stride=0 if seen is None else seen.stride(0),
        forbidden=logits if forbidden is None else forbidden.view(torch.uint8),
        forced=keys if forced is None else forced,
        keys=keys,
        positions=positions,
        token_ptr=result.token,
        logprob_ptr=result.logprob,
        tempered_ptr=result.tempered_logprob,
        raw_ptr=result.raw_logprob,
        entropy_ptr=result.entropy,
        V=vocabulary,
        inverse_temperature=options.inverse_temperature,
        penalty=options.repetition_penalty,
        top_k=float(options.top_k),
        top_p=options.top_p,
        log_min_p=math.log(options.min_p) if options.min_p else 0.0,
        GREEDY=options.temperature == 0,
        PENALTY=seen is not None,
        FORBIDDEN=forbidden is not None,
        FORCED=forced is not None,
        TOP_K=0 < options.top_k < vocabulary,
        TOP_P=options.top_p < 1,
        MIN_P=options.min_p > 0,
        **launch,
    )
    return result


def sample_row_reference(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    options: SampleOptions | None = None,
    *,
    seen: Tensor | None = None,
    forbidden: Tensor | None = None,
    forced: Tensor | None = None,
) -> SampledTokens:
    """`sample_row` in plain torch, by sorting, in float64: the same tokens, save where two scores race within 1e-5."""
    options = options or SampleOptions()
    x = logits.double()
    x = x.masked_fill(x <= -1e29, -torch.inf)
    # amax is NaN, +∞ or −∞ for a row that is no distribution: one of zeros takes its place until the end
    broken = ~x.amax(-1).isfinite()
    x = x.masked_fill(broken[:, None], 0.0)
    tempered = torch.log_softmax(x * options.inverse_temperature, -1)
    scores = x
    if seen is not None and options.repetition_penalty != 1:
        penalty = options.repetition_penalty
        scores = torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x)
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, -torch.inf)
    none = scores.amax(-1) == -torch.inf
    scores = scores.masked_fill(none[:, None], 0.0) * options.inverse_temperature
    if 0 < options.top_k < scores.shape[1]:
        smallest = scores.topk(options.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    peak = scores.amax(-1, keepdim=True)
    if options.top_p < 1:
        ordered, order = scores.sort(-1, descending=True)
        mass = torch.softmax(ordered, -1)
        first_equal = torch.searchsorted(-ordered, -ordered)  # tokens of equal score share one sum of larger ones
        larger = (mass.cumsum(-1) - mass).gather(1, first_equal)
        scores = scores.masked_fill(torch.zeros_like(scores).scatter_(1, order, larger) >= options.top_p, -torch.inf)
    if options.min_p > 0:
        scores = scores.masked_fill(scores - peak < math.log(options.min_p), -torch.inf)
    race = scores
    if options.temperature > 0:
        columns = torch.arange(scores.shape[1], device=scores.device)
        race = scores + gumbel_noise_reference(keys[:, None], positions[:, None].long(), columns)
    token = race.argmax(-1).masked_fill_(broken | none, 0)
    unknown = broken | none
    kept = torch.log_softmax(scores, -1).masked_fill_(none[:, None], -torch.inf)
    if forced is not None:
        token = torch.where(forced >= 0, forced.long(), token)
        unknown = broken | (none & (forced < 0))
    logprob, tempered_logprob, raw_logprob = (
        logprobs.gather(1, token[:, None])[:, 0].masked_fill_(unknown, torch.nan).float()
        for logprobs in (kept, tempered, torch.log_softmax(x, -1))
    )
    entropy = -torch.where(tempered.isneginf(), 0.0, tempered.exp() * tempered).sum(-1).masked_fill(broken, torch.nan)
    return SampledTokens(token, logprob, tempered_logprob, raw_logprob, entropy.float())


def empty_result(batch: int, device: torch.device) -> SampledTokens:
    """Allocate B rows' results."""
    logprob, tempered_logprob, raw_logprob, entropy = torch.empty(4, batch, device=device).unbind()
    return SampledTokens(
        token=torch.empty(batch, dtype=torch.int64, device=device),
        logprob=logprob,
        tempered_logprob=tempered_logprob,
        raw_logprob=raw_logprob,
        entropy=entropy,
    )


def check_sampling(
    batch: int,
    vocabulary: int,
    keys: Tensor,
    positions: Tensor,
    options: SampleOptions,
    seen: Tensor | None,
    forbidden: Tensor | None,
    forced: Tensor | None,
) -> None:
    """Refuse arguments of sampling that do not fit each other.

    Raises:
        ValueError: a shape or dtype, or a penalty without `seen`; the message says which.
    """
    if keys.shape != (batch,) or keys.dtype != torch.int64 or positions.shape != (batch,):
        raise ValueError(
            f"need int64 keys [{batch}] and positions [{batch}], got {keys.dtype} {list(keys.shape)} and "
            f"{list(positions.shape)}"
        )
    if options.repetition_penalty != 1 and seen is None:
        raise ValueError(f"repetition_penalty is {options.repetition_penalty}: pass seen [{batch}, {vocabulary}]")
    if forced is not None and (forced.shape != (batch,) or forced.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"forced must be int32 or int64 [{batch}], got {forced.dtype} {list(forced.shape)}")
    for name, tensor, shape in (("seen", seen, (batch, vocabulary)), ("forbidden", forbidden, (vocabulary,))):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.bool):
            raise ValueError(f"{name} must be bool {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")

"""The sections of the report, each a function from the run to HTML; empty where the run lacks what it needs."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from affectgpt.report import compare, figures
from affectgpt.report.figures import Line
from affectgpt.report.html import escape, figure, key, number, plural, shorten, table, tone
from affectgpt.report.run import Curves, Run

if TYPE_CHECKING:
    from affectgpt.data.datasets import Sample
    from affectgpt.emotion_wheel import EmotionWheel

# name of an evaluation → title, what it is, class of its row and bar
MODELS = {
    "untrained": ("Untrained", "the model as initialised", ""),
    "cold_start": ("Cold start", "supervised, until the validation score stopped rising", "before"),
    "sft_continued": ("Supervised, continued", "control: the cold start trained on for as long as GRPO ran", "control"),
    "grpo": ("GRPO", "the cold start, then trained on the emotion-wheel reward", "after"),
    "shuffled_media": (
        "GRPO, clips swapped",
        "control: the same model, each question with another sample's clip",
        "control",
    ),
}
PHASES = ("encode", "sample", "reward", "old", "reference", "forward", "backward", "optimizer")


def headline(run: Run, wheel: EmotionWheel) -> str:
    """Large figures, the result table with its bars, and what they say."""
    scores = _scores(run)
    if not scores:
        return ""
    bounds, changes = _checked_intervals(run, wheel, scores)
    before, after = scores.get("cold_start"), scores.get("grpo")
    out = ['<section id="result">']
    if before is not None and after is not None:
        gain = after - before
        out.append(
            '<div class="figures">'
            f"<div><span>Cold start</span><strong>{number(before)}</strong></div>"
            f"<div><span>After GRPO</span><strong>{number(after)}"
            f'<em class="{tone(gain)}">{number(gain, sign=True)}</em></strong></div></div>'
        )
    held_out = {len(evaluation.get("samples") or []) for evaluation in run.evaluations.values()}
    clips = f", {plural(held_out.pop(), 'clip')}" if len(held_out) == 1 else ""
    out.append(
        f'<p class="sub">Emotion-wheel F on held-out clips, level {_level(run)}, mean over {len(wheel.names)} wheels, '
        f"in percent{clips}.</p>"
    )
    drawn = [value for value in scores.values() if math.isfinite(value)] + [bound.high for bound in bounds.values()]
    scale = min(100.0, 1.12 * max(drawn, default=0.0)) or 1.0
    rows = []
    for name, f1 in scores.items():
        title, what, role = MODELS.get(name, (name.replace("_", " ").capitalize(), "", "control"))
        evaluation = run.evaluations.get(name, {})
        bar = f'<i class="{role}" style="width:{100 * max(f1, 0.0) / scale:.2f}%"></i>' if math.isfinite(f1) else ""
        interval = ""
        if bound := bounds.get(name):
            left, width = 100 * bound.low / scale, 100 * (bound.high - bound.low) / scale
            bar += f'<u style="left:{left:.2f}%;width:{width:.2f}%"></u>'
            interval = f"<small>{number(bound.low, 1)} – {number(bound.high, 1)}</small>"
        change = f1 - before if before is not None and name != "cold_start" else math.nan
        rows.append(
            f'<tr class="{"main" if name == "grpo" else "control" if role == "control" else ""}">'
            f'<td>{escape(title)}<small class="wide">{escape(what)}</small></td>'
            f'<td class="bars"><div class="bar">{bar}</div></td>'
            f'<td class="n"><b>{number(f1)}</b>{interval}</td>'
            f'<td class="n {tone(change) if name == "grpo" else ""}">{number(change, sign=True)}</td>'
            f'<td class="n wide">{number(evaluation.get("precision"))}</td>'
            f'<td class="n wide">{number(evaluation.get("recall"))}</td></tr>'
        )
    head = ["<th>Model</th>", "<th></th>", '<th class="n">F</th>', '<th class="n">against<br>cold start</th>']
    head += ['<th class="n wide">Precision</th>', '<th class="n wide">Recall</th>']
    out.append(table(head, rows, "headline"))
    out += [f"<p>{sentence}</p>" for sentence in _verdict(scores, changes)]
    if bounds:
        out.append(
            '<p class="note">Small print and whiskers: 95 % bootstrap interval over the held-out clips (1,000 draws, '
            "the same for every model). It speaks of the choice of clips, not of the training seed.</p>"
        )
    out.append("</section>")
    return "".join(out)


def _scores(run: Run) -> dict[str, float]:
    """F in percent by model, in the order of `MODELS`; from the summary, else from the evaluation itself."""
    found = {
        key_.removesuffix("_f1"): float(value)
        for key_, value in run.summary.items()
        if key_.endswith("_f1") and isinstance(value, (int, float))
    }
    for name, evaluation in run.evaluations.items():
        if isinstance(evaluation.get("f1"), (int, float)):
            found.setdefault(name, evaluation["f1"])
    return {name: found[name] for name in _in_order(found)}


def _in_order(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    return [name for name in MODELS if name in names] + sorted(name for name in names if name not in MODELS)


def _level(run: Run) -> int:
    """The level of the wheels that the run was scored at."""
    return next((evaluation["level"] for evaluation in run.evaluations.values() if "level" in evaluation), 1)


def _checked_intervals(
    run: Run, wheel: EmotionWheel, scores: Mapping[str, float]
) -> tuple[dict[str, compare.Interval], dict[str, compare.Interval]]:
    """Bootstrap intervals, only where the F recomputed from the answers is the F that was reported."""
    evaluations = {name: run.evaluations[name] for name in scores if run.evaluations.get(name, {}).get("samples")}
    bounds, changes = compare.intervals(evaluations, wheel, _level(run))
    wrong = {name for name, bound in bounds.items() if not abs(bound.f1 - scores[name]) < 0.02}
    for name in sorted(wrong):
        run.notes.append(
            f"{name}: this wheel gives F {number(bounds[name].f1)} for the answers on file, the run reported "
            f"{number(scores[name])}; no interval is drawn."
        )
    usable = {name: bound for name, bound in bounds.items() if name not in wrong}
    if "cold_start" in wrong:
        changes = {}
    return usable, {name: change for name, change in changes.items() if name not in wrong}


def _verdict(scores: Mapping[str, float], changes: Mapping[str, compare.Interval]) -> list[str]:
    """What the rows say, in words; losses are named as plainly as gains."""
    before, after = scores.get("cold_start"), scores.get("grpo")
    if before is None or after is None or not math.isfinite(before) or not math.isfinite(after):
        return []
    gain = after - before
    side = "above" if gain >= 0 else "below"
    text = f"GRPO ends <b>{number(abs(gain))} points {side} the cold start</b> it began from"
    if change := changes.get("grpo"):
        low, high = (number(bound, 1, sign=True) for bound in (change.low, change.high))
        text += f" (95 % interval of the difference: {low} to {high})"
    control = scores.get("sft_continued")
    if control is not None and math.isfinite(control):
        over = after - control
        text += (
            f", and {number(abs(over))} {'above' if over >= 0 else 'below'} supervised training carried on for as long"
        )
    sentences = [text + "."]
    shuffled = scores.get("shuffled_media")
    if shuffled is not None and math.isfinite(shuffled):
        text = f"With clips swapped between samples F falls by {number(after - shuffled)} points"
        if shuffled > after:
            text = f"With clips swapped between samples F rises by {number(shuffled - after)} points"
        if gain > 0:
            lost = (after - shuffled) / gain
            kept = "more than the whole gain" if lost > 1 else f"{max(lost, 0.0):.0%} of the gain"
            text += f": {kept} depends on seeing and hearing the right clip"
        sentences.append(text + ".")
    return sentences


def curves(run: Run) -> str:
    """GRPO's step curves, small multiples."""
    metrics = run.metrics
    if not len(metrics):
        return '<section id="training"><h2>Training</h2><p>No step has been logged.</p></section>'
    window = _window(metrics)
    by_name = [
        name for name in metrics.names if name.startswith("rewards/") and name.endswith("/mean") and name in metrics
    ]
    panels = [
        _panel(metrics, "Reward", {"reward": "mean ± std over a group"}, window, band="reward_std"),
        _panel(metrics, "Rewards by name", {name: name[8:-5] for name in by_name}, window),
        _validation_panel(metrics),
        _panel(metrics, "KL to the reference", {"kl": "nats per token"}, window, floor=0),
        _panel(metrics, "Entropy", {"entropy": "nats per token"}, window, floor=0),
        _panel(metrics, "Completion length", {"completions/mean_length": "mean, tokens"}, window),
        _panel(
            metrics,
            "Cut off at the length limit",
            {"completions/clipped_ratio": "share of completions"},
            window,
            floor=0,
        ),
        _panel(
            metrics, "Groups of equal rewards", {"frac_reward_zero_std": "share that teach nothing"}, window, floor=0
        ),
        _panel(
            metrics,
            "Clipped ratios",
            {"clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high"},
            window,
            floor=0,
        ),
        _panel(metrics, "Gradient norm", {"grad_norm": "before clipping"}, window, floor=0),
        _panel(metrics, "Loss", {"loss": "surrogate and KL"}, window),
        _panel(metrics, "Learning rate", {"learning_rate": "after the schedule"}, 1, floor=0),
        _panel(
            metrics,
            "Sampler against trainer",
            {"sampling/sampling_logp_difference/mean": "mean |Δ log p| per token"},
            window,
            floor=0,
        ),
    ]
    how = (
        f"Faint: each step. Bold: mean of the last {window} steps. Gaps are steps without a value."
        if window > 1
        else "Gaps are steps without a value."
    )
    first, last = metrics.steps[0], metrics.steps[-1]
    return (
        f'<section id="training"><h2>GRPO training</h2><p class="note">Steps {first:,.0f} to {last:,.0f}. {how}</p>'
        f'<div class="grid panels">{"".join(panels)}</div></section>'
    )


def _panel(
    metrics: Curves,
    title: str,
    names: Mapping[str, str],
    window: int,
    band: str | None = None,
    floor: float | None = None,
    colour: str = "after",
) -> str:
    """One figure of the named metrics that can be drawn; empty where there is none."""
    names = {name: label for name, label in names.items() if name in metrics}
    if not names:
        return ""
    colours = figures.colours(list(names)) if len(names) > 1 else dict.fromkeys(names, colour)
    spread = metrics[band] if band and band in metrics else None
    lines = [Line(label, metrics[name], colours[name], spread) for name, label in names.items()]
    if len(names) > 1:
        legend = "".join(key(label, colours[name]) for name, label in names.items())
    else:
        label = next(iter(names.values()))
        legend = (
            f'<span class="note">{escape(label if spread is not None or not band else label.split(" ±")[0])}</span>'
        )
    missing = sum(metrics.missing(name) for name in names)
    note = f"{plural(missing, 'value')} missing or not finite." if missing else ""
    return figure(title, figures.curve(title, metrics.steps, lines, window, floor), legend, note)


def _validation_panel(metrics: Curves, colour: str = "after") -> str:
    if "eval/f1" not in metrics:
        return ""
    title = "Validation F"
    line = Line("F", 100 * metrics["eval/f1"], colour, sparse=True)
    return figure(title, figures.curve(title, metrics.steps, [line]), '<span class="note">percent</span>')


def _window(metrics: Curves) -> int:
    """Steps that a bold curve averages; 1 where there are too few to blur."""
    return max(1, len(metrics) // 20) if len(metrics) >= 30 else 1


def supervised(run: Run) -> str:
    """The supervised curves: the cold start that GRPO begins from, and the control that went on without it."""
    out = ""
    for stage, colour in (("cold_start", "before"), ("sft_continued", "muted")):
        if stage not in run.supervised:
            continue
        metrics = run.supervised[stage]
        panels = [
            _panel(metrics, "Loss", {"loss": "nats per target token"}, _window(metrics), colour=colour),
            _validation_panel(metrics, colour),
            _panel(
                metrics, "Gradient norm", {"grad_norm": "before clipping"}, _window(metrics), floor=0, colour=colour
            ),
        ]
        title, what, _ = MODELS[stage]
        out += f'<h3>{title} <span class="note">{what}</span></h3><div class="grid panels">{"".join(panels)}</div>'
    return f'<section id="supervised"><h2>Supervised training</h2>{out}</section>' if out else ""


def time(run: Run) -> str:
    """Where a step's seconds go."""
    metrics = run.metrics
    present = [name for name in metrics.names if name.startswith("time/") and name in metrics]
    known = [f"time/{phase}" for phase in PHASES if f"time/{phase}" in present]
    names = known + sorted(set(present) - set(known))
    if not names:
        return ""
    colours = figures.colours(names)
    title = "Seconds per step"
    layers = [Line(name[5:], metrics[name], colours[name]) for name in names]
    drawing = figures.stacked("Seconds per step by phase, stacked", metrics.steps, layers)
    total = sum(float(np.nansum(metrics[name])) for name in names)
    rows = []
    for name in names:
        spent = float(np.nansum(metrics[name]))
        rows.append(
            f"<tr><td>{key(name[5:], colours[name])}</td>"
            f'<td class="n">{number(spent / len(metrics), 3)}</td><td class="n">{number(spent, 1)}</td>'
            f'<td class="n">{number(100 * spent / total, 1) if total else "–"}</td></tr>'
        )
    rows.append(
        f'<tr class="main"><td>all</td><td class="n">{number(total / len(metrics), 3)}</td>'
        f'<td class="n">{number(total, 1)}</td><td class="n">100.0</td></tr>'
    )
    head = ["<th>Phase</th>", '<th class="n">s per step</th>', '<th class="n">s in all</th>', '<th class="n">%</th>']
    return (
        '<section id="time"><h2>Time</h2><div class="grid">'
        f"{figure(title, drawing)}<div>{table(head, rows)}</div></div></section>"
    )


def wheels(run: Run, wheel: EmotionWheel) -> str:
    """The five wheels in polar form, and the table of scores per wheel."""
    chosen = [name for name in ("cold_start", "grpo") if run.evaluations.get(name, {}).get("samples")]
    out = ""
    if chosen:
        counts = compare.sector_counts({name: run.evaluations[name] for name in chosen}, wheel)
        limit = figures.rim(counts, chosen)
        before, after = (name if name in chosen else None for name in ("cold_start", "grpo"))
        drawings = [
            figure(
                _wheel_title(wheel.names[index]),
                figures.wheel(_wheel_words(wheel.names[index], count, chosen), count, before, after, limit),
                _wheel_caption(run, index, count, chosen),
                kind="wheel",
            )
            for index, count in enumerate(counts)
        ]
        legend = key("ground truth", "muted", "truth") + "".join(
            "<br>" + key(f"{MODELS[name][0]}, right", MODELS[name][2]) + key("wrong", MODELS[name][2], "miss")
            for name in chosen
        )
        out += (
            f'<div class="grid"><div><p>{legend}</p><p>How often a sector is named, as a share of the clips that the '
            "wheel scores.</p><p><b>Grey with a firm edge</b> is the ground truth. A bar is a model: solid where the "
            "ground truth of the clip names the sector too, pale where it does not.</p><p>A perfect model is solid up "
            "to the edge and has nothing pale. Solid against the edge is the sector's recall, solid against the whole "
            f"bar its precision.</p></div>{''.join(drawings)}</div>"
        )
    out += _per_wheel(run, wheel)
    return f'<section id="wheels"><h2>Emotion wheels</h2>{out}</section>' if out else ""


def _wheel_words(name: str, counts: compare.SectorCounts, models: Sequence[str]) -> str:
    """The drawing in words, for those who hear the page."""
    parts = []
    for index, sector in enumerate(counts.sectors):
        said = ", ".join(f"{MODELS[m][0]} {counts.named[m][index]} ({counts.hits[m][index]} right)" for m in models)
        parts.append(f"{sector}: ground truth {counts.truth[index]}, {said}")
    return f"{_wheel_title(name)}, {counts.scored} clips. " + "; ".join(parts)


def _wheel_title(name: str) -> str:
    """`wheel1` → `Wheel 1`; other names stay as they are, but for the first letter."""
    return re.sub(r"^[Ww]heel(?=\d)", "Wheel ", name[:1].upper() + name[1:])


def _wheel_caption(run: Run, index: int, counts: compare.SectorCounts, models: Sequence[str]) -> str:
    scores = []
    for name in models:
        values = (run.evaluations[name].get("per_wheel") or {}).get("f1") or []
        if index < len(values):
            scores.append(number(values[index], 1))
    level = f" at level {_level(run)}" if _level(run) != compare.LEVEL else ""
    change = f"F{level} {' → '.join(scores)}, " if scores else ""
    return f'<span class="note">{change}{plural(counts.scored, "clip")} scored</span>'


def _per_wheel(run: Run, wheel: EmotionWheel) -> str:
    """F, P and R of every model on every wheel."""
    rows = []
    for name in _in_order(run.evaluations):
        evaluation = run.evaluations[name]
        per_wheel = evaluation.get("per_wheel")
        if not isinstance(per_wheel, dict):
            continue
        cells = []
        columns = [
            [_at(per_wheel.get(kind), index) for kind in ("f1", "precision", "recall")]
            for index in range(len(wheel.names))
        ]
        columns.append([evaluation.get(kind) for kind in ("f1", "precision", "recall")])
        for f1, precision, recall in columns:
            cells.append(
                f'<td class="n"><b>{number(f1, 1)}</b><small>{number(precision, 1)} / {number(recall, 1)}</small></td>'
            )
        rows.append(f"<tr><td>{escape(MODELS.get(name, (name,))[0])}</td>{''.join(cells)}</tr>")
    if not rows:
        return ""
    head = ["<th>F, below it precision / recall, percent</th>"]
    head += [f'<th class="n">{escape(_wheel_title(name))}</th>' for name in wheel.names] + ['<th class="n">mean</th>']
    return "<h3>Scores per wheel</h3>" + table(head, rows)


def _at(values: Any, index: int) -> Any:
    return values[index] if isinstance(values, list) and index < len(values) else None


def held_out(run: Run, samples: Mapping[str, Sample], wheel: EmotionWheel) -> str:
    """Improvements and failures among the held-out clips, with frames of each."""
    before, after = (run.evaluations.get(name) or {} for name in ("cold_start", "grpo"))
    pairs = compare.pairs(before, after)
    if not pairs:
        return ""
    lookup = compare.SectorLookup(wheel)
    better = sum(pair.change > 0 for pair in pairs)
    worse = sum(pair.change < 0 for pair in pairs)
    best, failed = compare.choose(pairs)

    def cards(chosen: Sequence[compare.Pair]) -> str:
        return "".join(_clip(pair, samples.get(pair.name), lookup) for pair in chosen)

    out = (
        '<section id="held-out"><h2>Held-out clips</h2>'
        f"<p>Of {plural(len(pairs), 'scored clip')}, <b>{better}</b> score higher after GRPO than before, {worse} "
        f"lower, {len(pairs) - better - worse} the same.</p>"
        '<p class="note"><span class="label hit">green</span> shares its sector with the ground truth on most wheels, '
        '<span class="label miss">red</span> does not, <span class="label unknown">dashed</span> is on no wheel on '
        "which the clip is scored. F is the clip's own, mean over wheels.</p>"
    )
    if best:
        out += f"<h3>Largest improvements</h3>{cards(best)}"
    if failed:
        out += f"<h3>Failures: largest losses, then the lowest scores</h3>{cards(failed)}"
    return out + "</section>"


def _clip(pair: compare.Pair, sample: Sample | None, lookup: compare.SectorLookup) -> str:
    truth_labels = compare.ground_truth_labels(pair.after.get("ground_truth"))
    truth = lookup.sets(truth_labels)
    subtitle = getattr(sample, "subtitle", "") or ""
    spoken = f"<q>{escape(shorten(subtitle, 240))}</q>" if subtitle else '<p class="note">no subtitle</p>'
    lines = f"<dt>ground truth</dt><dd>{''.join(_chip(label, '') for label in truth_labels)}</dd><dd></dd>"
    for title, answer in (("cold start", pair.before), ("GRPO", pair.after)):
        labels = [str(label) for label in answer.get("labels") or []]
        chips = "".join(_judged(label, truth, lookup) for label in labels) or '<span class="note">no label</span>'
        text = str(answer.get("answer") or "")
        # the words themselves, where they say more than the labels taken from them
        raw = "" if _plain_list(text, labels) else f'<div class="raw">{escape(shorten(text))}</div>'
        f1 = f'<span class="note">F</span> {number(answer["f1"], 1)}'
        lines += f'<dt>{title}</dt><dd>{chips}{raw}</dd><dd class="f">{f1}</dd>'
    return (
        f'<div class="clip"><div>{_frames(sample)}<div class="id">{escape(pair.name)}</div></div>'
        f"<div>{spoken}<dl>{lines}</dl></div></div>"
    )


def _plain_list(text: str, labels: Sequence[str]) -> bool:
    """True where an answer says its labels and no more, tags and brackets aside."""
    words = re.sub(r"</?\w+>|[\[\]\s]", "", text)
    return words.lower() == re.sub(r"\s", "", ",".join(labels)).lower()


def _judged(label: str, truth: list[set[str]], lookup: compare.SectorLookup) -> str:
    share = lookup.share(label, truth)
    return _chip(label, "unknown" if share is None else "hit" if share > 0.5 else "miss")


def _chip(label: str, kind: str) -> str:
    return f'<span class="label {kind}">{escape(shorten(label, 60))}</span>'


def _frames(sample: Sample | None, count: int = 3, size: int = 148) -> str:
    """Thumbnails of a clip; a placeholder that says why where there is none to show."""
    if sample is None:
        return '<div class="frames none">this clip was not given to the report</div>'
    if sample.video is None:
        return '<div class="frames none">no video</div>'
    try:
        from PIL import Image

        from affectgpt.data.media import read_frames

        frames = read_frames(sample.video)
        images = []
        for index in np.linspace(0, len(frames) - 1, count + 2).round().astype(int)[1:-1]:
            buffer = io.BytesIO()
            Image.fromarray(frames[index]).resize((size, size), Image.Resampling.LANCZOS).save(
                buffer, "JPEG", quality=72
            )
            data = base64.b64encode(buffer.getvalue()).decode()
            images.append(f'<img alt="frame {index + 1} of {len(frames)}" src="data:image/jpeg;base64,{data}">')
    except Exception as error:  # whatever a decoder makes of a broken file, the report is written
        return f'<div class="frames none" title="{escape(error)}">the video cannot be read</div>'
    return f'<div class="frames">{"".join(images)}</div>'


def completions(run: Run, wheel: EmotionWheel) -> str:
    """Groups of completions over training: best, middle and worst member of each."""
    groups = compare.follow(run.completions)
    if not groups:
        return ""
    lookup = compare.SectorLookup(wheel)
    prompts = {str(rows[0]["prompt_id"]) for rows in groups}
    if len(prompts) == 1 and len(groups) > 1:
        how = "One prompt followed through training, the one that came up most often."
    else:
        how = "At each step shown, the group whose mean reward is the median of the step's groups."
    out = [
        f'<section id="completions"><h2>Completions over training</h2><p class="note">{how} Of its members: the best, '
        "the middle and the worst by reward.</p>"
    ]
    for rows in groups:
        ranked = sorted(rows, key=lambda row: -_or(compare.reward_of(row), -math.inf))
        shown = sorted({0, (len(ranked) - 1) // 2, len(ranked) - 1})
        truth_labels = compare.ground_truth_labels(rows[0].get("ground_truth"))
        truth = lookup.sets(truth_labels)
        rewards = [name for row in rows for name in row.get("rewards") or {}]
        names = list(dict.fromkeys(rewards))
        rewards_mean = compare.mean_reward(rows)
        head = ["<th>Completion</th>", "<th>Labels</th>", *(f'<th class="n">{escape(name)}</th>' for name in names)]
        head += ['<th class="n">reward</th>', '<th class="n">advantage</th>', '<th class="n">tokens</th>']
        body = []
        for index in shown:
            row = ranked[index]
            chips = "".join(_judged(str(label), truth, lookup) for label in row.get("labels") or [])
            values = "".join(f'<td class="n">{number((row.get("rewards") or {}).get(name))}</td>' for name in names)
            cut = "<small>cut off</small>" if row.get("finish_reason") == "length" else ""
            text = f'<div class="raw">{escape(shorten(str(row.get("text") or "")))}</div>'
            body.append(
                f"<tr><td>{text}</td><td>{chips}</td>{values}"
                f'<td class="n"><b>{number(row.get("reward"))}</b></td>'
                f'<td class="n">{number(row.get("advantage"), sign=True)}</td>'
                f'<td class="n">{escape(row.get("length", "–"))}{cut}</td></tr>'
            )
        out.append(
            f'<div class="group"><h3>Step {rows[0]["step"]:,} <span class="note">{escape(rows[0]["prompt_id"])}, '
            f"{plural(len(rows), 'completion')}, mean reward {number(rewards_mean)}</span></h3>"
            f'<div><span class="note">ground truth</span> {"".join(_chip(label, "") for label in truth_labels)}</div>'
            f"{table(head, body)}</div>"
        )
    return "".join([*out, "</section>"])


def _or(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise


def settings(run: Run) -> str:
    """The summary's other entries, the software at hand, and the configuration word for word."""
    facts = {
        name: value
        for name, value in run.summary.items()
        if not name.endswith("_f1") and isinstance(value, (str, int, float, bool))
    }
    environment = run.summary.get("environment")
    if isinstance(environment, dict):
        facts |= environment
        software = ""
    else:
        versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
        software = f'<p class="note">Software when this report was written: {escape(versions)}.</p>'
    rows = [
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{escape(value)}</td></tr>" for name, value in facts.items()
    ]
    config = f"<h3>config.yaml</h3><pre>{escape(run.config.strip())}</pre>" if run.config.strip() else ""
    return (
        '<section id="settings"><h2>Settings and environment</h2>'
        f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>{software}{config}</section>'
    )


def _versions() -> dict[str, str]:
    import platform
    from importlib import metadata

    versions = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("grpo-core", "torch", "triton", "transformers", "peft", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions

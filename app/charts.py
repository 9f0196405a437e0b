"""Small drawings that change with every switch of a stack: HTML and SVG text, light enough to be redrawn at once.

Colours come from the page's CSS variables, so light and dark need no second drawing. Knows nothing about models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.norms import Effect
from analysis.palette import source_name
from analysis.subsets import SubsetRun
from app.markup import escape
from model.plan import Plan

MAX_TOKENS = 24  # of the target shown in the bars


def effect_table(effect: Effect) -> str:
    """Sources x layers as tinted cells; a ring where a source enters. The values are in each cell's title."""
    n_layers = effect.values.shape[1] - 1
    high = float(effect.values.max(initial=0.0)) or 1.0
    enters = {(entry.source, entry.layer) for entry in effect.plan if not entry.in_tower}
    step = max(1, math.ceil((n_layers + 1) / 14))
    names = [str(layer) if layer % step == 0 else "" for layer in range(n_layers)] + ["out"]
    head = "".join(f'<span class="dl-h">{name}</span>' for name in names)
    rows = [f"<span></span>{head}"]
    used = effect.plan.sources()
    for source, values in zip(effect.sources, effect.values, strict=True):
        off = "" if source in used else " dl-faint"
        cells = [
            f'<span class="dl-row-name{off}" style="color:var(--source-{source}-text)">{source_name(source)}</span>'
        ]
        for layer, value in enumerate(values):
            where = "final output" if layer == n_layers else f"input of layer {layer}"
            ring = " dl-enters" if (source, layer) in enters else ""
            cells.append(
                f'<span class="dl-cell dl-w{ring}" style="--v:{value / high:.3f};--c:var(--source-{source})" '
                f'title="{source_name(source)}, {where}: {value:.3f}"></span>'
            )
        rows.append("".join(cells))
    return (
        f'<div class="dl-effects" role="img" aria-label="Effect of each source by layer, 0 to {high:.2f}" '
        f'style="--n:{n_layers + 1}">{"".join(rows)}</div>'
        f'<div class="dl-key">0 <i></i> {high:.2f} · ring: where it enters · columns: inputs of LLM layers</div>'
    )


def shapley_bars(run: SubsetRun) -> str:
    """Per token of the target one bar per stack: its share of the log-probability, in nats."""
    count = min(len(run.tokens), MAX_TOKENS)
    if not run.stacks or not count:
        return ""
    values = run.shapley[:, :count]
    high, low = max(float(values.max()), 0.0), min(float(values.min()), 0.0)
    span = (high - low) or 1.0
    step, height, top = 11 if len(run.stacks) <= 6 else 8, 110, 26
    width = step * len(run.stacks) + 14
    zero = top + height * high / span
    groups = []
    for t in range(count):
        shown = run.tokens[t].strip() or "␣"
        parts = [f'<line x1="0" x2="{width}" y1="{zero:.1f}" y2="{zero:.1f}" class="dl-axis"/>']
        parts.append(f'<text x="{width / 2:.1f}" y="16" class="dl-letter">{escape(shown[:8])}</text>')
        for i, stack in enumerate(run.stacks):
            value = float(values[i, t])
            tall = abs(value) / span * height
            y = zero - tall if value > 0 else zero
            parts.append(
                f'<rect x="{8 + i * step}" y="{y:.1f}" width="{step - 2}" height="{max(tall, 0.5):.1f}" rx="1.5" '
                f'fill="var(--source-{stack})">'
                f"<title>{source_name(stack)}, “{escape(shown)}”: {value:+.2f}{_give(run, i, t)} nats</title></rect>"
            )
        groups.append(f'<svg width="{width}" height="{top + height + 8}" aria-hidden="true">{"".join(parts)}</svg>')
    more = f" First {count} of {len(run.tokens)} tokens." if count < len(run.tokens) else ""
    key = " ".join(f'<b style="color:var(--source-{s}-text)">{source_name(s)}</b>' for s in run.stacks)
    return (
        f'<div class="dl-bars" role="img" aria-label="Share of each stack in each token, {low:.2f} to {high:.2f} nats">'
        f'{"".join(groups)}</div><div class="dl-key">{key} · {low:.1f} to {high:.1f} nats.{more}</div>'
    )


def _give(run: SubsetRun, stack: int, token: int) -> str:
    """The standard error of a sampled value; nothing for an exact one."""
    return "" if run.error is None else f" ± {run.error[stack, token]:.2f}"


def subset_strip(run: SubsetRun, plan: Plan, truth: str = "") -> str:
    """One card per answered on/off state of the stacks: its answer; the state of now is outlined. A click sets
    that plan."""
    cards = []
    full = run.rows[0].answer.text if run.rows else ""
    for row in run.rows:
        good = bool(row.match) if truth else row.answer.text == full
        said = row.answer.text.strip() or "(empty)"
        dots = "".join(
            f'<i class="{"" if stack in row.on else "dl-no"}" style="--c:var(--source-{stack})"></i>'
            for stack in run.stacks
        )
        classes = "dl-subset" + " dl-good" * good + " dl-now" * (row.plan == plan)
        verdict = ("right" if good else "wrong") if truth else ("as with all on" if good else "differs")
        code = escape(str(row.plan))
        cards.append(
            f'<button type="button" class="{classes}" data-plan="{code}" title="{code}: {verdict}" '
            f'aria-pressed="{str(row.plan == plan).lower()}"><span class="dl-dots">{dots}</span>'
            f"<span>{escape(row.label)}</span><b>{escape(said[:60])}{'…' * (len(said) > 60)}</b></button>"
        )
    return f'<div class="dl-subsets" role="group" aria-label="Subsets of the stacks">{"".join(cards)}</div>'


def bar_list(rows: Sequence[tuple[str, float]]) -> str:
    """Text and log-probability as a short list of bars, best first."""
    items = []
    for text, logprob in rows:
        p = math.exp(min(logprob, 0.0))
        shown = text.strip() or {"": "(end)"}.get(text, "␣")
        items.append(
            f'<li><code>{escape(shown[:24])}</code><span class="dl-p" style="--p:{p:.3f}"></span>'
            f"<span>{p:.1%}</span></li>"
        )
    return f'<ol class="dl-top5">{"".join(items)}</ol>'

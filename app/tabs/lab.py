"""Lab: the paper's experiments at toy size beside the paper's numbers, and how the samplings deal tokens out.

Handlers first, layout below. Every number comes from assets/lab/results.jsonl (`analysis.lab`) and stands beside the
command that makes it again; nothing is run or trained here. The step-through picture is app/dealing.py and
assets/js/deal.js.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import gradio as gr
from gradio import processing_utils
from gradio.utils import get_upload_folder

from analysis import budget, claims, figures, lab
from analysis.lab import Interval, Row, Run, Search, Setting, Summary
from app import asking, dealing, markup
from app.desk import Desk
from app.lab_files import FIGURES, FIRST, KINDS, drawable, shown_curves, taken
from app.session import Focus
from app.wiring import bound, in_turn, line_of
from model.errors import UserError
from model.lab import ship
from model.lab.variants import variant_of
from model.loading import EMBEDDED, LAB
from model.plan import BASE
from model.probe import AttentionWish, Probe
from model.types import Sampling

BUSY = '<p class="dl-note dl-busy" role="status">The results are being read …</p>'
INTRO = (
    '<p class="dl-note">Small models, as alike as the question allows: the same scenes and steps, the same frozen '
    "vision tower unless a row says otherwise. Ours are shares of questions answered right, of each code one by colour "
    "and one by place; the paper's are its benchmarks. Two different scales, side by side: what can be compared is the "
    "sign.</p>"
)

PLACES = {
    "dl-lab-table": "row by row",
    "dl-lab-axes": "figure 3",
    "dl-lab-acuity": "glyph height",
    "dl-lab-budget": "budget",
    "dl-lab-recall": "recall of a text",
    "dl-lab-cost": "cost",
    "dl-lab-search": "search",
    "dl-deal": "how tokens are dealt out",
    "dl-lab-keep": "what a budget keeps",
}
NOTHING, EMPTY = "–", ' class="dl-none"'  # a cell of the table without a value, left out where the window is narrow
START_BUDGET = 50.0  # % of the rows, where the slider stands at first
LACKING = {"dl-lab-axes": "along figure 3", "dl-lab-acuity": "acuity", "dl-lab-budget": "budget"}
LACKING |= {"dl-lab-recall": "recall", "dl-lab-cost": "cost"}  # places that are there only where a figure can be drawn


# ---- handlers: plain values in, plain values out


def results(
    desk: Desk,
    dark: bool,
    setting: str,
    metric: str,
    bench: str,
    cost: str,
    curves: Sequence[str] | None,
    percent: float = START_BUDGET,
) -> tuple:
    """All views of the results file: (head, body, setting, curves, table, variants, axes, acuity, budget, recall,
    cost, what is said of the slider's budget, searches). percent: that budget, marked in its figure. A choice that
    there is not leaves all as it was, and is told in the head: this event is not queued, and gradio shows no error of
    one that is not."""
    nothing = (gr.skip(), gr.skip(), "", None, None, None, None, None, None, "", "")
    try:
        runs, searches = lab.read(lab.RESULTS), lab.read_searches(lab.SEARCHES)
    except UserError as error:
        return wrong(error), gr.Column(visible=False), *nothing
    if not runs:
        return empty(), gr.Column(visible=False), *nothing
    try:
        found, offered = chosen(runs, setting, metric, bench)
        if cost not in lab.COSTS:
            raise UserError(f"There is no cost “{cost}”; choose one of {', '.join(lab.COSTS)}.")
    except UserError as error:
        return wrong(error), *(gr.skip(),) * 12
    shown = shown_curves(found, curves)
    drawn = lab.curves(found, shown)
    full = drawable(found, drawn)
    return (
        head(found, full, bool(searches)),
        gr.Column(visible=True),
        gr.Dropdown([str(each) for each in offered], value=str(found.setting)),
        gr.Dropdown([row.variant for row in found.rows if len(row.acuity.n)], value=shown),
        results_table(desk, found),
        figures.lab_variants(found, dark) if full["variants"] else None,
        figures.lab_axes(found, dark) if full["along figure 3"] else None,
        figures.acuity_curves(drawn, dark) if full["acuity"] else None,
        budget_figure(found, percent, dark),
        figures.lab_recall(found, dark) if full["recall"] else None,
        figures.lab_cost(found, cost, dark) if any(row.spent(cost) is not None for row in found.pictures) else None,
        at_budget(found, percent),
        "".join(search_panel(each, runs) for each in searches),
    )


def deal(desk: Desk, model: str, focus: Focus) -> dict | None:
    """The step-through picture of the image in focus, None without one; {"lacks": why} for one that is gone."""
    try:
        held = desk.held(focus.images[0]) if focus.images else None
    except UserError as error:
        return {"lacks": str(error)}
    return dealing.deal_value(desk.engine(model), held)


def keep(desk: Desk, ranking: str, percent: float, dark: bool, model: str, focus: Focus) -> tuple:
    """What a budget would keep of the image in focus: (what is missing in words, the map over the image, what both
    are of)."""
    if ranking not in budget.RANKINGS or not 0 < percent <= 100:
        raise UserError(f"A budget is ranked {' or '.join(budget.RANKINGS)}, above 0 to 100 %, not {percent:g} %.")
    engine = desk.engine(model)
    plan, names = engine.layout.default, [source.name for source in engine.layout.sources]
    stacks = [names.index(source) for source in plan.sources() if source != BASE and source in names]
    of = (engine.name, focus.images, focus.question if ranking == "question" else "")
    lacks = ""
    if not focus.images:
        lacks = "No image yet: upload one, or pick an example."
    elif not stacks:
        lacks = f"{engine.name} adds no stacks to the language model, so there is nothing to keep or leave out."
    elif ranking == "question" and not focus.question.strip():
        lacks = "No question yet: ask one in Chat, or pick an example."
    if lacks:
        return f'<p class="dl-note">{markup.escape(lacks)}</p>', None, of
    prompt = engine.prompt([asking.user_message(desk, focus.images[:1], focus.question.strip() or "?")])
    if ranking == "norm":
        relevance = budget.by_norm(engine.features(prompt)[stacks].float().cpu().numpy())
    else:
        layer, end = engine.layout.attention_layers[0], max(int(grid.positions.max()) for grid in prompt.grids) + 1
        wish = AttentionWish((layer,), tuple(range(end, prompt.input_ids.shape[1])))
        answer = engine.answer(prompt, plan, Sampling(max_new_tokens=1))
        relevance = budget.by_question(engine.replay(prompt, answer, plan, Probe(attention=(wish,))), layer)
    counts = budget.kept(relevance, len(stacks), percent / 100)
    shown = budget.kept_map(counts, len(stacks), prompt.grids[0])
    return "", figures.image_map(shown, prompt.picture(0), dark=dark), of


def unkeep(desk: Desk, of: tuple, model: str, focus: Focus) -> tuple:
    """Takes away what `keep` has shown of another image, question or model. Returns what it returns."""
    if not of or (of[:2] == (model, focus.images) and of[2] in ("", focus.question)):
        return (gr.skip(),) * 3
    return "", None, ()


def mark(desk: Desk, percent: float, dark: bool, setting: str, metric: str, bench: str) -> tuple:
    """The slider's budget on the curve of budgets: (that figure, what the runs say of it)."""
    runs = lab.read(lab.RESULTS)
    if not runs:
        return None, ""
    try:
        found, _ = chosen(runs, setting, metric, bench)
    except UserError as error:  # as in `results`
        return gr.skip(), wrong(error)
    return budget_figure(found, percent, dark), at_budget(found, percent)


def take(
    desk: Desk, what: str, kind: str, setting: str, metric: str, bench: str, cost: str, curves: Sequence[str] | None
) -> str:
    """A figure or its table as a file; returns its path."""
    if what not in FIGURES or kind not in KINDS:
        raise UserError(f"There is no “{what}” as {kind}; choose one of {', '.join(FIGURES)}, as {', '.join(KINDS)}.")
    runs = lab.read(lab.RESULTS)
    if not runs:
        raise UserError(f"There are no results yet; run {lab.run_command(FIRST, (0, 1, 2))} first.")
    found, _ = chosen(runs, setting, metric, bench)
    name = f"deepstack-lens-{FIGURES[what]}.{kind}"
    data = taken(runs, found, what, kind, cost, shown_curves(found, curves))
    return processing_utils.save_bytes_to_cache(data, name, cache_dir=get_upload_folder())


def shipped(desk: Desk, variant: str) -> str:
    """The name under which a variant's checkpoint can be asked here, "" where none ships."""
    name = f"{EMBEDDED}/{LAB}{variant}"
    return name if name in desk.zoo.offered else ""


# ---- what is shown


def budget_figure(found: Summary, percent: float, dark: bool):
    """The curve of budgets with the slider's, None without a run."""
    return figures.lab_budget(found, dark, budget.entering(percent / 100)) if lab.budgets(found) else None


def at_budget(found: Summary, percent: float) -> str:
    """What the runs say of the slider's budget."""
    return f'<p class="dl-note">{markup.escape(lab.at_budget(found, budget.entering(percent / 100)))}</p>'


def chosen(runs: Sequence[Run], setting: str, metric: str, bench: str) -> tuple[Summary, list[Setting]]:
    """(the summary of one setting, all settings there are); the fullest one where none is named."""
    found = lab.settings(runs)
    named = {str(each): each for each in found}
    if setting and setting not in named:
        raise UserError(f"There are no runs of “{setting[:60]}”; there are of {', '.join(named)}.")
    here = named[setting] if setting else next(iter(found))
    summary = lab.summary(found[here], metric, bench)
    if not summary.rows:
        raise UserError(f"No run of {here} has the metric “{metric}”; choose another.")
    return summary, list(found)


def wrong(error: UserError) -> str:
    """A mistake, in words."""
    return f'<p class="dl-error" role="alert">{markup.escape(str(error))}</p>'


def empty() -> str:
    """What is shown while nothing has been run."""
    words = (
        "Nothing has been trained here so far, so there is no number to show. Most runs of the size small took 10 "
        "to 14 minutes on one core of a CPU that multiplies bfloat16 (AMX, AVX-512 BF16), strings and full texts "
        "twice that; each is one line of assets/lab/results.jsonl, and this tab reads nothing else."
    )
    return (
        f'<div class="dl-empty"><b>No results yet</b><p>{words}</p>'
        f"{code(lab.run_command(FIRST, (0, 1, 2)))}{code('python -m app lab list')}"
        "<p>The picture below needs no results.</p></div>"
    )


def head(found: Summary, full: Mapping[str, bool], searched: bool) -> str:
    """How many rows agree with the paper in sign, and what is missing. full: which figures can be drawn."""
    kinds = [found.judge(row).kind for row in found.rows]
    agree, differ, neither = (kinds.count(kind) for kind in ("agrees", "disagrees", "cannot decide"))
    told = f"Of our variants <b>{agree}</b> agree with the paper in sign, <b>{differ}</b> disagree"
    told += f", <b>{neither}</b> cannot decide"
    seeds = ""
    if found.scatter:
        ends = " to ".join(dict.fromkeys(f"{100 * each(found.scatter):.1f}" for each in (min, max)))
        several = f"{len(found.scatter)} variant{'s' if len(found.scatter) > 1 else ''} run more than once"
        seeds = f" · between seeds {ends} points (standard deviation of {several}; each interval counts its variant’s "
        seeds += "own, drawn toward the others’ by as much as these are alike)"
    lines = [f'<p class="dl-lab-count" role="status">{told} <span>· {found.setting}{seeds}</span></p>']
    lines.append(navigation(full, searched))
    missing = [variant for variant in lab.PAPER if found.row(variant) is None]
    if found.reference is None:
        words = f"The reference {lab.REFERENCE} has not been run at this setting, so nothing can be compared with it."
        lines.append(f'<p class="dl-error">{words}</p>{code(lab.run_command([lab.REFERENCE], (0,), found.setting))}')
    elif missing:
        seeds = found.reference.seeds
        lines.append(
            f"<details><summary>{len(missing)} variants with a counterpart in the paper have no run at this setting"
            "</summary>"
            f"{code(lab.run_command(missing, seeds, found.setting))}</details>"
        )
    return INTRO + "".join(lines) + claims_panel(found)


def navigation(full: Mapping[str, bool], searched: bool) -> str:
    """Links to what there is on this tab."""
    hidden = {place for place, figure in LACKING.items() if not full[figure]}
    hidden |= set() if searched else {"dl-lab-search"}
    links = "".join(f'<a href="#{place}">{words}</a>' for place, words in PLACES.items() if place not in hidden)
    return f'<nav class="dl-lab-nav" aria-label="On this tab">{links}</nav>'


def claims_panel(found: Summary) -> str:
    """What the paper claims, claim by claim, and what these runs say of it."""
    lines = []
    for finding in claims.findings(found):
        claim, kind = finding.claim, finding.kind
        shown = "".join(f"<li>{markup.escape(outcome.words)}</li>" for outcome in finding.outcomes)
        lines.append(
            f'<li><span class="dl-verdict dl-{kind}">{claims.MARKS[kind]} {kind}</span>'
            f"<div><b>{markup.escape(claim.words)}</b> <small>{claim.source}</small><ul>{shown}</ul>"
            f"<small>{markup.escape(claim.caution)}</small></div></li>"
        )
    return (
        f'<div class="dl-panel"><h3>What the paper claims <small>{markup.escape(found.words)}</small></h3>'
        f'<ul class="dl-lab-claims">{"".join(lines)}</ul>{markup.say("lab_claims")}</div>'
    )


def results_table(desk: Desk, found: Summary) -> str:
    """Variant by variant: ours, the difference to its control, the paper's, the verdict, costs, and how to make it
    again."""
    coarse = found.under("coarse")
    parts = [
        '<table class="dl-lab-table"><thead><tr><th>Variant</th><th>Ours, %</th>'
        f"<th>Against its control</th><th>Paper, {found.bench}</th><th>Sign</th><th>Coarse, %</th><th>Cost</th>"
        "</tr></thead>"
    ]
    for group in dict.fromkeys(row.group for row in found.rows):
        limits = lab.CANNOT_SAY.get(group, "")
        parts.append(
            f'<tbody><tr class="dl-lab-group"><th colspan="7" scope="rowgroup">{markup.escape(group)}'
            f"<small>{markup.escape(limits)}</small></th></tr>"
        )
        parts += [_row(desk, found, coarse, row) for row in found.rows if row.group == group]
        parts.append("</tbody>")
    parts.append("</table>")
    again = "".join(code(each) for each in lab.commands(found.rows))
    return (
        f'<div class="dl-panel"><h3>Row by row <small>{markup.escape(found.words)}, {found.setting}</small></h3>'
        f"{''.join(parts)}{markup.say('lab_table')}"
        f'<p class="dl-note">{markup.escape(found.pairs)} “Numbers only” beside a row: no model of the app does what '
        "the training of that variant does.</p>"
        f"<details><summary>What makes all of this again</summary>{again}{code('python -m app lab table')}</details>"
        "</div>"
    )


def search_panel(search: Search, runs: Sequence[Run]) -> str:
    """A search for where stacks enter: its rungs, its winner, and whether that beats the paper's rule of thumb."""
    heads = "".join(f"<th>{head.capitalize()}</th>" for head in lab.RUNG)
    parts = []
    for rung in search.rungs:
        lines = "".join(
            f"<tr>{''.join(f'<td>{markup.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rung.rows
        )
        opened = " open" if rung is search.rungs[-1] else ""
        parts.append(
            f"<details{opened}><summary>step {rung.step:,}: {rung.count} runs, {rung.kept} kept</summary>"
            f'<table class="dl-lab-rung"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></details>'
        )
    words = (
        f"{search.rungs[0].count} of {search.candidates} placements, drawn by chance, evenly over numbers of stacks; "
        "at each step the better half went on, ranked on validation scenes. "
        f"{search.spent:,} of {search.budget:,} training steps were spent; the runs that the winner is compared with "
        "are not counted."
    )
    return (
        f'<div class="dl-panel"><h3>A search for where stacks enter <small>{search.setting}</small></h3>'
        f'<p class="dl-lab-count">{markup.escape(lab.outcome(search, runs))}</p><p class="dl-note">{words}</p>'
        f"{''.join(parts)}{markup.say('lab_search')}{code(search.command)}</div>"
    )


def _row(desk: Desk, found: Summary, coarse: Summary, row: Row) -> str:
    gap, verdict, paper = found.difference(row), found.judge(row), lab.PAPER.get(row.variant)
    side, control = coarse.row(row.variant), found.against(row)
    against = "" if control == row.variant else f"against {markup.escape(control)}"
    printed, own = NOTHING, markup.escape(lab.what(row.variant))
    if row.runs[0].gates:
        own += f"; learned, seed {row.seeds[0]}: {', '.join(f'{gate:.2f}' for gate in row.runs[0].gates)}"
    if paper is not None and paper.scores:
        change = f" ({paper.difference(found.bench):+.1f})" if against else ""
        printed = f"{paper.scores[found.bench]:.1f}{change}<small>{markup.escape(paper.source)}</small>"
    elif paper is not None and paper.sign:
        printed = f"{'better' if paper.sign > 0 else 'worse'}<small>{markup.escape(paper.source)}</small>"
    kind = verdict.kind.replace(" ", "-")
    why = f"<small>{markup.escape(verdict.why)}</small>" if paper or not against else ""
    cells = {
        "Variant": f"<b>{markup.escape(row.variant)}</b><small>{own}</small>{_offer(desk, row)}",
        "Ours, %": _share(row),
        "Against its control": _points(gap, against) if against else NOTHING,
        f"Paper, {found.bench}": printed,
        "Sign": f'<span class="dl-verdict dl-{kind}">{verdict.mark} {verdict.kind}</span>{why}',
        "Coarse, %": NOTHING if side is None else _share(side),
        "Cost": _costs(row),
    }
    first, *rest = cells.items()
    line = f'<th scope="row" data-label="Variant">{first[1]}</th>'
    line += "".join(
        f'<td data-label="{markup.escape(name)}"{EMPTY * (value == NOTHING)}><div>{value}</div></td>'
        for name, value in rest
    )
    return f'<tr>{line}</tr><tr class="dl-lab-again"><td colspan="7">{code(row.command)}</td></tr>'


def _share(row: Row) -> str:
    seeds = f": {', '.join(f'{100 * share:.1f}' for share in row.shares)}" if len(row.runs) > 1 else ""
    return f"<span>{row.mean.percent}</span><small>{row.mean.percent_ends}, <br>{row.counted}{seeds}</small>"


def _points(gap: Interval | None, against: str) -> str:
    if gap is None:
        return f"{NOTHING}<small>{against}: not run</small>"
    return f"{gap.points}<small>{gap.points_ends}, <br>{against}</small>"


def _costs(row: Row) -> str:
    def told(name: str, *costs: tuple) -> str:
        # a number stays with its unit
        shown = [show(value).replace(" ", "\u00a0") for cost, show in costs if (value := row.spent(cost))]
        return f"{name} {', '.join(shown)}".strip() if shown else ""

    def flops(value: float) -> str:
        return f"{si(value)}FLOP"

    def held(value: float) -> str:
        return f"{si(value)}B"

    lines = [
        told("prefill", ("prefill_flops", flops), ("prefill_seconds", markup.milliseconds), ("prefill_bytes", held)),
        told("tower", ("tower_flops", flops)),
        told("step", ("step_flops", flops), ("step_seconds", markup.milliseconds), ("step_bytes", held)),
        told("", ("parameters", lambda value: f"{si(value)} parameters".replace("  ", " "))),
    ]
    context = told("", ("context", lambda value: f"{value:.0f} rows"))
    return f"{context or NOTHING}<small>{', <br>'.join(filter(None, lines))}</small>"


def si(value: float) -> str:
    """Three digits with a decimal prefix: '1.2 G', '512 M'."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _offer(desk: Desk, row: Row) -> str:
    """Buttons to ask a variant, where its checkpoint ships; else how it could be asked."""
    name = shipped(desk, row.variant)
    if not name:
        return f'<span class="dl-offer dl-note">{_unshipped(row)}</span>'
    name = markup.escape(name)
    chips = "".join(
        f'<button type="button" class="dl-chip" data-go="{go}" data-name="{name}" '
        f'aria-label="{words}: {markup.escape(row.variant)}">{words.removeprefix("put ")}</button>'
        for go, words in (("chat", "chat with it"), ("compare", "put into Compare"))
    )
    return f'<span class="dl-offer">{chips}</span>'


def _unshipped(row: Row) -> str:
    """What is said of a variant that cannot be asked here: no model of the app does what its training does, or what
    makes its model."""
    try:
        ship.check(variant_of(row.variant))
    except UserError:
        return "numbers only"
    command = markup.escape(lab.ship_command(row.variant, row.seeds[0], Setting.of(row.runs[0])))
    return (
        f'to ask it, once run: <code title="{command}">lab ship {markup.escape(row.variant)}</code>'
        f'<button type="button" class="dl-copy-code" data-copy="{command}" aria-label="copy: {command}">copy</button>'
    )


def code(command: str) -> str:
    """A command line, and a button that copies it."""
    return (
        f'<span class="dl-command"><code>{markup.escape(command)}</code>'
        f'<button type="button" class="dl-copy-code" aria-label="copy: {markup.escape(command)}">copy</button></span>'
    )


# ---- layout and wiring


class DealPicture(gr.HTML):
    """The step-through picture. Value: `dealing.deal_value`. Event: `views` (another image or model is in focus)."""

    def __init__(self, **more):
        super().__init__(
            html_template='<div class="dl-deal"></div>',
            js_on_load="lens.deal(element, props, trigger, watch) // tells 'views'",
            apply_default_css=False,
            **more,
        )

    def api_info(self) -> dict:
        return {"type": {}, "description": "which token goes into which stack"}


def build(desk: Desk, *, tab, model, focus, dark, examples) -> tuple:
    """Draws the tab and wires it. Returns (the table, whose rows tell 'chat' and 'compare'; the example cards)."""
    status = gr.HTML(BUSY, apply_default_css=False, elem_id="dl-lab-head")
    with gr.Column(visible=False, elem_id="dl-lab-body") as body:
        with gr.Row(elem_classes=["dl-lab-choose"]):
            setting = gr.Dropdown([], value="", label="Runs", allow_custom_value=True, min_width=240)
            metric = gr.Dropdown(
                [(each.words, key) for key, each in lab.METRICS.items()], value="fine", label="Our score",
                filterable=False, min_width=240,
            )  # fmt: skip
            bench = gr.Dropdown(
                list(lab.BENCHES), value="AVG", label="The paper's benchmark", filterable=False, min_width=150
            )
        with gr.Column(elem_classes=["dl-panel"]):
            variants = gr.Plot(show_label=False, container=False, elem_id="dl-lab-variants")
            gr.HTML(markup.say("lab_variants"), apply_default_css=False)
        table = gr.HTML(
            "", js_on_load="lens.clicks(element, props, trigger) // tells 'chat' and 'compare'",
            apply_default_css=False, elem_id="dl-lab-table",
        )  # fmt: skip
        with gr.Row(elem_classes=["dl-plots"]):
            with gr.Column(elem_classes=["dl-panel"]):
                axes = gr.Plot(show_label=False, container=False, elem_id="dl-lab-axes")
                gr.HTML(markup.say("lab_axes", said_along()), apply_default_css=False)
            with gr.Column():  # together about as tall as what is beside them
                with gr.Column(elem_classes=["dl-panel"]):
                    acuity = gr.Plot(show_label=False, container=False, elem_id="dl-lab-acuity")
                    curves = gr.Dropdown([], label="Curves", multiselect=True, max_choices=9, allow_custom_value=True)
                    gr.HTML(markup.say("acuity"), apply_default_css=False)
                with gr.Column(elem_classes=["dl-panel"]):
                    budgets = gr.Plot(show_label=False, container=False, elem_id="dl-lab-budget")
                    gr.HTML(markup.say("lab_budget"), apply_default_css=False)
        with gr.Row(elem_classes=["dl-plots"]):
            with gr.Column(elem_classes=["dl-panel"]):
                recall = gr.Plot(show_label=False, container=False, elem_id="dl-lab-recall")
                gr.HTML(markup.say("lab_recall"), apply_default_css=False)
            with gr.Column(elem_classes=["dl-panel"]):
                spent = gr.Plot(show_label=False, container=False, elem_id="dl-lab-cost")
                cost = gr.Dropdown(
                    [(f"{each.words} ({each.unit})", key) for key, each in lab.COSTS.items()], value="context",
                    label="Cost", filterable=False,
                )  # fmt: skip
                gr.HTML(markup.say("lab_cost"), apply_default_css=False)
        searched = gr.HTML("", apply_default_css=False, elem_id="dl-lab-search")
        with gr.Row(elem_classes=["dl-take"]):
            what = gr.Dropdown(list(FIGURES), value="variants", label="Take away", scale=2, filterable=False)
            kind = gr.Radio(list(KINDS), value="png", label="as", scale=2)
            button = gr.Button("Download", size="sm", scale=1, elem_id="dl-lab-take")
            file = gr.DownloadButton("file", elem_id="dl-lab-file", elem_classes=["dl-fetch"])
    gr.HTML("<h3>How the tokens are dealt out</h3>", apply_default_css=False, elem_classes=["dl-lab-title"])
    with gr.Column(elem_classes=["dl-panel"]):
        picture = DealPicture(elem_id="dl-deal")
    gr.HTML("<h3>What a budget would keep</h3>", apply_default_css=False, elem_classes=["dl-lab-title"])
    with gr.Column(elem_classes=["dl-panel"], elem_id="dl-lab-keep"):
        with gr.Row(elem_classes=["dl-lab-choose"]):
            ranking = gr.Radio(
                [(words, key) for key, words in budget.RANKINGS.items()], value="norm", label="Rows ranked"
            )
            percent = gr.Slider(5, 100, value=START_BUDGET, step=5, label="Rows that keep some of their stacks, %")
            show = gr.Button("Show on the image", size="sm", elem_id="dl-lab-show")
        told = gr.HTML("", apply_default_css=False, elem_id="dl-lab-at-budget")
        line = line_of()
        lacks = gr.HTML("", apply_default_css=False)
        kept = gr.Plot(show_label=False, container=False, elem_id="dl-lab-kept")
        of = gr.State(())
        gr.HTML(markup.say("kept"), apply_default_css=False)
    cards = examples()

    choices = [setting, metric, bench, cost, curves]
    views = [status, body, setting, curves, table, variants, axes, acuity, budgets, recall, spent, told, searched]
    shown = {
        "fn": bound(results, desk), "inputs": [dark, *choices, percent], "outputs": views, "queue": False,
        "show_progress": "minimal", "show_progress_on": [status],
    }  # fmt: skip
    # One event for all: two choices made while the first is being drawn end in one more drawing, of both.
    gr.on([tab.select, *(each.input for each in choices)], **shown, api_name="lab_results", trigger_mode="always_last")
    dealing_out = {
        "fn": bound(deal, desk), "inputs": [model, focus], "outputs": [picture], "queue": False,
        "show_progress": "hidden",
    }  # fmt: skip
    unkeeping = {
        "fn": bound(unkeep, desk), "inputs": [of, model, focus], "outputs": [lacks, kept, of], "queue": False,
        "show_progress": "hidden",
    }  # fmt: skip
    tab.select(**dealing_out, api_name="open_deal")
    tab.select(**unkeeping, api_name="open_kept")
    picture.views(**dealing_out, api_name="deal", trigger_mode="always_last")
    picture.views(**unkeeping, api_name="unkeep", trigger_mode="always_last")
    keeping = {
        **in_turn(keep, desk, [lacks, kept, of], line), "inputs": [ranking, percent, dark, model, focus],
        "show_progress": "minimal", "show_progress_on": [kept],
    }  # fmt: skip
    marked = {
        "fn": bound(mark, desk), "inputs": [percent, dark, setting, metric, bench], "outputs": [budgets, told],
        "queue": False, "show_progress": "hidden",
    }  # fmt: skip
    percent.input(**marked, api_name="mark_budget", trigger_mode="always_last")  # a key press releases nothing
    gr.on([show.click, ranking.input, percent.input], **keeping, api_name="keep", trigger_mode="always_last").success(
        **unkeeping, api_name="kept"
    )  # another image may have been chosen meanwhile
    start = "() => document.querySelector('#dl-lab-file').click()"
    button.click(
        bound(take, desk), [what, kind, *choices], [file], api_name="lab_download", show_progress="minimal",
        show_progress_on=[status],
    ).success(None, js=start, api_name="lab_download_start")  # fmt: skip
    return table, cards


def said_along() -> str:
    """What the paper says along the axes of figure 3 and table 4."""
    return " ".join(axis.said for axis in lab.FIGURE_3.values())

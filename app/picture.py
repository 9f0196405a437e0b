"""The stack picture, the one control of the plan: what it shows of a model, a plan and an image, as plain values.

Drawing and editing are in assets/js/picture.js. The plan goes to the browser as text and comes back as text; whatever
comes back is parsed and validated like anything a visitor types. Knows nothing about answers.
"""

from __future__ import annotations

import gradio as gr
import numpy as np

from analysis.compare import plan_badge
from app.markup import data_uri, escape
from app.session import Held
from model.engine import Engine
from model.plan import Plan, presets
from model.types import View


class StackPicture(gr.HTML):
    """The picture. Value: see `picture_value`. Events: `plan` (every change), `live` (the same, on the Stacks tab)."""

    def __init__(self, **more):
        super().__init__(
            html_template='<div class="dl-picture"></div>',
            js_on_load="lens.picture(element, props, trigger, watch) // tells 'plan' and 'live'",
            apply_default_css=False,
            **more,
        )

    def api_info(self) -> dict:
        return {"type": {}, "description": "what the stack picture shows"}


class Carrier(gr.HTML):
    """A component without a look: its value is for the page's script, under `lens.<name>`."""

    def __init__(self, name: str, **more):
        super().__init__(
            html_template="<div></div>",
            js_on_load=f"lens.carry('{name}')(element, props, trigger, watch)",
            apply_default_css=False,
            elem_classes=["dl-carrier"],
            **more,
        )

    def api_info(self) -> dict:
        return {"type": {}, "description": "values for the page's script"}


def picture_value(engine: Engine, plan: Plan) -> dict:
    """What the picture shows of this model under this plan."""
    layout = engine.layout
    kind, why = plan_badge(layout, plan)
    sources = [
        {"name": s.name, "label": s.label, "tap": s.tap, "home": s.home, "words": s.own_words}
        for s in layout.sources_for(plan)
    ]
    return {
        "name": engine.name,
        "plan": str(plan),
        "trained": str(layout.default),
        "badge": [kind, why],
        "presets": [[label, str(preset)] for label, preset in presets(layout).items()],
        "layout": {
            "sources": sources,
            "layers": layout.n_layers,
            "vision": layout.n_vision_layers,
            "convention": layout.convention,
        },
    }


def sees(held: Held | None) -> str:
    """What is said of the image in focus."""
    if held is None:
        return '<p class="dl-note">No image yet: upload one, or pick an example.</p>'
    kept = "" if held.example else " An uploaded image is not part of the address."
    notes = f" ({escape('; '.join(held.notes))})" if held.notes else ""
    size = f"{held.image.width} × {held.image.height}"
    return f'<p class="dl-note"><b>{escape(held.name)}</b>, {size} pixels{notes}.{kept}</p>'


def views_value(engine: Engine, held: Held | None) -> dict | None:
    """The pictures that the model sees of an image, with their token grids; None without an image that it can read."""
    if held is None or not engine.reads(held.image):
        return None
    return {"model": engine.name, "name": held.name, "views": [_view(view) for view in engine.views(held.image)]}


def _view(view: View) -> dict:
    return {
        "name": view.name,
        "src": data_uri(view.image, 320),
        "size": list(view.image.size),
        "grid": list(view.grid),
        "owners": None if view.owners is None else [list(row) for row in view.owners],
    }


def effect_value(engine: Engine, plan: Plan, effect: np.ndarray) -> dict:
    """How far each source moves the stream, for the bars beside the layers. effect: [sources, L+1], `image_effect`."""
    names = [source.name for source in engine.layout.sources_for(plan)]
    rows = {name: [round(float(v), 4) for v in row] for name, row in zip(names, effect, strict=True)}
    return {
        "model": engine.name,
        "plan": str(plan),
        "rows": rows,
        "most": [round(float(v), 4) for v in effect.max(0)] if len(effect) else [],
        "scale": max(float(effect.max(initial=0.0)), 1e-6),
    }

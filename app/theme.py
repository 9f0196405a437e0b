"""How the page looks: a quiet gradio theme on system fonts, our own style sheets and scripts, nothing from elsewhere.

Knows nothing about what the page shows.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from analysis.palette import css_variables

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SCRIPTS = ("lens.js", "picture.js", "look.js", "deal.js")  # in this order
STYLES = ("page.css", "picture.css", "tabs.css", "lab.css")
FONTS = ("Inter", "system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """Ink on white or near-black, one blue for what can be pressed, thin lines, small radii."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        text_size="sm",
        spacing_size="sm",
        radius_size="md",
        font=[gr.themes.Font(name) for name in FONTS],
        font_mono=[gr.themes.Font(name) for name in MONO],
    ).set(
        body_background_fill="#ffffff",
        body_background_fill_dark="#14171c",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#14171c",
        background_fill_secondary="#f7f8fa",
        background_fill_secondary_dark="#1b1f26",
        block_background_fill="#ffffff",
        block_background_fill_dark="#171b21",
        border_color_primary="#d9dde3",
        border_color_primary_dark="#2c323b",
        block_border_width="1px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_title_text_weight="600",
        body_text_color="#1b1f24",
        body_text_color_dark="#e6e9ee",
        body_text_color_subdued="#5b6472",
        body_text_color_subdued_dark="#9aa3af",
        button_primary_background_fill="#1f5fa8",
        button_primary_background_fill_hover="#184d8a",
        button_primary_background_fill_dark="#2a6db8",
        button_primary_background_fill_hover_dark="#3a7fca",
        button_primary_text_color="#ffffff",
        input_background_fill="#f4f6f8",
        input_background_fill_dark="#1b1f26",
    )


def head() -> str:
    """Our styles and scripts as elements of the page's head."""
    style = css_variables() + "".join((ASSETS / "css" / name).read_text(encoding="utf-8") for name in STYLES)
    script = "".join((ASSETS / "js" / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f'<meta name="referrer" content="no-referrer"><style>{style}</style><script>{script}</script>'

"""The look: nothing is fetched from elsewhere, every style and script is there."""

from __future__ import annotations

import re

from app import theme


def test_no_font_or_style_from_elsewhere():
    look = theme.theme()
    for font in (*look._font, *look._font_mono):
        assert font.stylesheet() == {"url": None, "css": None}


def test_the_head_holds_every_style_and_script_and_no_address():
    head = theme.head()
    for folder in ("css", "js"):
        for path in (theme.ASSETS / folder).iterdir():
            assert path.read_text(encoding="utf-8") in head, path
    # The name of the SVG language is an identifier; nothing is fetched from it.
    assert set(re.findall(r"https?://[^\s'\"]+", head)) <= {"http://www.w3.org/2000/svg"}
    assert head.count("</script>") == 1 and head.count("</style>") == 1

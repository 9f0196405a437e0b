"""The tabs of the page, one file each: handlers on top, the tab's layout and wiring below."""

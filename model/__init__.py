"""Plans, probes, traces, the engine and its model families.

Knows nothing about figures, pages or command lines: it never imports gradio or plotly.
"""

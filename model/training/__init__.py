"""Training of the embedded models from nothing: scenes, vision tower, twins. Knows nothing about the engine or the
page.
"""

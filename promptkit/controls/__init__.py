"""Controls: what a chapter compares a method with, to see which of its parts matters.

Each differs from a paper's method in one thing. They are built and run by name like the
methods, and neither listed nor ranked among them.
"""

"""One module a paper, named after its method. Every module of this folder registers
itself.
"""

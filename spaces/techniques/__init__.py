"""One file per technique: what it may decide, as plain data, and `table`, whose order is the order of the passes.
Nothing here imports torch or pydantic, or carries anything out; that is `runners/operators`.
"""

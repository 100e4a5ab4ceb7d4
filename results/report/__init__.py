"""The report of a front: one plain view of the data, computed once, and a writer per medium.

Nothing here measures or decides.
"""

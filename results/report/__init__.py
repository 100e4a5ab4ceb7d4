"""A front for people: one plain view of the data, worked out once, and a writer per medium.

Nothing here measures or decides.
"""

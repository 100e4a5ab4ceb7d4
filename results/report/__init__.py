"""A front for people: one plain view of the data, computed once, and one writer per medium. Nothing here measures or decides."""

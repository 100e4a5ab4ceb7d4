"""What is done to a network: one file per technique, and the one table of kinds of layers. Nothing here knows a study,
a target or a file.
"""

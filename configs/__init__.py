"""Configuration files and the ready studies: schema, loading, the user's task. Nothing here searches, measures or
compresses.
"""

"""Configuration files: schema, loading, the user's task, and the ready configurations."""

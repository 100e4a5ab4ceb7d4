"""The targets that files run on, their runtimes, and the latency on them. Knows no weights and no studies."""

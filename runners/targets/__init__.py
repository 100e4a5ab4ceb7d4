"""The targets that files run on, their runtimes, and latency on them. Nothing here knows of weights or studies."""

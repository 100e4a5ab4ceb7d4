"""What a file runs on: the targets, their runtimes, and latency on them. Nothing here knows a recipe's weights or a study."""

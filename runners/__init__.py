"""The doing: data, tracing, compression, recovery, export, measurement and files."""

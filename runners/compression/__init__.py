"""A recipe carried out on a live network, up to the packed file: tracing, calibration, the layer library, the passes.
Nothing here runs a file or takes a time.
"""

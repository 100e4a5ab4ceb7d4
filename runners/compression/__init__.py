"""A recipe carried out on a live network: tracing, calibration, the layer library, the passes. Nothing here measures or
exports.
"""

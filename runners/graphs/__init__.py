"""ONNX graphs: export, integer weights, merging, simulation. Nothing here trains, measures or chooses."""

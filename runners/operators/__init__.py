"""The techniques, each a plain function that carries out one step of a recipe."""

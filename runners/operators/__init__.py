"""One file per technique, each a plain function on a layer or network, and the one table of layer kinds. Nothing here
reads a study, a target or a file."""

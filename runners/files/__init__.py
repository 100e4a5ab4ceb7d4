"""The bytes on disk: packed files, entropy coding, atomic writing. Knows no recipe and loads no torch by itself."""

"""The bytes on disk: packed files, entropy coding, atomic writing. Nothing here knows a recipe or imports torch at
module level.
"""

"""The bytes on disk: packed files, entropy coding, atomic writing, and how candidates' files are named. Nothing here
compresses, runs or times a network, or imports torch.
"""

"""Timing and scoring in processes of their own: paired comparison, clean processes, random inputs. Knows no study."""

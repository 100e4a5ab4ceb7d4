"""Timing and scoring in processes of their own: paired comparison, clean processes, random inputs. Nothing here knows a
study.
"""

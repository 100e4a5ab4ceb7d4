"""Accuracy recovered by training: fine-tuning and distillation. Nothing here compresses or exports."""

"""Blocks of plain PyTorch models: recognized by their code, and run beside their replacement before anything is changed."""

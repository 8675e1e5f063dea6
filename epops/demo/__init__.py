"""`make demo`: a small MoE model learns English over several ranks, and is the one-process model all along."""

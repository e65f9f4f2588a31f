"""Building tiers: read a source, adapt, distil, calibrate, quantise, write an artifact.

Only the training modules (`adapt`, `distil`, `torch_llama`, `training`) import torch.
"""

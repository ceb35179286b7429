"""Parts of the GPU gate, see ``benchmarks/gpu_gate.py``."""

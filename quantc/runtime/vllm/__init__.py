"""quantc checkpoints in vLLM, on the modules and kernels that `quantc.load` uses; vLLM finds plugin.py by itself."""

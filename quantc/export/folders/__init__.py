"""Model folders of safetensors files that other runtimes load: one file for each container."""

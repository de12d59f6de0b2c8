"""CUDA kernels: sources, the compiler that is fetched at run time, and a launcher for each program."""

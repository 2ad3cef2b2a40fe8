"""The parts of tests/benchmarks/compare_trl_gpu.py, each a module that runs in a process of its own."""

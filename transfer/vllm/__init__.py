"""Weight updates inside vLLM, by its plug-in, and for vLLM servers that know nothing of this package.

The only folder of the package that imports vllm; whoever wants to know a vLLM version's ways looks here.
"""

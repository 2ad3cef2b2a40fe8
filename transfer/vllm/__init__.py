"""vLLM as a rollout engine: stock servers over HTTP, and our own weight-transfer backend inside vLLM."""

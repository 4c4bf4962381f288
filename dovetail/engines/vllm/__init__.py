"""vLLM: servers in processes of their own, a client for each, and what receives weights inside
them."""

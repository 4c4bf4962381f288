"""The engines behind one address: which takes a request, and what becomes of it when one dies."""

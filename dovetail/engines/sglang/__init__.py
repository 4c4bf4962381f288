"""SGLang servers, and `dovetail serve`, which speaks the same."""

"""An engine behind HTTP, on this machine only, in the forms that users' functions speak: SGLang's,
vLLM's and OpenAI's."""

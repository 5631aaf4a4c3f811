"""OpenAI's calls, and the operator's, over HTTP."""
